"""The tensors of a layer's memory: their names, dtypes and shapes, as the engine says them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctx import _C

__all__ = ["CLOCK", "STATE", "TENSORS", "StateShape"]

#: All names, in the order of ``_C.KVMemory.tensors``.
STATE = tuple(_C.state_names())
#: Names of the tensors that each layer has, in their order in ``Memory.rings`` and as operators
#: take them: keys and values of the window, of compressed slots and of sinks. The last three have
#: entries only where they are needed: how much attention each token of the window received and
#: which token each slot is, where a compressor chooses by it; and the log-mass of each slot, with
#: ``slot_mass``.
TENSORS = STATE[:-2]
#: The two tensors that all layers share.
CLOCK = STATE[-2:]
PLACE = {name: place for place, name in enumerate(TENSORS)}
#: What ``rewindable`` is while a call overwrites what is visible; no call ends with it.
OPEN = _C.OPEN
#: The dtype of every tensor, by the dtypes of pairs and of slots.
_DTYPES = {
    (pairs, slots): dict(zip(STATE, _C.state_types(pairs, slots), strict=True))
    for pairs in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for slots in _C.slot_types(pairs)
}
#: Kept in float32 (float64 beside float64) whatever pairs are stored as.
WIDE = tuple(
    name
    for name, dtype in _DTYPES[torch.bfloat16, torch.bfloat16].items()
    if dtype == torch.float32
)
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
    if (pairs, slots) not in _DTYPES:
        raise TypeError(
            f"ctx.Memory: dtype must be float32, float64, bfloat16 or float16, got {pairs}"
        )
    return _DTYPES[pairs, slots][name]


def arithmetic(pairs: torch.dtype) -> torch.dtype:
    """What is computed in over such pairs."""
    return torch.float64 if pairs == torch.float64 else torch.float32


def slot_dtypes(pairs: torch.dtype) -> tuple[torch.dtype, ...]:
    """What slots may be stored as beside such pairs."""
    return tuple(_C.slot_types(pairs))


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
    """Shapes of a layer's tensors for one row: of plain slots, and of int8 ones."""

    plain: tuple[tuple[int, ...], ...]
    packed: tuple[tuple[int, ...], ...]

    @classmethod
    def measured(cls, shape: _C.LayerShape) -> StateShape:
        """Of the engine's own."""
        made = (shape.sizes(1, slots)[: len(TENSORS)] for slots in (torch.float32, torch.int8))
        return cls(*(tuple(map(tuple, sizes)) for sizes in made))

    def zeros(
        self,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        slots: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Empty rings in the order of :data:`TENSORS`; slots of another dtype where it is given.

        Out of torch's own functions: graphs are traced through it.
        """
        slots = slots or dtype
        sizes = self.packed if slots == torch.int8 else self.plain
        with ordinary():
            return [
                torch.zeros(rows, *size[1:], device=device, dtype=dtype_of(name, dtype, slots))
                for name, size in zip(TENSORS, sizes, strict=True)
            ]


def empty_clock(rows: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """seen and rewindable of new streams, int64 [B] each."""
    with ordinary():
        seen, rewindable = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in CLOCK)
    return seen, rewindable
