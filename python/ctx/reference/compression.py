"""Compressors: `ratio` tokens become one slot, per key/value head.

Rae et al. 2019 (arXiv:1911.05507), section 3, "Compression functions and losses", lists max and
mean pooling, 1D convolution, dilated convolutions and most-used. Deviations: the paper compresses
the hidden states that it stores, here keys and values are stored and compressed, each with
parameters of their own; convolutions work per head; `gated` is an addition (softmax pooling, one
gate for keys and one for values); slots have a mass.

A compressor is a function of whole groups

    keys [B, Hkv, G, c, D], values [B, Hkv, G, c, Dv]
        ->  keys [B, Hkv, G, D], values [B, Hkv, G, Dv], and perhaps masses [B, Hkv, G]

and always receives keys without rotation. The ones below take their parameters by name; bind
them with `functools.partial(conv, key_weight=..., value_weight=...)`. A convolution may also read
`overlap` tokens left of the group; then the fourth dimension has overlap + c tokens.

The mass of a slot is the logarithm of how many tokens it counts as in a softmax. For a slot made
with weights w (sum 1), log sum_i exp(a_i) = sum_i w_i a_i + H(w) to first order, with the entropy
H(w) = -sum_i w_i log w_i. Where a compressor returns no mass, it is log c: equal weights.

`most_used` is not such a function: which tokens stay depends on the attention they received. A
slot of it is one token and has mass 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

# (keys, values) to (keys, values) or (keys, values, masses).
Compressor = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Slot(NamedTuple):
    """What one group is compressed to."""

    key: Tensor  # [B, Hkv, D]
    value: Tensor  # [B, Hkv, Dv]
    mass: Tensor  # [B, Hkv]

    def detach(self) -> Slot:
        """The same numbers as constants."""
        return Slot(*(part.detach() for part in self))


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
    """Indices of the tokens that become slots, ascending, for every kv head.

    Args:
        usage: [Hkv, n], the attention that each of the tokens received.
        slots: how many become slots: those with the largest usage, the earlier of equals.
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted averages; the keys decide both sets of weights. The mass is the entropy of those
    of the keys.
    """
    key_logits = _gate(keys, key_gate, key_position)  # [B, Hkv, G, c]
    key_weights = key_logits.softmax(-1)
    value_weights = _gate(keys, value_gate, value_position).softmax(-1)
    key = (key_weights[..., None] * keys).sum(-2)
    value = (value_weights[..., None] * values).sum(-2)
    # w log w by log_softmax, which has a derivative where a weight underflows to zero.
    return key, value, -(key_weights * key_logits.log_softmax(-1)).sum(-1)


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
    by_position = position[:, None].to(keys.dtype)
    return by_content + by_position


COMPRESSORS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "mean": mean,
    "max": maximum,
    "conv": conv,
    "dilated": dilated,
    "gated": gated,
}


def dilated_layers(ratio: int) -> int:
    """The fewest layers after which a token depends on a whole group, at least one."""
    layers = 1
    while 2**layers < ratio:
        layers += 1
    return layers


def is_by_usage(compressor: Any) -> bool:
    """Whether slots are tokens, chosen by the attention they received."""
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
    """A compressor by name, with its initial parameters; a callable is returned unchanged."""
    if compressor == "most_used":
        return most_used  # type: ignore[return-value]  # callers ask is_by_usage first
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
    compressor: Compressor, keys: list[Tensor], values: list[Tensor], ratio: int
) -> Slot:
    """One group, as lists of its tokens' [B, Hkv, D] and [B, Hkv, Dv], becomes one slot.

    With an overlap the lists begin that many tokens earlier; tokens before the stream are zero.
    """
    made = compressor(torch.stack(keys, 2)[:, :, None], torch.stack(values, 2)[:, :, None])
    key, value = made[0][:, :, 0], made[1][:, :, 0]
    if len(made) == 2:
        return Slot(key, value, key.new_full(key.shape[:2], math.log(ratio)))
    return Slot(key, value, made[2][:, :, 0])


def read_group(tokens: list[Tensor], members: range, left: int) -> list[Tensor]:
    """The tokens of a group and `left` before it; those before the stream are zero."""
    return [
        tokens[j] if j >= 0 else torch.zeros_like(tokens[0])
        for j in range(members.start - left, members.stop)
    ]
