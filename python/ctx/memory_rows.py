"""What is done with whole rows of a memory: the functions behind the methods of ctx.Memory. The
engine does it (``ctx/rows.h``); here is what Python's arguments mean.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctx import _C, _check, memory_check
from ctx.schedule import Schedule
from ctx.spec import Spec
from ctx.state import CLOCK, PLACE, TENSORS, dtype_of, slot_dtypes, slots_as, writing

if TYPE_CHECKING:
    from ctx.memory import Memory

__all__ = [
    "Rows",
    "as_counts",
    "as_rows",
    "leaves",
    "merge",
    "reset",
    "resized",
    "rewind",
    "select",
    "to",
]

Rows = int | Sequence[int] | Tensor


def leaves(memory: Memory) -> list[Tensor]:
    """All tensors as the engine takes them: those of each layer, and last the clock."""
    return [*(x for ring in memory.rings for x in ring), memory.seen, memory.rewindable]


def as_rows(rows: Any, where: str) -> Tensor:
    """Row indices as the tensor that the engine checks: int64 [N], or bool [B].

    Raises:
        TypeError, IndexError: they are no integers, or such as no row can have.
    """
    if isinstance(rows, Tensor):
        return rows
    if hasattr(rows, "__array__") and hasattr(rows, "__len__"):  # NumPy's
        rows = rows.tolist()
    values = rows if isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)) else [rows]
    if values is rows and values and all(isinstance(value, bool) for value in values):
        return torch.tensor(values, device="cpu")
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        indices = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(
            f"{where}: rows must be an index, several, or bool [B], got {rows!r}"
        ) from None
    for index in indices:
        if index not in _check.INT64:
            raise IndexError(f"{where}: rows must be between 0 and B - 1, got {index}")
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def as_counts(tokens: Any, seen: Tensor, where: str) -> Tensor:
    """Tokens of each row, int64 [B], of one number or of a tensor that is still to be checked."""
    if isinstance(tokens, Tensor):
        return tokens
    return torch.full_like(seen, _check.integer(tokens, "tokens", where))


def reset(memory: Memory, rows: Rows | None) -> None:
    where = "ctx.Memory.reset"
    memory_check.whole(memory, where)
    chosen = None if rows is None else as_rows(rows, where)
    if not torch.compiler.is_compiling():
        _C.reset_state(memory.seen, memory.rewindable, chosen, where)
        return
    with writing(memory.seen):  # a graph holds torch's own operators
        for count in memory.clock:
            if chosen is None:
                count.zero_()
            elif chosen.dtype == torch.bool:
                count.masked_fill_(chosen, 0)
            else:
                count.index_fill_(0, chosen, 0)


def rewind(memory: Memory, tokens: int | Tensor) -> None:
    where = "ctx.Memory.rewind"
    memory_check.whole(memory, where)
    _C.rewind_state(leaves(memory), as_counts(tokens, memory.seen, where), where)


def select(memory: Memory, rows: Rows) -> Memory:
    where = "ctx.Memory.select"
    memory_check.whole(memory, where)
    state = _C.select_state(leaves(memory), as_rows(rows, where), where)
    return _made(memory, memory.spec, state)


def merge(memories: Any) -> Memory:
    where = "ctx.Memory.merge"
    if not isinstance(memories, (list, tuple)):
        raise TypeError(f"{where}: memories must be a list, got {type(memories).__name__}")
    for memory in memories:
        memory_check.whole(memory, where)
        memories[0].spec.check(memory.spec, where)
    if torch.compiler.is_compiling():
        state = [torch.cat(parts) for parts in zip(*map(leaves, memories), strict=True)]
    else:
        states = [x for memory in memories for x in leaves(memory)]
        state = _C.merge_state(states, len(memories), where)  # refuses none at all
    return _made(memories[0], memories[0].spec, state)


def to(
    memory: Memory,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    where: str = "ctx.Memory.to",
) -> Memory:
    memory_check.whole(memory, where)
    if dtype is not None:
        dtype = _check.dtype(dtype, where)
    if device is not None:
        device = _check.device(device, where)
    if torch.compiler.is_compiling():
        state = _to_in_graph(memory, dtype, device)
    else:
        state = _C.to_state(leaves(memory), dtype, None, device, where)
    return _made(memory, memory.spec, state)


def _to_in_graph(memory: Memory, dtype: torch.dtype | None, device: Any) -> list[Tensor]:
    """What the engine's to_state gives, as torch's own operators."""
    was, slots = (memory.rings[0][PLACE[f"{part}_keys"]].dtype for part in ("window", "compressed"))
    pairs = was if dtype is None else dtype
    stored = slots if slots != was and slots in slot_dtypes(pairs) else pairs
    names = [*TENSORS * memory.layers, *CLOCK]
    moved = []
    for name, x in zip(names, leaves(memory), strict=True):
        wanted = dtype_of(name, pairs, stored)
        numbers = x
        if name.startswith("compressed") and wanted != x.dtype:
            numbers = slots_as(x, wanted)
        moved.append(numbers.to(x.device if device is None else device, wanted, copy=True))
    return moved


def resized(
    memory: Memory, schedule: Schedule | Sequence[Schedule], where: str = "ctx.Memory.resized"
) -> Memory:
    memory_check.whole(memory, where)
    old = memory.spec
    schedules = _each(schedule, memory.layers, where)
    pairs = zip(old.layers, schedules, strict=True)
    spec = Spec(tuple(layer.rescheduled(new) for layer, new in pairs))
    shapes, made = (memory_check.shapes(one) for one in (old, spec))
    return _made(memory, spec, _C.resized_state(leaves(memory), shapes, made, where))


def _made(memory: Memory, spec: Spec, state: list[Tensor]) -> Memory:
    """A memory of the tensors that the engine made of those of another."""
    *flat, seen, rewindable = state
    each = len(TENSORS)
    rings = [flat[first : first + each] for first in range(0, len(flat), each)]
    made = type(memory)(spec, seen, rewindable, rings)
    made._checked = memory._checked
    return made


def _each(schedules: Any, layers: int, where: str) -> list[Schedule]:
    """One schedule per layer, of one or of several."""
    several = isinstance(schedules, (list, tuple))
    found = list(schedules) if several else [schedules] * layers
    for schedule in found:
        if not isinstance(schedule, Schedule):
            got = type(schedule).__name__
            raise TypeError(f"{where}: schedule must be a ctx.Schedule or one per layer, got {got}")
    if len(found) != layers:
        raise ValueError(
            f"{where}: schedule must be one or {layers}, one per layer, got {len(found)}"
        )
    return found
