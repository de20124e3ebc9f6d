"""Passages that repeat after a distance: what of them a cache still gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctx import _check
from ctx.hf.evaluation.candidates import Candidate
from ctx.hf.evaluation.comparison import Samples
from ctx.hf.evaluation.windows import score

__all__ = ["build", "score_repeats"]

_WHERE = "ctx.hf.evaluation.repeats.build"


def build(
    ids: Tensor,  # int64 [N]
    distance: int,
    *,
    passage: int = 256,
    count: int = 8,
    lead: int = 64,
) -> list[Tensor]:
    """Texts that say a passage, go on, and say it again.

    Each takes a stretch of its own of the text: ``lead`` tokens, the passage, ``distance`` tokens;
    then the passage once more. Stretches are evenly spread.

    Args:
        ids: the text's tokens.
        distance: tokens between the passage's end and its second beginning, >= 1.
        passage: tokens of it.
        count: texts.
        lead: tokens before it, which keep it off the sinks.

    Returns:
        `count` tensors [lead + 2 passage + distance]; the last `passage` tokens repeat.

    Raises:
        ValueError: the text is too short.
    """
    distance = _check.integer(distance, "distance", _WHERE, 1)
    passage = _check.integer(passage, "passage", _WHERE, 1)
    count = _check.integer(count, "count", _WHERE, 1)
    lead = _check.integer(lead, "lead", _WHERE, 0)
    stretch = lead + passage + distance
    if len(ids) < count * stretch:
        raise ValueError(
            f"{_WHERE}: ids must have at least {count} × {stretch} = {count * stretch} tokens, "
            f"got {len(ids)}"
        )
    texts = []
    for number in range(count):
        begin = number * (len(ids) // count)
        own = ids[begin : begin + stretch]
        texts.append(torch.cat([own, own[lead : lead + passage]]))
    return texts


def score_repeats(
    model: Any,
    texts: Sequence[Tensor],
    candidates: Sequence[Candidate],
    *,
    passage: int = 256,
    chunk: int = 512,
    advance: Callable[[int], None] | None = None,
) -> Samples:
    """Mean loss on the second occurrence, a sample for each text of :func:`build`.

    Args:
        model, candidates, chunk, advance: as in :func:`ctx.hf.evaluation.stream`.
        texts: of one length, ending with the passage's `passage` tokens.
    """
    start = len(texts[0]) - passage
    return score(model, texts, candidates, start=start, chunk=chunk, kl=False, advance=advance)
