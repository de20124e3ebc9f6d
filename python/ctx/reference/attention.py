"""Attention over a whole stream at once, differentiable from end to end.

Rae et al. 2019 (arXiv:1911.05507), section 3: one softmax over compressed memory, memory and the
tokens so far. Deviations: compression depends on the token number alone (see schedule.py), so the
whole stream can be evaluated in one call and equals streaming it; positions are rotary; slots may
get a bias, since one of them stands for `ratio` tokens.

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

from .compression import (
    COMPRESSORS,
    Compressor,
    compress_group,
    is_by_usage,
    make_compressor,
    most_used,
    overlap,
)
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
    rotary_base: float = 10000.0,
    rotary_dim: int | None = None,
    rotary_interleaved: bool = False,
    distance: str = "slot",
    compressed_bias: str | Tensor | Sequence[float] = "none",
    scale: float | None = None,
    compressor_grad: str = "task",
    carried: int | None = None,
) -> Tensor:
    """What the last tokens of a stream of L see, [B, H, L - carried, Dv].

    Keys carry no rotation. The first `carried` tokens (L - T unless given) came with earlier calls:
    they and the slots made by then are constants, as the carried memory of Transformer-XL is (Dai
    et al. 2019, arXiv:1901.02860, section 3.2). With `compressor_grad="aux"` every slot is a
    constant. Where the most used tokens stay, q must be that of the whole stream, T = L.
    """
    work = working_dtype(k.dtype)
    heads, width = q.shape[1], q.shape[3]
    kv_heads, length = k.shape[1:3]
    asked = length - q.shape[2]  # the token of the first query
    carried = asked if carried is None else carried
    scale = width**-0.5 if scale is None else scale
    turn = make_position(position, rotary_base, rotary_dim, rotary_interleaved).rotate
    bias = slot_bias(compressed_bias, schedule.ratio, heads, work)
    compress = make_compressor(compressor, kv_heads, schedule.ratio, width, v.shape[3], work)

    by_usage = is_by_usage(compress)
    if by_usage and asked:
        raise ValueError(
            f"ctx.reference.attend: q must have all L = {length} tokens, got {q.shape}"
        )
    left = overlap(compress, schedule.ratio)
    usage = torch.zeros(*k.shape[:2], length, dtype=work)
    slot_tokens: list[Tensor] = []  # [B, Hkv], the token that each slot is

    keys = [k[:, :, j].detach() if j < carried else k[:, :, j] for j in range(length)]
    values = [v[:, :, j].detach() if j < carried else v[:, :, j] for j in range(length)]
    keys, values = [key.to(work) for key in keys], [value.to(work) for value in values]
    slot_keys: list[Tensor] = []
    slot_values: list[Tensor] = []
    outputs = []
    for t in range(length):
        due = range(len(slot_keys), schedule.groups(t))
        if by_usage:
            slot_tokens += _choose(usage, [j for g in due for j in schedule.members(g)], len(due))
        for g in due:
            if by_usage:
                key, value = (_pick(x, slot_tokens[g]) for x in (keys, values))
            else:
                members = schedule.members(g)
                reads = range(members.start - left, members.stop)
                group = [
                    [x[j] if j >= 0 else torch.zeros_like(x[0]) for j in reads]
                    for x in (keys, values)
                ]
                key, value = compress_group(compress, *group)
            constant = t < carried or compressor_grad == "aux"
            slot_keys.append(key.detach() if constant else key)
            slot_values.append(value.detach() if constant else value)
        if t < carried and not by_usage:
            continue
        sinks, groups, tokens = schedule.visible(t)
        seen_keys = [keys[j] for j in sinks] + [slot_keys[g] for g in groups]
        seen_values = [values[j] for j in sinks] + [slot_values[g] for g in groups]
        seen_keys += [keys[j] for j in tokens]
        seen_values += [values[j] for j in tokens]
        behind: Any = [-delta for delta in schedule.distances(t, distance)]
        if by_usage and distance == "token":  # every head has its own
            behind = torch.tensor(behind).expand(*k.shape[:2], -1).clone()
            for i, g in enumerate(groups):
                behind[:, :, len(sinks) + i] = slot_tokens[g] - t
            behind = behind.tolist()
        turned = turn(torch.stack(seen_keys, 2), behind)
        query = q[:, :, t - asked].to(work)
        scores = scale * scores_of(query, turned)
        first, last = len(sinks), len(sinks) + len(groups)
        added = torch.zeros_like(scores)
        added[:, :, first:last] = bias[:, None]
        weights = (scores + added).softmax(-1)
        shared = weights.detach().unflatten(1, (kv_heads, -1)).mean(2)  # [B, Hkv, n]
        usage[:, :, list(tokens)] += shared[:, :, last:]
        if t >= carried:
            outputs.append(mix(weights, torch.stack(seen_values, 2)))
    if not outputs:
        return q.new_zeros(*q.shape[:2], 0, v.shape[3])
    return torch.stack(outputs, 2).to(q.dtype)


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
) -> Tensor:
    """What `ctx.CompressiveAttention` gives for a stream from an empty memory, [B, new, E].

    Args:
        x: the inputs of the layer, all tokens of the stream.
        weights: its parameters by name: `q_proj.weight`, `k_proj.weight`, `v_proj.weight`,
            `out_proj.weight`, their `.bias` if any, `compressor.*`, and `compressed_bias` [H] (none
            means no bias).
        new: how many of the last tokens the call brings; earlier ones are a carried memory, and
            constant. None means all.
    """
    new = x.shape[1] if new is None else new
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    q = split_heads(project(x, weights, "q_proj"), num_heads)
    k = split_heads(project(x, weights, "k_proj"), kv_heads)
    v = split_heads(project(x, weights, "v_proj"), kv_heads)
    own = {name[11:]: w for name, w in weights.items() if name.startswith("compressor.")}
    out = attend(
        q,
        k,
        v,
        schedule,
        carried=x.shape[1] - new,
        compressor=partial(COMPRESSORS[compression], **own) if own else compression,
        position=position,
        rotary_base=rotary_base,
        rotary_dim=rotary_dim,
        rotary_interleaved=rotary_interleaved,
        distance=distance,
        compressed_bias=weights.get("compressed_bias", "none"),
        compressor_grad=compressor_grad,
    )
    return project(out.transpose(1, 2).flatten(2), weights, "out_proj")


def _choose(usage: Tensor, leaving: list[int], slots: int) -> list[Tensor]:
    """The tokens that become slots, [B, Hkv] for each; `usage` [B, Hkv, L]."""
    if not slots:
        return []
    rows = [most_used(row, slots) for row in usage[:, :, leaving]]
    kept = torch.tensor([[[leaving[i] for i in head] for head in row] for row in rows])
    return list(kept.unbind(-1))


def _pick(x: list[Tensor], tokens: Tensor) -> Tensor:
    """x[j] [B, Hkv, D] of another token j for every head: tokens [B, Hkv]."""
    rows = [[x[j][b, h] for h, j in enumerate(row)] for b, row in enumerate(tokens.tolist())]
    return torch.stack([torch.stack(row) for row in rows])


def scores_of(query: Tensor, keys: Tensor) -> Tensor:
    """query [B, H, D] against keys [B, Hkv, n, D]: [B, H, n]; each kv head serves H/Hkv heads."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    return (keys @ query[..., None])[..., 0]


def mix(weights: Tensor, values: Tensor) -> Tensor:
    """weights [B, H, n] of values [B, Hkv, n, Dv]: [B, H, Dv]."""
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], 1)
    return (weights[..., None, :] @ values)[..., 0, :]


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
