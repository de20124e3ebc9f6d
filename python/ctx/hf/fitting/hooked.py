"""The attention of a model's full-attention layers, taken over for a while."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ctx.hf import attention
from ctx.hf.model import layers_of

__all__ = ["Attend", "attention_taken_over", "output_weight"]

#: (number among the full-attention layers, module, q [B, H, T, D], k [B, Hkv, T, D], v, scale,
#: soft cap) to [B, T, H, Dv]; q and k are rotated.
Attend = Callable[[int, nn.Module, Tensor, Tensor, Tensor, float, float | None], Tensor]

_NAME = "ctx_fit"
_WHERE = "ctx.hf.fit"
_now: contextvars.ContextVar[tuple[dict[int, int], Attend]] = contextvars.ContextVar(_NAME)


@contextlib.contextmanager
def attention_taken_over(model: Any, attend: Attend) -> Iterator[None]:
    """In it calls without a cache come to `attend`; other layers attend plainly.

    Raises:
        ValueError: the model is one that a CompressiveCache refuses.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _taken_over)
    AttentionMaskInterface.register(_NAME, attention.mask)
    config = model.config.get_text_config(decoder=True)
    own = [at for at, layer in enumerate(layers_of(config, _WHERE)) if layer is None]
    before = config._attn_implementation
    token = _now.set(({at: number for number, at in enumerate(own)}, attend))
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        _now.reset(token)


def _taken_over(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it."""
    numbers, attend = _now.get()
    number = numbers.get(getattr(module, "layer_idx", None))  # type: ignore[arg-type]
    if number is None:
        return attention.attention(
            module, query, key, value, attention_mask, dropout, scaling, softcap, **arguments
        )
    if arguments.get("s_aux") is not None:
        raise ValueError(f"{_WHERE}: model must be one without sink logits (s_aux), got them")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return attend(number, module, query, key, value, scale, softcap), None


def output_weight(module: nn.Module, width: int) -> Tensor:
    """The weight [E, H * Dv] by which attention's output goes on, or the identity where none is
    found.

    Args:
        module: an attention layer of a model.
        width: H * Dv.
    """
    names = ("o_proj", "dense", "out_proj", "c_proj", "wo", "output")
    for name in names:
        found = getattr(module, name, None)
        weight = getattr(found, "weight", None)
        if isinstance(found, nn.Linear) and weight is not None and weight.shape[1] == width:
            return found.weight.detach()
    return torch.eye(width)
