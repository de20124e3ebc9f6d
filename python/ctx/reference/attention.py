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
from collections.abc import Callable, Mapping, Sequence
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
from .positions import Relative, Scores, added_by_head
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
    return_region_weights: bool = False,
    carried: int | None = None,
) -> Any:
    """What the last tokens of a stream of L see, [B, H, L - carried, Dv].

    Keys carry no rotation. The first `carried` tokens (L - T unless given) came with earlier calls:
    they and the slots made by then are constants, as the carried memory of Transformer-XL is (Dai
    et al. 2019, arXiv:1901.02860, section 3.2). With `compressor_grad="aux"` every slot is a
    constant. Where the most used tokens stay, q must be that of the whole stream, T = L. With
    `return_region_weights` also the share of its attention that each of them gives to sinks,
    compressed slots and window, [B, H, L - carried, 3], a constant.
    """
    work = working_dtype(k.dtype)
    kv_heads, length, width = k.shape[1:]
    carried = length - q.shape[2] if carried is None else carried
    compress = make_compressor(compressor, kv_heads, schedule.ratio, width, v.shape[3], work)

    by_usage = is_by_usage(compress)
    if by_usage and q.shape[2] < length:
        raise ValueError(
            f"ctx.reference.attend: q must have all L = {length} tokens, got {q.shape}"
        )
    left = overlap(compress, schedule.ratio)

    keys = [k[:, :, j].detach() if j < carried else k[:, :, j] for j in range(length)]
    values = [v[:, :, j].detach() if j < carried else v[:, :, j] for j in range(length)]
    keys, values = [key.to(work) for key in keys], [value.to(work) for value in values]

    def make_slot(g: int, constant: bool) -> tuple[Tensor, Tensor]:
        members = schedule.members(g)
        reads = range(members.start - left, members.stop)
        group = [
            [x[j] if j >= 0 else torch.zeros_like(x[0]) for j in reads] for x in (keys, values)
        ]
        key, value = compress_group(compress, *group)
        return (key.detach(), value.detach()) if constant else (key, value)

    return walk(
        q,
        keys,
        values,
        make_slot,
        schedule,
        position=position,
        alibi_slopes=alibi_slopes,
        relative=relative,
        rotary_base=rotary_base,
        rotary_dim=rotary_dim,
        rotary_interleaved=rotary_interleaved,
        distance=distance,
        compressed_bias=compressed_bias,
        scale=scale,
        compressor_grad=compressor_grad,
        return_region_weights=return_region_weights,
        carried=carried,
        by_usage=by_usage,
    )


