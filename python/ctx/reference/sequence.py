"""Attention over a whole stream at once, differentiable from end to end.

Rae et al. 2019 (arXiv:1911.05507), section 3: one softmax over compressed memory, memory and the
tokens so far. Deviations: compression depends on the token number alone (see schedule.py), so the
whole stream can be evaluated in one call and equals streaming it; positions are rotary unless the
paper's are asked for; slots may get a bias and a mass, since one of them stands for `ratio` tokens.

memory.py computes the same function one token after another and rotates keys once, when they are
written; here every key is rotated by its distance from the query, straight from the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compression import (
    Compressor,
    Slot,
    compress_group,
    is_by_usage,
    make_compressor,
    most_used,
    overlap,
    read_group,
)
from .schedule import Schedule
from .scores import Scores, mix, products_of, region_weights_of, working_dtype
from .settings import Settings


def attend(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, Hkv, L, D]
    v: Tensor,  # [B, Hkv, L, Dv]
    schedule: Schedule,
    *,
    compressor: str | Compressor = "mean",
    compressor_grad: str = "task",
    return_region_weights: bool = False,
    carried: int | None = None,
    **options: Any,
) -> Any:
    """Outputs of the last tokens of a stream of L, [B, H, L - carried, Dv].

    The first `carried` tokens (L - T unless given) came with earlier calls: they and the slots
    made of them by then are constants, as the carried memory of Transformer-XL is (Dai et al. 2019,
    arXiv:1901.02860, section 3.2).

    Args:
        q: without rotation; with "most_used", of the whole stream, T = L.
        k: without rotation, or rotated to their token's number with `keys="rotated"`.
        v: values.
        schedule: sizes of the memory.
        compressor: a name, or a function as compression.py describes it.
        compressor_grad: "aux": every slot is a constant.
        return_region_weights: also return what share of its attention each token gives to sinks,
            compressed slots and window, [B, H, L - carried, 3], a constant.
        carried: how many tokens came with earlier calls.
        options: the arguments of `Settings`.
    """
    settings = Settings(**options)
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
    if settings.keys == "rotated":
        keys = [settings.rotary.unrotate(key, j) for j, key in enumerate(keys)]

    def make_slot(g: int, constant: bool) -> Slot:
        group_keys, group_values = (
            read_group(x, schedule.members(g), left) for x in (keys, values)
        )
        slot = compress_group(compress, group_keys, group_values, schedule.ratio)
        return slot.detach() if constant else slot

    return walk(
        q,
        keys,
        values,
        make_slot,
        schedule,
        settings,
        compressor_grad=compressor_grad,
        return_region_weights=return_region_weights,
        carried=carried,
        by_usage=by_usage,
    )


def walk(
    q: Tensor,  # [B, H, T, D]
    keys: list[Tensor],  # each [B, Hkv, D] without rotation, of every token of the stream
    values: list[Tensor],  # each [B, Hkv, Dv]
    make_slot: Callable[[int, bool], Slot],
    schedule: Schedule,
    settings: Settings,
    *,
    compressor_grad: str,
    return_region_weights: bool,
    carried: int,
    by_usage: bool = False,
) -> Any:
    """Outputs of the last tokens, one token after the other. Arguments as in `attend`, and

    Args:
        make_slot: `make_slot(g, constant)` gives the slot of group g, once its tokens have left
            the window.
        by_usage: slots are tokens instead, for every head the most used of those that leave.
    """
    work = keys[0].dtype if keys else working_dtype(q.dtype)
    length = len(keys)
    first_query = length - q.shape[2]  # token number
    rotary, scores = settings.rotary, Scores(settings, schedule.ratio, work)
    slots: list[Slot] = []
    outputs, region_weights = [], []
    usage = torch.zeros(*(keys[0].shape[:2] if keys else (0, 0)), length, dtype=work)
    slot_tokens: list[Tensor] = []  # [B, Hkv], the token that each slot is, if it is one
    for t in range(length):
        due = range(len(slots), schedule.groups(t))
        constant = t < carried or compressor_grad == "aux"
        if by_usage:
            leaving = [j for g in due for j in schedule.members(g)]
            chosen = _choose(usage, leaving, len(due))
            picked = [
                Slot(_pick(keys, j), _pick(values, j), usage.new_zeros(j.shape)) for j in chosen
            ]
            slots += [slot.detach() if constant else slot for slot in picked]
            slot_tokens += chosen
        else:
            slots += [make_slot(g, constant) for g in due]
        if t < carried and not by_usage:
            continue
        sinks, groups, tokens = schedule.visible(t)
        held = [slots[g] for g in groups]
        seen_keys = [keys[j] for j in sinks] + [slot.key for slot in held]
        seen_values = [values[j] for j in sinks] + [slot.value for slot in held]
        seen_keys += [keys[j] for j in tokens]
        seen_values += [values[j] for j in tokens]
        among_keys = range(len(sinks), len(sinks) + len(groups))  # where the slots stand
        distances = torch.tensor(schedule.distances(t, settings.distance), dtype=torch.float64)
        distances = distances.expand(*keys[0].shape[:2], -1).clone()  # [B, Hkv, n]
        if by_usage and settings.distance == "token":  # every head has slots of its own
            for i, g in zip(among_keys, groups, strict=True):
                distances[:, :, i] = t - slot_tokens[g]
        mass = None
        if settings.slot_mass and held:
            mass = torch.stack([slot.mass for slot in held], 2)
        query = q[:, :, t - first_query].to(work)
        rotated = rotary.rotate(torch.stack(seen_keys, 2), -distances)
        content = rotary.rotate(scores.content_query(query), 0)  # attention_factor, no angle
        products = products_of(content, rotated)
        weights = scores.weights(query, products, distances, among_keys, mass)
        by_kv_head = weights.detach().reshape(*keys[0].shape[:2], -1, weights.shape[2])
        usage[:, :, list(tokens)] += by_kv_head.mean(2)[:, :, among_keys.stop :]
        if t < carried:
            continue
        region_weights.append(region_weights_of(weights, among_keys))
        outputs.append(mix(weights, torch.stack(seen_values, 2)))
    if outputs:
        out, of_regions = torch.stack(outputs, 2).to(q.dtype), torch.stack(region_weights, 2)
    else:
        out = q.new_zeros(*q.shape[:2], 0, values[0].shape[2] if values else q.shape[3])
        of_regions = q.new_zeros(*q.shape[:2], 0, 3, dtype=work)
    return (out, of_regions) if return_region_weights else out


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
