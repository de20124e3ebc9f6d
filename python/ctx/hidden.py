"""Memories of layer inputs instead of pairs, as the paper keeps them (Rae et al. 2019,
arXiv:1911.05507, section 3): what a call attends to is projected anew with the current weights.

The state is that of :mod:`ctx.state` with one head of the layer's width: the inputs stand where
keys do, without rotation, and values have width 0. The compressor makes slots out of inputs.
Deviation from the paper: everything is the law's, so a layer gives the same numbers however a
stream is cut into calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctx.losses import groups_at
from ctx.schedule import Schedule
from ctx.state import STATE, Memory, dtype_of, ring_positions, slots_as

__all__ = ["as_stored", "pairs_of"]

# Inputs [B, 1, n, E] to un-rotated keys [B, Hkv, n, D] and values [B, Hkv, n, Dv].
Project = Callable[[Tensor], tuple[Tensor, Tensor]]


def as_stored(x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [B, T, E] as the memory takes pairs: keys [B, 1, T, E] and values [B, 1, T, 0]."""
    hidden = x.unsqueeze(1)
    return hidden, hidden[..., :0]


def pairs_of(
    memory: Memory,
    schedule: Schedule,
    distance: str,
    rotary: tuple[int, float, bool],
    project: Project,
) -> list[Tensor]:
    """The memory of pairs that a memory of inputs stands for, tensors in the order of ``STATE``.

    Every ring has the same capacity, so each entry stands where the pair would. Differentiable in
    the weights of ``project``; what the next token cannot see counts as zero there, be it a NaN.

    Args:
        memory: of inputs; constant, and left as it is.
        schedule: sizes of the memory.
        distance: ``"slot"`` or ``"token"``: what slots are rotated to.
        rotary: rotary_dim, rotary_base, rotary_interleaved.
        project: inputs to keys and values, of one dtype.
    """
    seen = memory["seen"]
    begun = groups_at(schedule, seen - 1)
    due = groups_at(schedule, seen)
    window = ring_positions(seen - 1, memory["window_keys"].shape[2])
    slots = ring_positions(begun - 1, memory["compressed_keys"].shape[2])
    sinks = torch.arange(schedule.sinks, device=seen.device).expand(len(seen), -1)
    first = schedule.sinks + schedule.ratio * begun
    oldest = (due - schedule.compressed).clamp_min(0)
    clock: Any = slots
    if distance == "token":
        centre = schedule.sinks + (schedule.ratio - 1) / 2
        clock = slots.to(torch.float64) * schedule.ratio + centre
    made: dict[str, Tensor] = {}
    for region, position, visible in (
        ("window", window, window >= first[:, None]),
        ("compressed", clock, slots >= oldest[:, None]),
        ("sink", sinks, sinks < seen[:, None]),
    ):
        stored = slots_as(memory[f"{region}_keys"], memory["window_keys"].dtype)
        inputs = stored.masked_fill(~visible[:, None, :, None], 0.0)
        keys, values = project(inputs)
        if rotary[0]:
            keys = torch.ops.ctx.rotary(keys, position, *rotary)
        made[f"{region}_keys"], made[f"{region}_values"] = keys.contiguous(), values.contiguous()
    made |= {"seen": seen, "rewindable": memory["rewindable"]}
    batch, kv_heads = made["window_keys"].shape[:2]
    for name in (
        "attention_received",
        "slot_positions",
    ):  # no compressor of inputs chooses by usage
        pairs = made["window_keys"].dtype
        dtype = dtype_of(name, pairs, pairs)
        made[name] = torch.zeros(batch, kv_heads, 0, dtype=dtype, device=seen.device)
    return [made[name] for name in STATE]
