"""The tensors that are the memory of one layer: their names, their shapes, and what must hold."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctx import _check
from ctx.identity import check_entry, marks
from ctx.schedule import Schedule

__all__ = ["STATE", "Memory", "StateShape"]

#: The memory of one attention layer: a plain dict of tensors by these names, and one more that says
#: what it was made for (:mod:`ctx.identity`).
Memory = dict[str, Tensor]

#: Names of the tensors that are a memory, in the order in which operators take them. ``seen`` is
#: the whole bookkeeping; ``rewindable`` says how much of it the rings can still take back. The last
#: two have entries only where a compressor chooses by usage: what each token of the window was
#: attended to, and which token each slot is.
STATE = (
    "window_keys",
    "window_values",
    "compressed_keys",
    "compressed_values",
    "sink_keys",
    "sink_values",
    "seen",
    "rewindable",
    "attention_received",
    "slot_positions",
)
_NAMES = frozenset(STATE)
#: The regions that are rings, and the tensors in which an entry is one position of the region.
RINGS = {
    "window": ("window_keys", "window_values", "attention_received"),
    "compressed": ("compressed_keys", "compressed_values", "slot_positions"),
}
COUNTS = ("seen", "rewindable", "slot_positions")


SLOTS = ("compressed_keys", "compressed_values")
#: int8 slots are rows of multiples of a scale, which stands behind them as a float32.
SCALE_BYTES = 4


def ordinary() -> contextlib.AbstractContextManager[Any]:
    """In it a memory's tensors are made, also in inference mode, as tensors that can be used under
    grad later; a graph is left as it is traced.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def check_names(memory: Any, where: str) -> list[str]:
    """Raises unless `memory` is a dict of tensors by the names of a memory; returns the names of
    the entries that say what it was made for.

    Raises:
        ValueError, TypeError: it is not; the message begins with `where`.
    """
    found = marks(memory) if isinstance(memory, dict) else []
    if (
        not isinstance(memory, dict)
        or len(memory) != len(STATE) + len(found)
        or not memory.keys() >= _NAMES
    ):
        got = type(memory).__name__
        if isinstance(memory, dict):
            got = ", ".join(map(str, memory)) or "an empty one"
        raise ValueError(f"{where}: memory must be a dict of {', '.join(STATE)}, got {got}")
    _check.tensors(where, **memory)
    return found


def dtype_of(name: str, pairs: torch.dtype, slots: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of a memory whose pairs have dtype `pairs` and whose slots `slots`."""
    if name in COUNTS:
        return torch.int64
    if name in SLOTS:
        return slots
    wide = torch.float64 if pairs == torch.float64 else torch.float32
    return wide if name == "attention_received" else pairs


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
    ) -> StateShape:
        """The shapes that a schedule, a max_rewind and a compressor need."""
        window = schedule._law.window_capacity(max_rewind) + overlap
        compressed = schedule._law.compressed_capacity(max_rewind)
        sizes = (window, compressed, schedule.sinks)
        return cls(kv_heads, head_dim, value_dim, *sizes, used)

    def sizes(self, rows: int, slots: torch.dtype) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor for so many rows, and slots of this dtype."""
        lengths = (self.window, self.compressed, self.sinks)
        widths = (self.head_dim, self.value_dim)
        pairs = [(rows, self.kv_heads, length, width) for length in lengths for width in widths]
        if slots == torch.int8:
            pairs[2:4] = [(*size[:3], size[3] + SCALE_BYTES) for size in pairs[2:4]]
        choosing = [
            (rows, self.kv_heads, length if self.used else 0)
            for length in (self.window, self.compressed)
        ]
        return dict(zip(STATE, [*pairs, (rows,), (rows,), *choosing], strict=True))

    def zeros(
        self,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        slots: torch.dtype | None = None,
    ) -> Memory:
        """An empty memory; slots of another dtype where it is given."""
        slots = slots or dtype
        with ordinary():
            return {
                name: torch.zeros(size, device=device, dtype=dtype_of(name, dtype, slots))
                for name, size in self.sizes(rows, slots).items()
            }

    def check(self, memory: Any, rows: int, device: torch.device, where: str, of: str) -> None:
        """Raises unless `memory` has these shapes, one dtype, and the rows and device of input
        `of`.

        Raises:
            ValueError, TypeError: the message begins with `where` and names the tensor.
        """
        found = check_names(memory, where)
        held = memory["seen"].shape
        if len(held) == 1 and held[0] != rows:
            raise ValueError(
                f"{where}: {of} must have as many rows as memory = {held[0]}, got {rows}"
            )
        check_entry(memory, found, rows, where)
        dtype = memory["window_keys"].dtype
        slots = memory["compressed_keys"].dtype
        if slots not in slot_dtypes(dtype):
            allowed = ", ".join(map(str, slot_dtypes(dtype)))
            raise TypeError(f"{where}: compressed_keys must be one of {allowed}, got {slots}")
        for name, size, kind, fits in _expected(self, rows, dtype, slots):
            tensor = memory[name]
            if tensor.shape != size:
                raise ValueError(f"{where}: {name} must be {list(size)}, got {list(tensor.shape)}")
            if tensor.dtype != kind or not fits:
                raise TypeError(f"{where}: {name} must be {kind}, got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(f"{where}: {name} must be on {device}, got {tensor.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{where}: {name} must be contiguous, got {tensor.stride()}")
        if device.type == "cpu":  # a device is never waited for
            for row, (seen, spare) in enumerate(
                zip(memory["seen"].tolist(), memory["rewindable"].tolist(), strict=True)
            ):
                if not 0 <= seen < 2**62:
                    raise ValueError(
                        f"{where}: seen must be between 0 and 2**62, got {seen} in row {row}"
                    )
                if not 0 <= spare <= seen:
                    raise ValueError(
                        f"{where}: rewindable must be between 0 and seen = {seen}, "
                        f"got {spare} in row {row}"
                    )


@functools.lru_cache(maxsize=256)
def _expected(
    shape: StateShape, rows: int, dtype: torch.dtype, slots: torch.dtype
) -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
    """Name, shape and dtype of every tensor, and whether a memory can be of that dtype."""
    found = []
    for name, size in shape.sizes(rows, slots).items():
        kind = dtype_of(name, dtype, slots)
        counts = name in COUNTS or kind == torch.int8
        found.append((name, size, kind, counts or kind.is_floating_point))
    return found
