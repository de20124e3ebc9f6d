"""The attention layer of `ctx.CompressiveAttention`, over a whole stream at once.

Projections around `sequence.attend`, and memories of layer inputs in place of keys and values:
Rae et al. 2019 (arXiv:1911.05507), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .compression import COMPRESSORS, Compressor, Slot, compress_group, overlap, read_group
from .positions import Relative
from .schedule import Schedule
from .sequence import attend, walk
from .settings import Settings


def compressive_attention(
    x: Tensor,  # [B, L, E]
    weights: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    compressor: str = "conv",
    memory_content: str = "kv",
    new: int | None = None,
    compressor_grad: str = "task",
    memory_dtype: torch.dtype | None = None,
    return_region_weights: bool = False,
    **options: Any,
) -> Any:
    """What `ctx.CompressiveAttention` gives for a stream from an empty memory, [B, new, E].

    Args:
        x: the inputs of the layer, all tokens of the stream.
        weights: its parameters by name: `q_proj.weight`, `k_proj.weight`, `v_proj.weight`,
            `out_proj.weight`, their `.bias` if any, `compressor.*`, `compressed_bias` [H] (none
            means no bias), and, if they belong to `position`, `relative.*` and `alibi_slopes` [H].
        memory_content: "kv" remembers keys and values. "hidden" (the paper's) remembers the inputs
            themselves and compresses these; keys and values of all tokens and slots are made with
            the current weights, and a slot has one mass for all kv heads.
        new: how many of the last tokens the call brings; earlier ones are a carried memory, and
            constant. None means all.
        memory_dtype: what queries, keys and values are rounded to; None: not rounded.
        return_region_weights: also return what share of its attention each token gives to sinks,
            compressed slots and window, [B, H, new, 3], a constant.
        options: the other arguments of `Settings`.
    """
    carried = 0 if new is None else x.shape[1] - new
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    q = split_heads(project(x, weights, "q_proj"), num_heads)
    own = {name[11:]: w for name, w in weights.items() if name.startswith("compressor.")}
    options = {"compressed_bias": weights.get("compressed_bias", "none"), **options}
    if options.get("position") == "alibi":
        options["alibi_slopes"] = weights["alibi_slopes"]
    if options.get("position") == "relative":
        options["relative"] = [weights[f"relative.{part}"] for part in Relative._fields]
    asked: dict[str, Any] = {
        "compressor_grad": compressor_grad,
        "return_region_weights": True,
        "carried": carried,
    }

    def rounded(y: Tensor) -> Tensor:
        return y if memory_dtype is None else y.to(memory_dtype)

    def pair_of(inputs: Tensor) -> tuple[Tensor, Tensor]:  # [B, n, E]
        k = split_heads(project(inputs, weights, "k_proj"), kv_heads)
        return k, split_heads(project(inputs, weights, "v_proj"), kv_heads)

    if memory_content == "kv":
        compress = partial(COMPRESSORS[compressor], **own) if own else compressor
        k, v = pair_of(x)
        out, region_weights = attend(
            rounded(q), rounded(k), rounded(v), schedule, compressor=compress, **asked, **options
        )
    else:
        held = torch.cat([x[:, :carried].detach(), x[:, carried:]], 1)
        inputs = [token[:, None] for token in held.unbind(1)]  # each [B, 1, E], as keys of one head
        pooling = inputs_pooling(compressor, own)
        left = overlap(pooling, schedule.ratio)

        def make_slot(g: int, constant: bool) -> Slot:
            group = read_group(inputs, schedule.members(g), left)
            slot = compress_group(pooling, group, group, schedule.ratio)
            slot = slot.detach() if constant else slot
            key, value = pair_of(slot.key)
            return Slot(key[:, :, 0], value[:, :, 0], slot.mass.expand(-1, kv_heads))

        keys, values = (pair.unbind(2) for pair in pair_of(held))
        queries = q[:, :, carried:]
        out, region_weights = walk(
            queries, [*keys], [*values], make_slot, schedule, Settings(**options), **asked
        )
    y = project(out.to(x.dtype).transpose(1, 2).flatten(2), weights, "out_proj")
    return (y, region_weights) if return_region_weights else y


def inputs_compressor(compressor: str, own: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """A compressor of layer inputs, [B, c, E] to [B, 1, E], as if they were keys of one head."""
    pooling = inputs_pooling(compressor, own)

    def compress(inputs: Tensor) -> Tensor:
        group = inputs[:, None, None]
        return pooling(group, group)[0][:, 0]

    return compress


def inputs_pooling(compressor: str, own: Mapping[str, Tensor]) -> Compressor:
    """The compressor of pairs with the keys' parameters for values, which nothing reads."""
    parameters = {**own, **{name.replace("key_", "value_"): w for name, w in own.items()}}
    return partial(COMPRESSORS[compressor], **parameters)


def project(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A linear layer of `weights`."""
    return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] as [B, heads, T, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
