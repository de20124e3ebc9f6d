"""The lists of a memory laid out in rings, as the real memory lays them out.

Token t >= A of the window and group g of the compressed memory stand at their number modulo the
capacity of the ring; entries never written are zero. int8 slots are shown as the numbers that they
stand for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .memory import KVMemory


def rings_of(memory: KVMemory) -> dict[str, Tensor]:
    """The tensors of `ctx.KVMemory` with the same contents, by name."""
    s = memory.schedule
    window, compressed = capacities(memory)
    rings = {}
    for region, capacity in {"window": window, "compressed": compressed, "sink": s.sinks}.items():
        for part, width in (("keys", memory.head_dim), ("values", memory.value_dim)):
            shape = memory.batch_size, memory.kv_heads, capacity, width
            slots = region == "compressed" and memory.compressed_dtype != torch.int8
            dtype = memory.compressed_dtype if slots else memory.dtype
            rings[f"{region}_{part}"] = torch.zeros(shape, dtype=dtype)
    mass = torch.zeros(memory.batch_size, memory.kv_heads, compressed, dtype=memory.work)
    for b, row in enumerate(memory.rows):
        for t, pair in enumerate(row.tokens):
            region, index = ("sink", t) if t < s.sinks else ("window", t % window)
            rings[f"{region}_keys"][b, :, index] = pair.key
            rings[f"{region}_values"][b, :, index] = pair.value
        for g, slot in enumerate(row.slots if compressed else []):
            rings["compressed_keys"][b, :, g % compressed] = slot.key
            rings["compressed_values"][b, :, g % compressed] = slot.value
            mass[b, :, g % compressed] = slot.mass
    rings |= _choices(memory, window, compressed)
    rings["slot_mass"] = mass if memory.settings.slot_mass else mass[..., :0]
    return {**rings, "seen": memory.seen, "rewindable": memory.rewindable}


def capacities(memory: KVMemory) -> tuple[int, int]:
    """Entries of the window's ring and of the compressed ring."""
    s = memory.schedule
    segment = s.segment or s.ratio
    window = s.window + segment + s.ratio - 1 + memory.max_rewind + memory.overlap
    late = segment * -(-(memory.max_rewind - 1) // segment)  # tokens evicted late by long calls
    return window, s.compressed + -(-late // s.ratio) if s.compressed else 0


def _choices(memory: KVMemory, window: int, compressed: int) -> dict[str, Tensor]:
    """What a memory with "most_used" holds besides; for other compressors without entries."""
    sizes = (window, compressed) if memory.by_usage else (0, 0)
    shape = memory.batch_size, memory.kv_heads
    usage = torch.zeros(*shape, sizes[0], dtype=memory.work)
    positions = torch.zeros(*shape, sizes[1], dtype=torch.int64)
    for b, row in enumerate(memory.rows if memory.by_usage else []):
        for t in range(memory.schedule.sinks, len(row.usage)):
            usage[b, :, t % window] = row.usage[t]
        for g, tokens in enumerate(row.positions if compressed else []):
            positions[b, :, g % compressed] = torch.tensor(tokens)
    return {"attention_received": usage, "slot_positions": positions}
