"""Texts as tokens, and the excerpts of them that a fit sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctx.hf.fitting.settings import FitSettings

__all__ = ["Excerpts", "drawn_positions", "excerpts_of", "random_excerpt", "tokens_of"]

_WHERE = "ctx.hf.fit"


def tokens_of(texts: Any, tokenizer: Any) -> list[Tensor]:
    """int64 [n] of each text.

    Args:
        texts: strings, or tokens int64 [n]; one or several.
        tokenizer: of the model; needed for strings.

    Raises:
        TypeError, ValueError: a text is something else, or there is no tokenizer for it.
    """
    if isinstance(texts, (str, Tensor)):
        texts = [texts]
    made = []
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError(f"{_WHERE}: tokenizer must be given for texts of str, got None")
            text = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not isinstance(text, Tensor) or text.dim() != 1 or text.is_floating_point():
            got = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise TypeError(f"{_WHERE}: texts must be str or integer tensors [n], got {got}")
        made.append(text.to("cpu", torch.int64))
    if not made:
        raise ValueError(f"{_WHERE}: texts must be at least one, got none")
    return made


class Excerpts:
    """Excerpts of texts, evenly spread, and the queries of each.

    Attributes:
        tokens: int64 [excerpts, T].
        queries: int64 [excerpts, Q], positions behind the first `slots` tokens, rising.
        validating: those that are kept apart to choose by.
    """

    def __init__(self, tokens: Tensor, queries: Tensor, validating: list[int]) -> None:
        self.tokens, self.queries, self.validating = tokens, queries, validating

    @property
    def training(self) -> list[int]:
        """Those that parameters are fitted to."""
        return [x for x in range(len(self.tokens)) if x not in self.validating]


def excerpts_of(texts: Sequence[Tensor], settings: FitSettings) -> Excerpts:
    """The excerpts of a fit.

    Raises:
        ValueError: the texts are too short, so that excerpts would overlap.
    """
    number, length = settings.excerpts + settings.validation, settings.excerpt_tokens
    starts = _starts(texts, number, length)
    tokens = torch.stack([texts[text][at : at + length] for text, at in starts])
    generator = torch.Generator().manual_seed(settings.seed)
    queries = []
    first = settings.first_query
    for _ in range(number):
        queries.append(drawn_positions(first, length, settings.queries, generator))
    # Spread among the others, as texts change on the way.
    validating = [
        (2 * i + 1) * number // (2 * settings.validation) for i in range(settings.validation)
    ]
    return Excerpts(tokens, torch.stack(queries), validating)


def _starts(texts: Sequence[Tensor], number: int, length: int) -> list[tuple[int, int]]:
    """(text, first token) of disjoint excerpts."""
    places = [
        (i, at) for i, text in enumerate(texts) for at in range(0, len(text) - length + 1, length)
    ]
    if len(places) < number:
        raise ValueError(
            f"{_WHERE}: texts must have {number} disjoint parts of {length} tokens "
            f"(excerpts + validation, excerpt_tokens), got {len(places)}"
        )
    return [places[i * len(places) // number] for i in range(number)]


def drawn_positions(first: int, end: int, count: int, generator: torch.Generator) -> Tensor:
    """Different positions in [first, end), rising, int64 [count]; all where there are fewer."""
    drawn = torch.randperm(end - first, generator=generator)[:count]
    return (drawn + first).sort().values


def random_excerpt(
    texts: Sequence[Tensor], length: int, queries: int, first: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens [length] from anywhere, and positions [queries] behind the first ones, rising.

    Raises:
        ValueError: no text is so long.
    """
    room = torch.tensor([max(len(text) - length + 1, 0) for text in texts])
    if not room.any():
        raise ValueError(
            f"{_WHERE}: texts must have at least {length} tokens in one, got "
            f"{max(len(text) for text in texts)}"
        )
    at = int(torch.randint(int(room.sum()), (), generator=generator))
    ends = room.cumsum(0)
    text = int(torch.searchsorted(ends, at, right=True))
    begin = at - int(ends[text] - room[text])
    return texts[text][begin : begin + length], drawn_positions(first, length, queries, generator)
