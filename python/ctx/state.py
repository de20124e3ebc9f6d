"""The tensors of a layer's memory: their names, dtypes and shapes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctx.schedule import Schedule

__all__ = ["CLOCK", "STATE", "TENSORS", "StateShape"]

#: Names of the tensors that each layer has, in their order in ``Memory.rings`` and as operators
#: take them. The last three have entries only where they are needed: how much attention each token
#: of the window received and which token each slot is, where a compressor chooses by it; and the
#: log-mass of each slot, with ``slot_mass``.
TENSORS = (
    "window_keys",
    "window_values",
    "compressed_keys",
    "compressed_values",
    "sink_keys",
    "sink_values",
    "attention_received",
    "slot_positions",
    "slot_mass",
)
#: The two tensors that all layers share.
CLOCK = ("seen", "rewindable")
#: All names, in the order of ``_C.KVMemory.tensors``.
STATE = (*TENSORS, *CLOCK)
PLACE = {name: place for place, name in enumerate(TENSORS)}
#: The regions that are rings, and the tensors in which an entry is one position of the region.
RINGS = {
    "window": ("window_keys", "window_values", "attention_received"),
    "compressed": ("compressed_keys", "compressed_values", "slot_positions", "slot_mass"),
}
COUNTS = ("seen", "rewindable", "slot_positions")
#: Kept in float32 (float64 beside float64) whatever pairs are stored as.
WIDE = ("attention_received", "slot_mass")
#: What ``rewindable`` is while a call overwrites what is visible; no call ends with it.
OPEN = -1
SLOTS = ("compressed_keys", "compressed_values")
#: int8 slots are rows of multiples of a scale, which stands behind them as a float32.
SCALE_BYTES = 4


_NOTHING = contextlib.nullcontext()


def ordinary() -> contextlib.AbstractContextManager[Any]:
    """In it a memory's tensors are made, also in inference mode, as tensors that can be used under
    grad later; a graph is left as it is traced.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def writing(clock: Tensor) -> contextlib.AbstractContextManager[Any]:
    """In it a memory's tensors are written in place, also those made in inference mode."""
    if not torch.compiler.is_compiling():
        if clock.is_inference():
            return torch.inference_mode()
        if not torch.is_grad_enabled():
            return _NOTHING  # a step of a stream asks for this twice
    return torch.no_grad()


def dtype_of(name: str, pairs: torch.dtype, slots: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of a memory whose pairs have dtype `pairs` and whose slots `slots`."""
    if name in COUNTS:
        return torch.int64
    if name in SLOTS:
        return slots
    wide = torch.float64 if pairs == torch.float64 else torch.float32
    return wide if name in WIDE else pairs


def slot_dtypes(pairs: torch.dtype) -> tuple[torch.dtype, ...]:
    """What slots may be stored as beside such pairs."""
    if pairs in (torch.float32, torch.bfloat16, torch.float16):
        return (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    return (pairs,)


def slots_as(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Compressed slots [..., stored width] as the numbers [..., width] that they stand for."""
    if rows.dtype != torch.int8:
        return rows.to(dtype)
    width = rows.shape[-1] - SCALE_BYTES
    scale = rows[..., width:].contiguous().view(torch.float32)
    return (rows[..., :width].to(torch.float32) * scale).to(dtype)


def ring_positions(newest: Tensor, capacity: int) -> Tensor:
    """The position that stands at every index of a ring once `newest` is written, [B, capacity].

    It is the largest position up to `newest` [B] whose remainder is the index; below zero where
    nothing has been written.
    """
    index = torch.arange(capacity, device=newest.device)
    return newest[:, None] - (newest[:, None] - index).remainder(max(capacity, 1))


@dataclass(frozen=True)
class StateShape:
    """Shapes of a memory's tensors, but for the number of rows."""

    kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    compressed: int
    sinks: int
    used: bool = False
    mass: bool = False

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        max_rewind: int,
        *,
        overlap: int = 0,
        used: bool = False,
        mass: bool = False,
    ) -> StateShape:
        """The shapes that a schedule, a max_rewind and a compressor need."""
        window = schedule._law.window_capacity(max_rewind) + overlap
        compressed = schedule._law.compressed_capacity(max_rewind)
        sizes = (window, compressed, schedule.sinks)
        return cls(kv_heads, head_dim, value_dim, *sizes, used, mass)

    def sizes(self, rows: int, slots: torch.dtype) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor for so many rows, and slots of this dtype."""
        lengths = (self.window, self.compressed, self.sinks)
        widths = (self.head_dim, self.value_dim)
        pairs = [(rows, self.kv_heads, length, width) for length in lengths for width in widths]
        if slots == torch.int8:
            pairs[2:4] = [(*size[:3], size[3] + SCALE_BYTES) for size in pairs[2:4]]
        needed = (
            (self.window, self.used),
            (self.compressed, self.used),
            (self.compressed, self.mass),
        )
        rest = [(rows, self.kv_heads, length if is_needed else 0) for length, is_needed in needed]
        return dict(zip(TENSORS, [*pairs, *rest], strict=True))

    def zeros(
        self,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        slots: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Empty rings in the order of :data:`TENSORS`; slots of another dtype where it is given."""
        slots = slots or dtype
        sizes = self.sizes(rows, slots)
        with ordinary():
            return [
                torch.zeros(sizes[name], device=device, dtype=dtype_of(name, dtype, slots))
                for name in TENSORS
            ]


def empty_clock(rows: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """seen and rewindable of new streams, int64 [B] each."""
    with ordinary():
        seen, rewindable = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in CLOCK)
    return seen, rewindable
