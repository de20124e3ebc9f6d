"""Associative recall: pairs of a key and a value first, then keys alone, whose values are asked."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["CHANCE", "KEYS", "VALUES", "Batch", "RecallTask", "Tally", "bins"]

KEYS = VALUES = 32  # tokens 0 ... KEYS - 1 are keys, KEYS ... KEYS + VALUES - 1 values
CHANCE = 1 / VALUES


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences and what is asked in them; query i is token `2 * pairs + i`."""

    tokens: Tensor  # [B, 2 * pairs + length]: what a model sees
    answers: Tensor  # [B, length]: the value token of each query, never shown behind the pairs
    distances: Tensor  # [B, length]: tokens from the pair's value to the query; 1: right behind it


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """`pairs` different keys with a random value each, in random order; then `length` queries."""

    pairs: int
    length: int

    @property
    def tokens(self) -> int:
        """Length of a sequence."""
        return 2 * self.pairs + self.length

    @property
    def farthest(self) -> int:
        """The largest distance: from the first pair to the last query."""
        return self.tokens - 2

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        """`rows` sequences that depend on the generator only."""
        keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, : self.pairs]
        values = KEYS + torch.randint(VALUES, (rows, self.pairs), generator=generator)
        asked = torch.randint(self.pairs, (rows, self.length), generator=generator)
        shown = torch.stack((keys, values), -1).flatten(1)
        positions = 2 * self.pairs + torch.arange(self.length)
        return Batch(
            tokens=torch.cat((shown, keys.gather(1, asked)), 1),
            answers=values.gather(1, asked),
            distances=positions - (2 * asked + 1),
        )

    def lessons(self) -> list[tuple[RecallTask, int]]:
        """Easier tasks first, this one last, each with how many times the sequences of a step.

        Fewer pairs, asked for soon: what takes thousands of steps to learn at once, to bind a value
        to its key, takes hundreds then.
        """
        return [(self._part(4), 4), (self._part(2), 2), (self, 1)]

    def _part(self, share: int) -> RecallTask:
        return RecallTask(-(-self.pairs // share), -(-self.length // (2 * share)))


class Tally:
    """Right answers and questions at every distance up to `farthest`."""

    def __init__(self, farthest: int) -> None:
        self.right = torch.zeros(farthest + 1, dtype=torch.int64)
        self.asked = torch.zeros(farthest + 1, dtype=torch.int64)

    def add(self, right: Tensor, distances: Tensor) -> None:
        """Counts answers, bool [...], at their distances, int64 [...]."""
        size = len(self.asked)
        self.right += torch.bincount(distances[right], minlength=size)
        self.asked += torch.bincount(distances.flatten(), minlength=size)

    def __add__(self, other: Tally) -> Tally:
        both = Tally(len(self.asked) - 1)
        both.right, both.asked = self.right + other.right, self.asked + other.asked
        return both

    def accuracy(self, first: int, last: int) -> float:
        """Share of right answers at distances `first` ... `last`; NaN where nothing was asked."""
        span = slice(first, last + 1)
        return float(self.right[span].sum() / self.asked[span].sum())


def bins(marks: tuple[int, ...], farthest: int, width: int) -> list[list[tuple[int, int]]]:
    """Distances 1 ... farthest, cut behind every mark, and each piece into bins of about `width`.

    Returns the (first, last) of every bin, by piece; a piece beyond `farthest` is left out.
    """
    pieces, begin = [], 0
    for mark in sorted({min(mark, farthest) for mark in (*marks, farthest)}):
        if mark <= begin:
            continue
        count = max(1, round((mark - begin) / max(1, width)))
        edges = [begin + (mark - begin) * i // count for i in range(count + 1)]
        pieces.append([(a + 1, b) for a, b in pairwise(edges) if b > a])
        begin = mark
    return pieces
