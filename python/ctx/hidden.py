"""Memories of layer inputs instead of pairs, as the paper keeps them (Rae et al. 2019,
arXiv:1911.05507, section 3): what a call attends to is projected anew with the current weights.

The state is that of :mod:`ctx.state` with one head of the layer's width: the inputs stand where
keys do, without rotation, and values have width 0. The compressor makes slots out of inputs.
Deviation from the paper: everything is the law's, so a layer gives the same numbers however a
stream is cut into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctx import engine
from ctx.schedule import first_token, groups_at, slot_positions
from ctx.state import TENSORS, dtype_of, ring_positions, slots_as

if TYPE_CHECKING:
    from ctx.attention import CompressiveAttention

__all__ = ["as_stored", "pairs_of"]

# Inputs [B, 1, n, E] to un-rotated keys [B, Hkv, n, D] and values [B, Hkv, n, Dv].
Project = Callable[[Tensor], tuple[Tensor, Tensor]]


def as_stored(x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [B, T, E] as the memory takes pairs: keys [B, 1, T, E] and values [B, 1, T, 0]."""
    hidden = x.unsqueeze(1)
    return hidden, hidden[..., :0]


def pairs_of(
    rings: Sequence[Tensor], seen: Tensor, layer: CompressiveAttention, project: Project
) -> list[Tensor]:
    """The rings of pairs that rings of inputs stand for, in the order of ``ctx.state.TENSORS``.

    Every ring has the same capacity, so each entry stands where the pair would. Differentiable in
    the weights of ``project``; what the next token cannot see counts as zero there, be it a NaN.

    Args:
        rings: of inputs; constant, and left as they are.
        seen: int64 [B].
        layer: whose memory it is.
        project: inputs to keys and values, of one dtype.
    """
    held, schedule = dict(zip(TENSORS, rings, strict=True)), layer.schedule
    begun = groups_at(schedule, seen - 1)
    due = groups_at(schedule, seen)
    window = ring_positions(seen - 1, held["window_keys"].shape[2])
    slots = ring_positions(begun - 1, held["compressed_keys"].shape[2])
    sinks = torch.arange(schedule.sinks, device=seen.device).expand(seen.shape[0], -1)
    first = first_token(schedule, begun)
    oldest = (due - schedule.compressed).clamp_min(0)
    clock = slot_positions(schedule, layer.distance, slots)
    made: dict[str, Tensor] = {}
    for region, position, visible in (
        ("window", window, window >= first[:, None]),
        ("compressed", clock, slots >= oldest[:, None]),
        ("sink", sinks, sinks < seen[:, None]),
    ):
        stored = slots_as(held[f"{region}_keys"], held["window_keys"].dtype)
        inputs = stored.masked_fill(~visible[:, None, :, None], 0.0)
        keys, values = project(inputs)
        if layer.rotary_dim:
            keys = engine.rotary(keys, position, layer.law)
        made[f"{region}_keys"], made[f"{region}_values"] = keys.contiguous(), values.contiguous()
    keys = made["window_keys"]
    for name in TENSORS[6:8]:  # no compressor of inputs chooses by the attention received
        dtype = dtype_of(name, keys.dtype, keys.dtype)
        made[name] = torch.zeros(*keys.shape[:2], 0, dtype=dtype, device=seen.device)
    mass = held["slot_mass"].to(dtype_of("slot_mass", keys.dtype, keys.dtype))
    made["slot_mass"] = mass.expand(-1, keys.shape[1], -1).contiguous()
    return [made[name] for name in TENSORS]
