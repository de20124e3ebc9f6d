"""The attention named "ctx": over the rings of a :class:`ctx.hf.CompressiveCache`, on the library's
own kernels; plain causal attention where there is no such cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctx.hf import plain
from ctx.hf._transformers import cache_classes
from ctx.hf.layer import CARRIED

__all__ = ["NAME", "attention", "mask", "register"]

#: What ``model.set_attn_implementation`` is given.
NAME = "ctx"
_WHERE = 'ctx.hf attention "ctx"'

#: Arguments of attention functions that change scores in ways that the law does not have.
_REFUSED = ("position_bias", "head_mask", "sinks")


def register() -> None:
    """Makes ``model.set_attn_implementation("ctx")`` known to transformers; may be called again.

    Raises:
        ImportError: transformers is missing, or of another version.
    """
    cache_classes()
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(**arguments: Any) -> Tensor | None:
    """What attention is given as its mask: the 2-D mask of tokens and padding, or None.

    Nothing is materialised for causal layers. Other layers (sliding windows, blocks) and caches of
    a fixed length get transformers' own boolean mask.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plainly = arguments["mask_function"] is causal_mask_function
    if plainly and not isinstance(arguments.get("q_offset", 0), Tensor):
        given: Tensor | None = arguments.get("attention_mask")
        return given
    made: Tensor | None = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    return made


def attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, Hkv, T, D]
    value: Tensor,  # [B, Hkv, T, Dv]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attends to the memory that `key` comes from, or plainly; as transformers calls it.

    Returns:
        [B, T, H, Dv], and no weights.

    Raises:
        ValueError: something is asked for that the kernels cannot do; the message names it.
    """
    if arguments.get("output_attentions"):
        raise ValueError(f"{_WHERE}: output_attentions must be False, got True")
    for name in _REFUSED:
        if arguments.get(name) is not None:
            raise ValueError(f"{_WHERE}: {name} must be None, got a tensor")
    causal = arguments.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    sinks = arguments.get("s_aux")  # [H], of gpt-oss
    layer = getattr(key, CARRIED, None)
    if layer is None:
        out = plain.attend(
            query, key, value, attention_mask, dropout, scaling, softcap, bool(causal), sinks
        )
        return out, None
    if not causal:
        raise ValueError(f"{_WHERE}: is_causal must be True over a memory, got {causal}")
    if dropout:
        raise ValueError(f"{_WHERE}: dropout must be 0 over a memory, got {dropout}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    positions = arguments.get("position_ids")
    made = layer.stream.attend(
        layer.index, query, key, value, attention_mask, positions, float(scaling), softcap, sinks
    )
    return made, None
