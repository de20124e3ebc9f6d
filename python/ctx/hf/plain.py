"""Causal attention of torch's own functions, for layers without a compressive memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend"]


def attend(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, Dv]
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    softcap: float | None,
    causal: bool,
    sink_logits: Tensor | None = None,  # [H]
) -> Tensor:
    """Attention of the last T of S tokens.

    Args:
        mask: bool [B, S], true at tokens; or [B, 1, T, S], which stands for causality as well; or
            None.
        softcap: a score x becomes ``softcap * tanh(x / softcap)``.
        causal: whether tokens see none behind them.
        sink_logits: scores of nothing, which take their share of the softmax.

    Returns:
        [B, T, H, Dv].
    """
    tokens, held = q.shape[2], k.shape[2]
    seen = mask
    manual = bool(softcap) or sink_logits is not None
    square = mask is None and causal and tokens == held and not manual
    if not square and (mask is None or mask.dim() == 2):
        padding = None if mask is None else _fitting(mask, held)[:, None, None, :]
        seen = padding
        if causal and tokens > 1:
            order = torch.arange(held, device=q.device)
            seen = order[None, :] <= order[held - tokens :, None]
            seen = seen[None, None] if padding is None else seen & padding
    if seen is not None and seen.dtype != torch.bool:
        raise ValueError(f'ctx.hf attention "ctx": attention_mask must be bool, got {seen.dtype}')
    if not manual:
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            dropout_p=dropout,
            scale=scale,
            is_causal=square,
            enable_gqa=True,
        )
        return out.transpose(1, 2).contiguous()
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sink_logits is not None:
        sinks = sink_logits.to(scores)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32)[..., :held].to(q.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ v).transpose(1, 2).contiguous()


def _fitting(mask: Tensor, held: int) -> Tensor:
    """A 2-D mask of the columns that are held; what it does not reach is padding."""
    missing = held - mask.shape[1]
    mask = mask.to(torch.bool)
    return torch.nn.functional.pad(mask, (0, missing)) if missing > 0 else mask[:, -held:]
