"""Compressors: `ratio` tokens become one slot, per key/value head.

Rae et al. 2019 (arXiv:1911.05507), section 3, "Compression functions and losses", lists max and
mean pooling, 1D convolution, dilated convolutions and most-used. Deviations: the paper compresses
the hidden states that it stores, here keys and values are stored and compressed, each with
parameters of their own; convolutions work per head; `gated` is an addition (softmax pooling, one
gate for keys and one for values).

A compressor is a function of whole groups

    keys [B, Hkv, G, c, D], values [B, Hkv, G, c, Dv]  ->  [B, Hkv, G, D], [B, Hkv, G, Dv]

and always receives keys without their rotation. The ones below take their parameters by name; bind
them with `functools.partial(conv, key_weight=..., value_weight=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Compressor = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mean(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The slot is the average of its tokens."""
    return keys.mean(-2), values.mean(-2)


def maximum(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Every channel of the slot is the largest of its tokens."""
    return keys.amax(-2), values.amax(-2)


def conv(
    keys: Tensor,
    values: Tensor,
    key_weight: Tensor,  # [Hkv, c, D, D]
    value_weight: Tensor,  # [Hkv, c, Dv, Dv]
    key_bias: Tensor | None = None,  # [Hkv, D]
    value_bias: Tensor | None = None,  # [Hkv, Dv]
) -> tuple[Tensor, Tensor]:
    """Strided convolution, kernel = stride = c: token i of the group has a matrix of its own."""
    return _convolve(keys, key_weight, key_bias), _convolve(values, value_weight, value_bias)


def gated(
    keys: Tensor,
    values: Tensor,
    key_gate: Tensor,  # [Hkv, D]
    key_position: Tensor,  # [Hkv, c]
    value_gate: Tensor,  # [Hkv, D]
    value_position: Tensor,  # [Hkv, c]
) -> tuple[Tensor, Tensor]:
    """A weighted average; both sets of weights are read off the keys."""
    key_share = _gate(keys, key_gate, key_position)
    value_share = _gate(keys, value_gate, value_position)
    return (key_share * keys).sum(-2), (value_share * values).sum(-2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    slot = torch.zeros_like(x[..., 0, :])  # [B, Hkv, G, D]
    for i in range(weight.shape[1]):
        slot = slot + x[..., i, :] @ weight[:, i].to(x.dtype)
    return slot if bias is None else slot + bias[:, None].to(x.dtype)


def _gate(keys: Tensor, gate: Tensor, position: Tensor) -> Tensor:
    by_content = (keys * gate[:, None, None].to(keys.dtype)).sum(-1)  # [B, Hkv, G, c]
    by_place = position[:, None].to(keys.dtype)
    return (by_content + by_place).softmax(-1)[..., None]


COMPRESSORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "mean": mean,
    "max": maximum,
    "conv": conv,
    "gated": gated,
}


def initial_parameters(
    name: str, kv_heads: int, ratio: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parameters a compressor starts with; both kinds start as mean pooling."""
    if name == "conv":
        each = [torch.eye(dim, dtype=dtype) / ratio for dim in (head_dim, value_dim)]
        weights = [eye.expand(kv_heads, ratio, *eye.shape).clone() for eye in each]
        return {"key_weight": weights[0], "value_weight": weights[1]}
    if name == "gated":
        return {
            "key_gate": torch.zeros(kv_heads, head_dim, dtype=dtype),
            "key_position": torch.zeros(kv_heads, ratio, dtype=dtype),
            "value_gate": torch.zeros(kv_heads, head_dim, dtype=dtype),
            "value_position": torch.zeros(kv_heads, ratio, dtype=dtype),
        }
    return {}


def make_compressor(
    compressor: str | Compressor,
    kv_heads: int,
    ratio: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
) -> Compressor:
    """A compressor by name, with its initial parameters; anything else is taken as it is."""
    if not isinstance(compressor, str):
        return compressor
    if compressor not in COMPRESSORS:
        names = ", ".join(COMPRESSORS)
        raise ValueError(
            f"ctx.reference: compressor must be one of {names}, or callable, got {compressor!r}"
        )
    parameters = initial_parameters(compressor, kv_heads, ratio, head_dim, value_dim, dtype)
    return partial(COMPRESSORS[compressor], **parameters)


def compress_group(
    compressor: Compressor, keys: list[Tensor], values: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """One group, as lists of its tokens' [B, Hkv, D] and [B, Hkv, Dv], becomes one slot."""
    key, value = compressor(torch.stack(keys, 2)[:, :, None], torch.stack(values, 2)[:, :, None])
    return key[:, :, 0], value[:, :, 0]
