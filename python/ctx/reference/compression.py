"""Compressors: `ratio` tokens become one slot, per key/value head.

Rae et al. 2019 (arXiv:1911.05507), section 3, "Compression functions and losses", lists max and
mean pooling, 1D convolution, dilated convolutions and most-used. Deviations: the paper compresses
the hidden states that it stores, here keys and values are stored and compressed, each with
parameters of their own; convolutions work per head; `gated` is an addition (softmax pooling, one
gate for keys and one for values).

A compressor is a function of whole groups

    keys [B, Hkv, G, c, D], values [B, Hkv, G, c, Dv]  ->  [B, Hkv, G, D], [B, Hkv, G, Dv]

and always receives keys without their rotation. The ones below take their parameters by name; bind
them with `functools.partial(conv, key_weight=..., value_weight=...)`. A convolution may read tokens
left of the group, too, `overlap` of them; then there are overlap + c where c stands above.

`most_used` is no such function: which tokens stay depends on the attention they got.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
    key_weight: Tensor,  # [Hkv, k, D, D]
    value_weight: Tensor,  # [Hkv, k, Dv, Dv]
    key_bias: Tensor | None = None,  # [Hkv, D]
    value_bias: Tensor | None = None,  # [Hkv, Dv]
) -> tuple[Tensor, Tensor]:
    """Convolution, stride c, kernel k >= c: each of the k tokens has a matrix of its own."""
    return _convolve(keys, key_weight, key_bias), _convolve(values, value_weight, value_bias)


def dilated(
    keys: Tensor,
    values: Tensor,
    key_first: Tensor,  # [Hkv, 2, D, 2 D]
    key_weight: Tensor,  # [Hkv, c, 2 D, D]
    value_first: Tensor,  # [Hkv, 2, Dv, 2 Dv]
    value_weight: Tensor,  # [Hkv, c, 2 Dv, Dv]
    key_hidden: Tensor | None = None,  # [Hkv, layers - 1, 2, 2 D, 2 D]
    value_hidden: Tensor | None = None,  # [Hkv, layers - 1, 2, 2 Dv, 2 Dv]
) -> tuple[Tensor, Tensor]:
    """Layers that look 1, 2, 4, ... tokens back, then a strided convolution over the group."""
    key = _dilate(keys, [key_first, *(() if key_hidden is None else key_hidden.unbind(1))])
    value = _dilate(
        values, [value_first, *(() if value_hidden is None else value_hidden.unbind(1))]
    )
    return _convolve(key, key_weight, None), _convolve(value, value_weight, None)


def most_used(usage: Tensor, slots: int) -> list[list[int]]:
    """Which of the tokens that leave stay, for every kv head, in their order.

    Args:
        usage: [Hkv, n], the attention that each of the tokens got.
        slots: how many stay: those used the most, of equals the earlier.
    """
    chosen = []
    for used in usage.tolist():
        by_use = sorted(range(len(used)), key=lambda j: (-used[j], j))
        chosen.append(sorted(by_use[:slots]))
    return chosen


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
    slot = x.new_zeros(*x.shape[:-2], weight.shape[-1])  # [B, Hkv, G, D]
    for i in range(weight.shape[1]):
        slot = slot + x[..., i, :] @ weight[:, i].to(x.dtype)
    return slot if bias is None else slot + bias[:, None].to(x.dtype)


def _dilate(x: Tensor, weights: list[Tensor]) -> Tensor:
    tokens = list(x.unbind(-2))  # each [B, Hkv, G, D]
    for layer, weight in enumerate(weights):
        back = 2**layer
        earlier, later = weight[:, 0].to(x.dtype), weight[:, 1].to(x.dtype)
        tokens = [
            (tokens[i - back] @ earlier + tokens[i] @ later).relu()
            for i in range(back, len(tokens))
        ]
    return torch.stack(tokens, -2)


def _gate(keys: Tensor, gate: Tensor, position: Tensor) -> Tensor:
    by_content = (keys * gate[:, None, None].to(keys.dtype)).sum(-1)  # [B, Hkv, G, c]
    by_place = position[:, None].to(keys.dtype)
    return (by_content + by_place).softmax(-1)[..., None]


COMPRESSORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "mean": mean,
    "max": maximum,
    "conv": conv,
    "dilated": dilated,
    "gated": gated,
}


def dilated_layers(ratio: int) -> int:
    """As many as it takes for a token to depend on a whole group, at least one."""
    layers = 1
    while 2**layers < ratio:
        layers += 1
    return layers


def is_by_usage(compressor: Any) -> bool:
    """Whether slots are tokens, chosen by the attention that they got."""
    return compressor is most_used


def overlap(compressor: Any, ratio: int) -> int:
    """How many tokens left of a group of `ratio` the compressor reads."""
    if getattr(compressor, "func", None) is conv:
        return int(compressor.keywords["key_weight"].shape[1]) - ratio
    if getattr(compressor, "func", None) is dilated:
        return int(2 ** dilated_layers(ratio)) - 1
    return int(getattr(compressor, "overlap", 0))


def initial_parameters(
    name: str,
    kv_heads: int,
    ratio: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    kernel: int | None = None,
) -> dict[str, Tensor]:
    """The parameters a compressor starts with; all that have any start as mean pooling."""
    if name == "conv":
        weights = []
        for dim in (head_dim, value_dim):
            weight = torch.zeros(kv_heads, kernel or ratio, dim, dim, dtype=dtype)
            weight[:, -ratio:] = torch.eye(dim, dtype=dtype) / ratio
            weights.append(weight)
        return {"key_weight": weights[0], "value_weight": weights[1]}
    if name == "dilated":
        parameters: dict[str, Tensor] = {}
        layers = dilated_layers(ratio)
        for part, dim in (("key", head_dim), ("value", value_dim)):
            eye = torch.eye(dim, dtype=dtype)
            first = torch.zeros(kv_heads, 2, dim, 2 * dim, dtype=dtype)
            first[:, 1] = torch.cat([eye, -eye], 1)
            hidden = torch.zeros(kv_heads, layers - 1, 2, 2 * dim, 2 * dim, dtype=dtype)
            hidden[:, :, 1] = torch.eye(2 * dim, dtype=dtype)
            last = (torch.cat([eye, -eye]) / ratio).expand(kv_heads, ratio, 2 * dim, dim).clone()
            parameters |= {f"{part}_first": first, f"{part}_weight": last}
            if layers > 1:
                parameters[f"{part}_hidden"] = hidden
        return parameters
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
    """A compressor by name, with its initial parameters; anything else is taken as it is, the name
    of the one that is no function, too.
    """
    if compressor == "most_used":
        return most_used  # type: ignore[return-value]  # told apart by whoever has the usage
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
    """One group, as lists of its tokens' [B, Hkv, D] and [B, Hkv, Dv], becomes one slot.

    With an overlap the lists begin that much earlier; what is before the stream is zero.
    """
    key, value = compressor(torch.stack(keys, 2)[:, :, None], torch.stack(values, 2)[:, :, None])
    return key[:, :, 0], value[:, :, 0]
