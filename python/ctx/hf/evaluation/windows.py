"""Disjoint windows of a text, of which the later part is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctx import _check
from ctx.hf.evaluation.candidates import Candidate
from ctx.hf.evaluation.comparison import Samples
from ctx.hf.evaluation.streaming import stream

__all__ = ["cut", "score"]


def cut(
    ids: Tensor,  # int64 [N]
    count: int = 8,
    length: int = 4096,
    *,
    bos: int | None = None,
) -> list[Tensor]:
    """Disjoint windows, evenly spread over a text.

    Args:
        ids: the text's tokens.
        count: windows.
        length: tokens of each.
        bos: a token to put in front of each, which counts; where the model wants one.

    Returns:
        `count` tensors [length].

    Raises:
        ValueError: the text is too short.
    """
    where = "ctx.hf.evaluation.windows.cut"
    count = _check.integer(count, "count", where, 1)
    length = _check.integer(length, "length", where, 2)
    own = length - (bos is not None)
    if len(ids) < count * own:
        raise ValueError(
            f"{where}: ids must have at least {count} × {own} = {count * own} tokens, "
            f"got {len(ids)}"
        )
    free = len(ids) - count * own
    begins = [number * own + free * number // max(1, count - 1) for number in range(count)]
    head = ids[:0] if bos is None else ids.new_tensor([bos])
    return [torch.cat([head, ids[begin : begin + own]]) for begin in begins]


def score(
    model: Any,
    windows: Sequence[Tensor],  # int64 [N] each
    candidates: Sequence[Candidate],
    *,
    start: int = 2048,
    chunk: int = 512,
    kl: bool = True,
    advance: Callable[[int], None] | None = None,
) -> Samples:
    """Mean losses of the tokens from `start` on, each window from an empty cache.

    Args:
        model, candidates, start, chunk, kl, advance: as in :func:`ctx.hf.evaluation.stream`; the
            first candidate is the full cache, and none has a limit.
        windows: of :func:`cut`, or any.

    Returns:
        Samples over windows, with KL if asked for, and the share of tokens that were likeliest.
    """
    losses, divergences, hits = [], [], []
    for ids in windows:
        options: dict[str, Any] = {"chunk": chunk, "start": start, "kl": kl, "advance": advance}
        scores = stream(model, ids, candidates, **options)
        losses.append([one.losses.double().mean() for one in scores])
        hits.append([one.hits.double().mean() for one in scores])
        # The reference's divergence from itself.
        divergences.append(
            [torch.zeros(()) if one.kl is None else one.kl.double().mean() for one in scores]
        )
    made = _table(divergences) if kl else None
    return Samples(tuple(candidates), _table(losses), made, _table(hits))


def _table(columns: list[list[Tensor]]) -> Tensor:
    """Float64 [K, N] of N columns."""
    numbers = [[float(x) for x in column] for column in columns]
    return torch.tensor(numbers, dtype=torch.float64).mT
