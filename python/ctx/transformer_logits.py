"""Logits of a decoder language model, of what its last block gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctx.padding import moved_back

if TYPE_CHECKING:
    from ctx.transformer import CompressiveTransformer

__all__ = ["logits_of"]


def logits_of(
    model: CompressiveTransformer,
    hidden: Tensor,  # [B, T, E]
    lengths: Tensor | None,
    mask: Tensor | None,
    last_only: bool,
) -> Tensor:
    """Logits [B, T, vocab_size], or [B, vocab_size] of each row's last token; zero at padding,
    which stands on the right in `hidden` and where `mask` says in the result.
    """
    if not last_only:
        return moved_back(_head(model, hidden), mask, lengths)
    logits = _head(model, _last(hidden, lengths))[:, 0]
    if not hidden.shape[1]:
        return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0)
    if lengths is not None:
        logits = logits.masked_fill((lengths < 1).unsqueeze(-1), 0.0)
    return logits


def _last(hidden: Tensor, lengths: Tensor | None) -> Tensor:
    """What stands behind the last token of every row, [B, 1, E]; anything where there is none."""
    if not hidden.shape[1]:
        return F.pad(hidden, (0, 0, 0, 1))
    if lengths is None:
        return hidden[:, -1:]
    place = (lengths - 1).clamp_min(0).reshape(-1, 1, 1)
    return hidden.gather(1, place.expand(-1, 1, hidden.shape[2]))


def _head(model: CompressiveTransformer, hidden: Tensor) -> Tensor:
    """Without a head of its own, by the embedding's vectors of all tokens, [vocab_size, E].

    They are read where the embedding is torch's own layer over a plain tensor. What stands in
    its place otherwise (an adapter, a shard, a quantised layer, one whose weight is brought in
    for the call) is asked by calling it, so that what it adds counts and hooks run.
    """
    hidden = model.norm(hidden)
    if model.head is not None:
        logits: Tensor = model.head(hidden)
        return logits
    embedding = model.embedding
    if type(embedding) is nn.Embedding and "forward" not in vars(embedding):
        weight = embedding.weight
        absent = weight.is_meta and not hidden.is_meta
        # neither DTensor nor quantised
        if not absent and not hasattr(type(weight), "__tensor_flatten__"):
            return F.linear(hidden, weight)
    every = torch.arange(model.config.vocab_size, device=hidden.device)
    return F.linear(hidden, embedding(every))
