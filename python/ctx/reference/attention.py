"""Attention over a whole stream at once, differentiable from end to end.

Rae et al. 2019 (arXiv:1911.05507), section 3: one softmax over compressed memory, memory and the
tokens so far. Deviations: compression depends on the token number alone (see schedule.py), so the
whole stream can be evaluated in one call and equals streaming it; positions are rotary unless the
paper's are asked for; slots may get a bias, since one of them stands for `ratio` tokens.

memory.py computes the same thing one token after another and turns keys once, to clocks; here
every key is turned by its distance from the query, straight from the definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .compression import COMPRESSORS, Compressor, compress_group, make_compressor
from .positions import Relative, Scores
from .rotary import make_position
from .schedule import Schedule


def attend(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, Hkv, L, D]
    v: Tensor,  # [B, Hkv, L, Dv]
    schedule: Schedule,
    *,
    compressor: str | Compressor = "mean",
    position: str | None = "rotary",
    alibi_slopes: Sequence[float] | Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    rotary_base: float = 10000.0,
    rotary_dim: int | None = None,
    rotary_interleaved: bool = False,
    distance: str = "slot",
    compressed_bias: str | Tensor | Sequence[float] = "none",
    scale: float | None = None,
    compressor_grad: str = "task",
    return_mass: bool = False,
) -> Any:
    """What the last T tokens of a stream of L see, [B, H, T, Dv].

    Keys carry no rotation. The first L - T tokens came with earlier calls: they and the slots made
    by then are constants, as the carried memory of Transformer-XL is (Dai et al. 2019,
    arXiv:1901.02860, section 3.2). With `compressor_grad="aux"` every slot is a constant. With
    `return_mass` also what share of its attention each of them gives to sinks, compressed slots and
    window, [B, H, T, 3], a constant.
    """
    work = working_dtype(k.dtype)
    heads, width = q.shape[1], q.shape[3]
    kv_heads, length = k.shape[1:3]
    carried = length - q.shape[2]
    scale = width**-0.5 if scale is None else scale
    turn = make_position(position, rotary_base, rotary_dim, rotary_interleaved).rotate
    scheme = Scores(position, alibi_slopes, relative, work)
    bias = slot_bias(compressed_bias, schedule.ratio, heads, work)
    compress = make_compressor(compressor, kv_heads, schedule.ratio, width, v.shape[3], work)

    keys = [k[:, :, j].detach() if j < carried else k[:, :, j] for j in range(length)]
    values = [v[:, :, j].detach() if j < carried else v[:, :, j] for j in range(length)]
    keys, values = [key.to(work) for key in keys], [value.to(work) for value in values]
    slot_keys: list[Tensor] = []
    slot_values: list[Tensor] = []
    outputs, masses = [], []
    for t in range(length):
        for g in range(len(slot_keys), schedule.groups(t)):
            group = [keys[j] for j in schedule.members(g)], [values[j] for j in schedule.members(g)]
            key, value = compress_group(compress, *group)
            constant = t < carried or compressor_grad == "aux"
            slot_keys.append(key.detach() if constant else key)
            slot_values.append(value.detach() if constant else value)
        if t < carried:
            continue
        sinks, groups, tokens = schedule.visible(t)
        seen_keys = [keys[j] for j in sinks] + [slot_keys[g] for g in groups]
        seen_values = [values[j] for j in sinks] + [slot_values[g] for g in groups]
        seen_keys += [keys[j] for j in tokens]
        seen_values += [values[j] for j in tokens]
        distances = schedule.distances(t, distance)
        turned = turn(torch.stack(seen_keys, 2), [-delta for delta in distances])
        query = q[:, :, t - carried].to(work)
        scores = scale * scores_of(scheme.content_query(query), turned)
        first, last = len(sinks), len(sinks) + len(groups)
        added = torch.zeros_like(scores)
        added[:, :, first:last] = bias[:, None]
        added = added + scheme.added(query, distances, range(first, last), scale)
        weights = (scores + added).softmax(-1)
        masses.append(mass_of(weights, first, last))
        outputs.append(mix(weights, torch.stack(seen_values, 2)))
    if not outputs:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        return (out, out.new_zeros(*q.shape[:3], 3, dtype=work)) if return_mass else out
    out = torch.stack(outputs, 2).to(q.dtype)
    return (out, torch.stack(masses, 2)) if return_mass else out


def compressive_attention(
    x: Tensor,  # [B, L, E]
    weights: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    compression: str = "conv",
    new: int | None = None,
    position: str | None = "rotary",
    rotary_base: float = 10000.0,
    rotary_dim: int | None = None,
    rotary_interleaved: bool = False,
    distance: str = "slot",
    compressor_grad: str = "task",
    memory_dtype: torch.dtype | None = None,
    return_usage: bool = False,
) -> Any:
    """What `ctx.CompressiveAttention` gives for a stream from an empty memory, [B, new, E].

    Args:
        x: the inputs of the layer, all tokens of the stream.
        weights: its parameters by name: `q_proj.weight`, `k_proj.weight`, `v_proj.weight`,
            `out_proj.weight`, their `.bias` if any, `compressor.*`, `compressed_bias` [H] (none
            means no bias), and, if they belong to `position`, `relative.*` and `alibi_slopes` [H].
        new: how many of the last tokens the call brings; earlier ones are a carried memory, and
            constant. None means all.
        memory_dtype: what queries, keys and values are rounded to; None: nothing.
        return_usage: also return what share of its attention each of them gives to sinks,
            compressed slots and window, [B, H, new, 3], a constant.
    """
    new = x.shape[1] if new is None else new
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    q = split_heads(project(x, weights, "q_proj"), num_heads)
    k = split_heads(project(x, weights, "k_proj"), kv_heads)
    v = split_heads(project(x, weights, "v_proj"), kv_heads)
    if memory_dtype is not None:
        q, k, v = q.to(memory_dtype), k.to(memory_dtype), v.to(memory_dtype)
    own = {name[11:]: w for name, w in weights.items() if name.startswith("compressor.")}
    relative = None
    if position == "relative":
        relative = [weights[f"relative.{part}"] for part in Relative._fields]
    out, mass = attend(
        q[:, :, x.shape[1] - new :],
        k,
        v,
        schedule,
        compressor=partial(COMPRESSORS[compression], **own),
        position=position,
        alibi_slopes=weights["alibi_slopes"] if position == "alibi" else None,
        relative=relative,
        rotary_base=rotary_base,
        rotary_dim=rotary_dim,
        rotary_interleaved=rotary_interleaved,
        distance=distance,
        compressed_bias=weights.get("compressed_bias", "none"),
        compressor_grad=compressor_grad,
        return_mass=True,
    )
    y = project(out.to(x.dtype).transpose(1, 2).flatten(2), weights, "out_proj")
    return (y, mass) if return_usage else y


def scores_of(query: Tensor, keys: Tensor) -> Tensor:
    """query [B, H, D] against keys [B, Hkv, n, D]: [B, H, n]; each kv head serves H/Hkv heads."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    return (keys @ query[..., None])[..., 0]


