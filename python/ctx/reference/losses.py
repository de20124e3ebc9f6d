"""Auxiliary losses, boundary by boundary: Rae et al. 2019 (arXiv:1911.05507), section 3.2 and
algorithm 2.

Deviations: see ctx.losses. Everything but the slots is constant, so the gradient reaches the
compressor (and the decoder) only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .compression import Compressor, Slot, compress_group, overlap, read_group
from .schedule import Schedule
from .scores import mix, products_of


def boundaries(schedule: Schedule, seen: int, length: int) -> list[int]:
    """Where segments end after the first `seen` tokens, within the first `length`."""
    segment = schedule.segment or schedule.ratio
    return [b for b in range(seen + 1, length + 1) if b % segment == 0]


def attention_reconstruction(
    q: Tensor,  # [H, L, D] of one stream, without rotation
    k: Tensor,  # [Hkv, L, D], without rotation
    v: Tensor,  # [Hkv, L, Dv]
    schedule: Schedule,
    compressor: Compressor,
    seen: int = 0,
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    slot_mass: bool = False,
) -> list[Tensor]:
    """One error for each boundary behind the first `seen` tokens at which something is evicted.

    Queries attend by content alone: no positions, no bias, no cap. With `slot_mass` the scores of
    slots get their mass, since the error compares them with the tokens that they stand for.

    Where layer inputs are remembered, k holds these [1, L, E], v nothing [1, L, 0], and `project`
    makes (constant) keys [Hkv, n, D] and values [Hkv, n, Dv] of tokens and slots [n, E].
    """
    errors = []
    segment = schedule.segment or schedule.ratio
    for b in boundaries(schedule, seen, q.shape[1]):
        groups = range(schedule.groups(b - 1), schedule.groups(b))
        if not groups or not schedule.compressed:
            continue
        tokens = [j for g in groups for j in schedule.members(g)]
        queries = range(max(seen, b - segment), b)
        keys, values = k[:, tokens].detach(), v[:, tokens].detach()
        slots = [_slot(k, v, schedule.members(g), compressor) for g in groups]
        slot_keys, slot_values, mass = (torch.stack(x, 2) for x in zip(*slots, strict=True))
        if project is not None:
            keys, values = project(keys[0])
            slot_keys, slot_values = (x[None] for x in project(slot_keys[0, 0]))
            mass = mass.expand(-1, slot_keys.shape[1], -1)
        each = []
        for t in queries:
            query = q[None, :, t].detach()
            want = mix(_weights(query, keys[None]), values[None])
            got = mix(_weights(query, slot_keys, mass if slot_mass else None), slot_values)
            each.append((got - want).square().mean())
        errors.append(torch.stack(each).mean())
    return errors


def _slot(k: Tensor, v: Tensor, members: range, compressor: Compressor) -> Slot:
    """The slot of a group of constant tokens, with parts [1, Hkv, ...]."""
    left = overlap(compressor, len(members))
    keys, values = (read_group([*x[None].detach().unbind(2)], members, left) for x in (k, v))
    return compress_group(compressor, keys, values, len(members))


def _weights(query: Tensor, keys: Tensor, mass: Tensor | None = None) -> Tensor:
    scale: float = query.shape[-1] ** -0.5
    scores = scale * products_of(query, keys)
    if mass is not None:
        scores = scores + mass.repeat_interleave(query.shape[1] // mass.shape[1], 1)
    return scores.softmax(-1)
