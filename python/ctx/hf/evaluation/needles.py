"""Needle probes: a fact in a long text, and at the end the beginning of its sentence."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctx import _check
from ctx.hf.evaluation.candidates import Candidate
from ctx.hf.evaluation.comparison import Samples
from ctx.hf.evaluation.streaming import stream

__all__ = ["CITIES", "Probe", "build", "score_probes"]

_WHERE = "ctx.hf.evaluation.needles.build"
CITIES = (
    "Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Havana", "Lima", "London", "Madrid", "Moscow",
    "Oslo", "Paris", "Prague", "Rome", "Tokyo", "Vienna",
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A text that ends with a question and its answer.

    Args:
        ids: int64 [N].
        needle: tokens of the text that state the fact, a range.
        answer: tokens of the text that answer, the last ones, a range.
        text: what the needle says.
    """

    ids: Tensor
    needle: range
    answer: range
    text: str


def build(
    encode: Callable[[str], Sequence[int]],
    ids: Tensor,  # int64 [M]
    *,
    length: int = 4096,
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    per_depth: int = 4,
    digits: int = 5,
    seed: int = 0,
) -> list[Probe]:
    """Probes with needles at these depths.

    The needle is "The secret number of <city> is <digits>." on a line of its own; the question is
    the same tokens up to the number.

    Args:
        encode: text to tokens, without special ones.
        ids: tokens of the text around needles, of which each probe takes a stretch of its own where
            there are enough.
        length: tokens of each probe, needle, question and answer among them.
        depths: where needles begin, as shares of the text, 0: at its start, 1: before the question.
        per_depth: probes for each depth, in its order.
        digits: of the number.
        seed: of cities and numbers.

    Returns:
        ``len(depths) * per_depth`` probes of `length` tokens.

    Raises:
        ValueError: the text is too short, or `length` too small.
    """
    length = _check.integer(length, "length", _WHERE, 1)
    per_depth = _check.integer(per_depth, "per_depth", _WHERE, 1)
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"{_WHERE}: depths must be between 0 and 1, got {list(depths)}")
    draw = random.Random(seed)
    count = len(depths) * per_depth
    probes = []
    for number in range(count):
        depth = depths[number // per_depth]
        city = draw.choice(CITIES)
        secret = "".join(draw.choice("0123456789") for _ in range(digits))
        asked, said = f"\nThe secret number of {city} is", f" {secret}"
        question, answer, end = (list(encode(part)) for part in (asked, said, ".\n"))
        fact = question + answer + end
        own = length - len(fact) - len(question) - len(answer)
        if own < 1 or len(ids) < own:
            raise ValueError(
                f"{_WHERE}: length must be at least {length - own + 1} and at most "
                f"{length - own + len(ids)}, as the text has {len(ids)} tokens, got {length}"
            )
        begin = (len(ids) - own) * number // max(1, count - 1)
        around = ids[begin : begin + own]
        place = round(depth * own)
        parts = [around[:place], _as(ids, fact), around[place:], _as(ids, question + answer)]
        needle = range(place, place + len(fact))
        text = f"{asked}{said}.".strip()
        probes.append(Probe(torch.cat(parts), needle, range(length - len(answer), length), text))
    return probes


def _as(ids: Tensor, tokens: list[int]) -> Tensor:
    return torch.tensor(tokens, dtype=ids.dtype, device=ids.device)


def score_probes(
    model: Any,
    probes: Sequence[Probe],
    candidates: Sequence[Candidate],
    *,
    chunk: int = 512,
    advance: Callable[[int], None] | None = None,
) -> Samples:
    """-log p of the whole answer in nats, and whether greedy decoding gives it; a sample a probe.

    Args:
        model, candidates, chunk, advance: as in :func:`ctx.hf.evaluation.stream`.
    """
    losses = torch.zeros(len(candidates), len(probes), dtype=torch.float64)
    hits = torch.zeros_like(losses)
    for number, probe in enumerate(probes):
        start = probe.answer.start
        scores = stream(model, probe.ids, candidates, chunk=chunk, start=start, advance=advance)
        for row, one in enumerate(scores):
            losses[row, number] = one.losses.double().sum()
            hits[row, number] = float(one.hits.all())
    return Samples(tuple(candidates), losses, None, hits, whole=True)