def mix(weights: Tensor, values: Tensor) -> Tensor:
    """weights [B, H, n] of values [B, Hkv, n, Dv]: [B, H, Dv]."""
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], 1)
    return (weights[..., None, :] @ values)[..., 0, :]


def mass_of(weights: Tensor, first: int, last: int) -> Tensor:
    """weights [B, H, n], slots from `first` to `last` among them: [B, H, 3], the sum of each region
    (sinks, slots, window), a constant.
    """
    regions = weights[..., :first], weights[..., first:last], weights[..., last:]
    return torch.stack([region.sum(-1) for region in regions], -1).detach()


def slot_bias(
    compressed_bias: str | Tensor | Sequence[float], ratio: int, heads: int, dtype: torch.dtype
) -> Tensor:
    """What is added to the score of every compressed slot, per query head [H]."""
    if isinstance(compressed_bias, str):
        if compressed_bias not in ("none", "log_ratio"):
            raise ValueError(
                "ctx.reference: compressed_bias must be 'none', 'log_ratio' or a number per head, "
                f"got {compressed_bias!r}"
            )
        bias = math.log(ratio) if compressed_bias == "log_ratio" else 0.0
        return torch.full((heads,), bias, dtype=dtype)
    bias_per_head = torch.as_tensor(compressed_bias, dtype=dtype)
    if bias_per_head.shape != (heads,):
        got = list(bias_per_head.shape)
        raise ValueError(f"ctx.reference: compressed_bias must be [H] = [{heads}], got {got}")
    return bias_per_head


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 is computed in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def project(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A linear layer of `weights`."""
    return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] as [B, heads, T, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
