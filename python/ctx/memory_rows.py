"""What is done with whole rows of a memory: the functions behind the methods of ctx.Memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctx import _check, memory_check, memory_resize
from ctx.schedule import Schedule
from ctx.spec import Spec
from ctx.state import SLOTS, TENSORS, dtype_of, ordinary, slot_dtypes, slots_as, writing

if TYPE_CHECKING:
    from ctx.memory import Memory

__all__ = [
    "Rows",
    "as_counts",
    "as_rows",
    "clone",
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
    """All tensors: the clock, then those of each layer."""
    return [memory.seen, memory.rewindable, *(x for ring in memory.rings for x in ring)]


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
        return tokens.clone()  # it may be a memory's own counter
    return torch.full_like(seen, _check.integer(tokens, "tokens", where))


def reset(memory: Memory, rows: Rows | None) -> None:
    where = "ctx.Memory.reset"
    _whole(memory, where)
    if rows is None:
        index = torch.arange(memory.batch_size, device=memory.seen.device)
    else:
        index = _index(memory, rows, where)
    with writing(memory.seen):
        memory.seen.index_fill_(0, index, 0)
        memory.rewindable.index_fill_(0, index, 0)


def rewind(memory: Memory, tokens: int | Tensor) -> None:
    where = "ctx.Memory.rewind"
    _whole(memory, where)
    memory_resize.refuse_counted(memory, where)
    seen = memory.seen
    count = as_counts(tokens, seen, where)
    if count.dtype != torch.int64:
        raise TypeError(f"{where}: tokens must be int64, got {count.dtype}")
    if count.shape != seen.shape:
        raise ValueError(f"{where}: tokens must be {list(seen.shape)}, got {list(count.shape)}")
    count = _readable(count, "tokens", where).to(seen.device)
    both = zip(count.tolist(), memory.rewindable.tolist(), strict=True)
    for row, (asked, most) in enumerate(both):
        if not 0 <= asked <= most:
            raise ValueError(
                f"{where}: tokens must be between 0 and what row {row} can take back = {most}, "
                f"got {asked}"
            )
    with writing(seen):
        seen.sub_(count)
        memory.rewindable.sub_(count)


def select(memory: Memory, rows: Rows) -> Memory:
    where = "ctx.Memory.select"
    _whole(memory, where)
    index = _index(memory, rows, where)
    if len(index) == 0:
        raise ValueError(f"{where}: rows must be at least one, got none")
    return _mapped(memory, memory.spec, lambda name, x: x.index_select(0, index))


def merge(memories: Any) -> Memory:
    where = "ctx.Memory.merge"
    if not isinstance(memories, (list, tuple)):
        raise TypeError(f"{where}: memories must be a list, got {type(memories).__name__}")
    if not memories:
        raise ValueError(f"{where}: memories must be at least one, got none")
    for memory in memories:
        _whole(memory, where)
    first: Memory = memories[0]
    for other in memories[1:]:
        first.spec.check(other.spec, where)
        memory_check.same_kind(first, other, where, device=True)
    parts = iter(zip(*map(leaves, memories), strict=True))
    return _mapped(first, first.spec, lambda name, x: torch.cat(next(parts)))


def clone(memory: Memory) -> Memory:
    _whole(memory, "ctx.Memory.clone")
    return _mapped(memory, memory.spec, lambda name, x: x.clone())


def to(memory: Memory, dtype: torch.dtype | None, device: torch.device | str | None) -> Memory:
    where = "ctx.Memory.to"
    _whole(memory, where)
    if dtype is not None and not _check.dtype(dtype, where).is_floating_point:
        raise TypeError(f"{where}: dtype must be floating point, got {dtype}")
    if device is not None:
        device = _check.device(device, where)
    was, slots = memory.rings[0][0].dtype, memory.rings[0][2].dtype
    pairs = dtype or was
    stored = slots if slots != was and slots in slot_dtypes(pairs) else pairs

    def moved(name: str, x: Tensor) -> Tensor:
        wanted = dtype_of(name, pairs, stored)
        numbers = slots_as(x, wanted) if name in SLOTS and wanted != x.dtype else x
        return numbers.to(device or x.device, wanted, copy=True)

    return _mapped(memory, memory.spec, moved)


def resized(memory: Memory, schedule: Schedule | Sequence[Schedule]) -> Memory:
    where = "ctx.Memory.resized"
    _whole(memory, where)
    return memory_resize.resized(memory, schedule, where)


def _mapped(memory: Memory, spec: Spec, function: Any) -> Memory:
    """A memory of what a function of name and tensor makes of each tensor, in order of `leaves`."""
    with ordinary():
        seen = function("seen", memory.seen)
        rewindable = function("rewindable", memory.rewindable)
        rings = [
            [function(name, x) for name, x in zip(TENSORS, ring, strict=True)]
            for ring in memory.rings
        ]
    made = type(memory)(spec, seen, rewindable, rings)
    made._checked = memory._checked
    return made


def _whole(memory: Any, where: str) -> None:
    """Raises unless it is a memory with the tensors that its spec says."""
    if not hasattr(memory, "_checked") or not hasattr(memory, "rings"):
        raise TypeError(f"{where}: memory must be a ctx.Memory, got {type(memory).__name__}")
    if not memory._checked:
        memory_check.tensors(memory, where)
        memory._checked = True


def _readable(tensor: Tensor, name: str, where: str) -> Tensor:
    if tensor.is_meta or tensor.layout != torch.strided:
        got = "a tensor on meta" if tensor.is_meta else tensor.layout
        raise ValueError(f"{where}: {name} must be a dense tensor of numbers, got {got}")
    return tensor


def _index(memory: Memory, rows: Rows, where: str) -> Tensor:
    """Row indices, int64 [N] on the memory's device."""
    seen = memory.seen
    batch = seen.shape[0]
    chosen = as_rows(rows, where)
    if chosen.dtype not in (torch.int64, torch.bool):
        raise TypeError(f"{where}: rows must be int64 or bool, got {chosen.dtype}")
    if chosen.dim() != 1:
        raise ValueError(f"{where}: rows must be [N], got {list(chosen.shape)}")
    _readable(chosen, "rows", where)
    if chosen.dtype == torch.bool:
        if len(chosen) != batch:
            raise ValueError(
                f"{where}: rows must be bool [B] = [{batch}], got {list(chosen.shape)}"
            )
        chosen = chosen.nonzero()[:, 0]
    elif chosen.numel():
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= batch:
            got = low if low < 0 else high
            raise IndexError(f"{where}: rows must be between 0 and B - 1 = {batch - 1}, got {got}")
    return chosen.to(seen.device)