def walk(
    q: Tensor,  # [B, H, T, D]
    keys: list[Tensor],  # each [B, Hkv, D], of every token of the stream
    values: list[Tensor],  # each [B, Hkv, Dv]
    make_slot: Callable[[int, bool], tuple[Tensor, Tensor]],
    schedule: Schedule,
    *,
    position: str | None,
    alibi_slopes: Sequence[float] | Tensor | None,
    relative: Sequence[Tensor] | None,
    rotary_base: float,
    rotary_dim: int | None,
    rotary_interleaved: bool,
    distance: str,
    compressed_bias: str | Tensor | Sequence[float],
    scale: float | None,
    compressor_grad: str,
    return_region_weights: bool,
    carried: int | None = None,
    by_usage: bool = False,
) -> Any:
    """What the last tokens see, one after the other; `make_slot(g, constant)` gives key and value
    of group g, once its tokens have left the window. Arguments as in `attend`.

    `by_usage`: slots are tokens instead, for every head the most used of those that leave.
    """
    work = keys[0].dtype if keys else working_dtype(q.dtype)
    heads, width = q.shape[1], q.shape[3]
    length = len(keys)
    asked = length - q.shape[2]  # the token of the first query
    carried = asked if carried is None else carried
    scale = width**-0.5 if scale is None else scale
    turn = make_position(position, rotary_base, rotary_dim, rotary_interleaved).rotate
    scheme = Scores(position, alibi_slopes, relative, work)
    bias = slot_bias(compressed_bias, schedule.ratio, heads, work)
    slot_keys: list[Tensor] = []
    slot_values: list[Tensor] = []
    outputs, masses = [], []
    usage = torch.zeros(*(keys[0].shape[:2] if keys else (0, 0)), length, dtype=work)
    slot_tokens: list[Tensor] = []  # [B, Hkv], the token that each slot is
    for t in range(length):
        due = range(len(slot_keys), schedule.groups(t))
        if by_usage:
            leaving = [j for g in due for j in schedule.members(g)]
            slot_tokens += _choose(usage, leaving, len(due))
        for g in due:
            constant = t < carried or compressor_grad == "aux"
            if by_usage:
                key, value = (_pick(x, slot_tokens[g]) for x in (keys, values))
                key, value = (key.detach(), value.detach()) if constant else (key, value)
            else:
                key, value = make_slot(g, constant)
            slot_keys.append(key)
            slot_values.append(value)
        if t < carried and not by_usage:
            continue
        sinks, groups, tokens = schedule.visible(t)
        seen_keys = [keys[j] for j in sinks] + [slot_keys[g] for g in groups]
        seen_values = [values[j] for j in sinks] + [slot_values[g] for g in groups]
        seen_keys += [keys[j] for j in tokens]
        seen_values += [values[j] for j in tokens]
        first, last = len(sinks), len(sinks) + len(groups)
        apart = torch.tensor(schedule.distances(t, distance), dtype=torch.float64)
        apart = apart.expand(*keys[0].shape[:2], -1).clone()  # [B, Hkv, n]
        if by_usage and distance == "token":  # every head has slots of its own
            for i, g in enumerate(groups, start=first):
                apart[:, :, i] = t - slot_tokens[g]
        turned = turn(torch.stack(seen_keys, 2), (-apart).tolist())
        query = q[:, :, t - asked].to(work)
        scores = scale * scores_of(scheme.content_query(query), turned)
        added = torch.zeros_like(scores)
        added[:, :, first:last] = bias[:, None]
        slots = range(first, last)
        added = added + added_by_head(scheme, query, apart.tolist(), slots, scale)
        weights = (scores + added).softmax(-1)
        shared = weights.detach().unflatten(1, (keys[0].shape[1], -1)).mean(2)  # [B, Hkv, n]
        usage[:, :, list(tokens)] += shared[:, :, last:]
        if t < carried:
            continue
        masses.append(mass_of(weights, first, last))
        outputs.append(mix(weights, torch.stack(seen_values, 2)))
    if not outputs:
        out = q.new_zeros(*q.shape[:2], 0, values[0].shape[2] if values else width)
        return (
            (out, out.new_zeros(*q.shape[:2], 0, 3, dtype=work)) if return_region_weights else out
        )
    out = torch.stack(outputs, 2).to(q.dtype)
    return (out, torch.stack(masses, 2)) if return_region_weights else out


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
    position: str | None = "rotary",
    rotary_base: float = 10000.0,
    rotary_dim: int | None = None,
    rotary_interleaved: bool = False,
    distance: str = "slot",
    compressor_grad: str = "task",
    memory_dtype: torch.dtype | None = None,
    return_region_weights: bool = False,
) -> Any:
    """What `ctx.CompressiveAttention` gives for a stream from an empty memory, [B, new, E].

    Args:
        x: the inputs of the layer, all tokens of the stream.
        weights: its parameters by name: `q_proj.weight`, `k_proj.weight`, `v_proj.weight`,
            `out_proj.weight`, their `.bias` if any, `compressor.*`, `compressed_bias` [H] (none
            means no bias), and, if they belong to `position`, `relative.*` and `alibi_slopes` [H].
        memory_content: "kv" remembers keys and values. "hidden" (the paper's) remembers the inputs
            themselves and compresses these; keys and values of everything that is seen, slots as
            well, are made with the weights as they are now.
        new: how many of the last tokens the call brings; earlier ones are a carried memory, and
            constant. None means all.
        memory_dtype: what queries, keys and values are rounded to; None: nothing.
        return_region_weights: also return what share of its attention each of them gives to sinks,
            compressed slots and window, [B, H, new, 3], a constant.
    """
    new = x.shape[1] if new is None else new
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    q = split_heads(project(x, weights, "q_proj"), num_heads)
    own = {name[11:]: w for name, w in weights.items() if name.startswith("compressor.")}
    relative = None
    if position == "relative":
        relative = [weights[f"relative.{part}"] for part in Relative._fields]
    options: dict[str, Any] = {
        "position": position,
        "alibi_slopes": weights["alibi_slopes"] if position == "alibi" else None,
        "relative": relative,
        "rotary_base": rotary_base,
        "rotary_dim": rotary_dim,
        "rotary_interleaved": rotary_interleaved,
        "distance": distance,
        "compressed_bias": weights.get("compressed_bias", "none"),
        "compressor_grad": compressor_grad,
        "return_region_weights": True,
    }

    def rounded(y: Tensor) -> Tensor:
        return y if memory_dtype is None else y.to(memory_dtype)

    def pair_of(inputs: Tensor) -> tuple[Tensor, Tensor]:  # [B, n, E]
        k = split_heads(project(inputs, weights, "k_proj"), kv_heads)
        return k, split_heads(project(inputs, weights, "v_proj"), kv_heads)

    if memory_content == "kv":
        compress = partial(COMPRESSORS[compressor], **own) if own else compressor
        k, v = pair_of(x)
        pairs = (rounded(k), rounded(v))
        carried = x.shape[1] - new
        options |= {"compressor": compress, "carried": carried}
        out, region_weights = attend(rounded(q), *pairs, schedule, **options)
    else:
        carried = x.shape[1] - new
        held = torch.cat([x[:, :carried].detach(), x[:, carried:]], 1)
        compress_inputs = inputs_compressor(compressor, own)
        left = overlap(inputs_pooling(compressor, own), schedule.ratio)
        padded = torch.nn.functional.pad(held, (0, 0, left, 0))  # token j stands at left + j

        def make_slot(g: int, constant: bool) -> tuple[Tensor, Tensor]:
            members = schedule.members(g)
            group = padded[:, members[0] : members[-1] + 1 + left]
            slot = compress_inputs(group)
            key, value = pair_of(slot.detach() if constant else slot)
            return key[:, :, 0], value[:, :, 0]

        keys, values = (pair.unbind(2) for pair in pair_of(held))
        queries = q[:, :, carried:]
        out, region_weights = walk(
            queries, [*keys], [*values], make_slot, schedule, scale=None, **options
        )
    y = project(out.to(x.dtype).transpose(1, 2).flatten(2), weights, "out_proj")
    return (y, region_weights) if return_region_weights else y


def inputs_compressor(compressor: str, own: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """A compressor of layer inputs [B, c, E] to [B, 1, E]: they take the keys' place in one head.

    What a compressor of pairs makes of values is thrown away, so its parameters do not matter.
    """
    pooling = inputs_pooling(compressor, own)

    def compress(inputs: Tensor) -> Tensor:
        group = inputs[:, None, None]
        slot: Tensor = pooling(group, group)[0]
        return slot[:, 0]

    return compress


def inputs_pooling(compressor: str, own: Mapping[str, Tensor]) -> Compressor:
    """The compressor, with the keys' parameters for values, too."""
    parameters = {**own, **{name.replace("key_", "value_"): w for name, w in own.items()}}
    return partial(COMPRESSORS[compressor], **parameters)


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
