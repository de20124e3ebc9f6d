"""What must hold of a memory's tensors, checked before a call writes to one of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctx import _check
from ctx.spec import LayerSpec, Spec
from ctx.state import (
    CLOCK,
    COUNTS,
    OPEN,
    PLACE,
    STATE,
    TENSORS,
    WIDE,
    StateShape,
    dtype_of,
    slot_dtypes,
)

if TYPE_CHECKING:
    from ctx.memory import Memory

__all__ = ["call", "kind", "same_kind", "tensors", "widened", "zeros"]


@functools.lru_cache(maxsize=256)
def _shape(spec: LayerSpec) -> StateShape:
    sizes = (spec.kv_heads, spec.head_dim, spec.value_dim, spec.max_rewind)
    needed = {"used": spec.counts_attention, "mass": spec.slot_mass}
    return StateShape.of(spec.schedule, *sizes, overlap=spec.overlap, **needed)


def zeros(
    spec: LayerSpec,
    rows: int,
    dtype: torch.dtype,
    device: torch.device | str,
    slots: torch.dtype | None = None,
) -> list[Tensor]:
    """Empty rings of a layer, in the order of :data:`ctx.state.TENSORS`."""
    return _shape(spec).zeros(rows, dtype, device, slots)


def call(memory: Any, spec: Spec, rows: int, device: torch.device, where: str, of: str) -> None:
    """Raises unless `memory` is one of `spec`, with the rows and device of input `of`, and whole.

    Shapes and dtypes of its tensors are read once per memory; the operators check them again.

    Raises:
        ValueError, TypeError: the message begins with `where` and names what does not fit.
    """
    kind(memory, spec, where)
    if not memory._checked:
        tensors(memory, where)
        memory._checked = True
    seen, spare = memory.seen, memory.rewindable
    if seen.shape[0] != rows:
        raise ValueError(
            f"{where}: {of} must have as many rows as memory = {seen.shape[0]}, got {rows}"
        )
    if seen.device != device:
        raise ValueError(f"{where}: memory must be on {device} as {of}, got {seen.device}")
    if device.type == "cpu":  # a device is never waited for
        _counts(seen.tolist(), spare.tolist(), where)


def kind(memory: Any, spec: Spec, where: str) -> None:
    """Raises unless `memory` is a memory of `spec`; reads no tensor, so it holds in graphs."""
    if type(memory).__name__ != "Memory" or not hasattr(memory, "spec"):
        got = type(memory).__name__
        raise TypeError(f"{where}: memory must be a ctx.Memory or None, got {got}")
    spec.check(memory.spec, where)


def _counts(seen: list[int], spare: list[int], where: str) -> None:
    for row, (count, back) in enumerate(zip(seen, spare, strict=True)):
        if not 0 <= count < 2**62:
            raise ValueError(f"{where}: seen must be between 0 and 2**62, got {count} in row {row}")
        if back == OPEN:
            raise ValueError(
                f"{where}: memory must be what a call left that ended, got one that was being "
                "written when its call was interrupted: reset it, or go back to a copy"
            )
        if not 0 <= back <= count:
            raise ValueError(
                f"{where}: rewindable must be between 0 and seen = {count}, got {back} in row {row}"
            )


def tensors(memory: Memory, where: str) -> None:
    """Raises unless all tensors have the shapes of the spec, one device, and fitting dtypes, and
    none stands in two places.
    """
    _check.tensors(where, seen=memory.seen, rewindable=memory.rewindable)
    rows, device = memory.seen.shape, memory.seen.device
    several = len(memory.rings) > 1
    owners: dict[int, tuple[str, str]] = {}
    if len(memory.rings) != len(memory.spec.layers):
        got = len(memory.rings)
        raise ValueError(f"{where}: memory must have {len(memory.spec.layers)} layers, got {got}")
    for layer, (spec, ring) in enumerate(zip(memory.spec.layers, memory.rings, strict=True)):
        at = f"{where}: memory[{layer}]" if several else where
        if len(ring) != len(TENSORS):
            raise ValueError(f"{at}: rings must be {', '.join(TENSORS)}, got {len(ring)} tensors")
        named: dict[str, Any] = dict(zip(TENSORS, ring, strict=True))
        named |= {"seen": memory.seen, "rewindable": memory.rewindable}
        _check.tensors(at, **named)
        if len(rows) != 1:
            raise ValueError(f"{at}: seen must be [B], got {list(rows)}")
        _layer(spec, named, device, at)
        for name in (*(CLOCK if layer == 0 else ()), *TENSORS):
            _own_storage(
                named[name], (name, f" of layer {layer}" if several else ""), owners, where
            )


def _layer(spec: LayerSpec, named: dict[str, Tensor], device: torch.device, where: str) -> None:
    pairs, slots = named["window_keys"].dtype, named["compressed_keys"].dtype
    if slots not in slot_dtypes(pairs):
        allowed = ", ".join(map(str, slot_dtypes(pairs)))
        raise TypeError(f"{where}: compressed_keys must be one of {allowed}, got {slots}")
    shape = _shape(spec)
    rows = named["seen"].shape[0]
    sizes = {**dict.fromkeys(CLOCK, (rows,)), **shape.sizes(rows, slots)}
    for name in STATE:
        tensor, wanted = named[name], dtype_of(name, pairs, slots)
        if tensor.shape != sizes[name]:
            size, got = list(sizes[name]), list(tensor.shape)
            raise ValueError(f"{where}: {name} must be {size}, got {got}")
        numbers = name in COUNTS or wanted == torch.int8 or wanted.is_floating_point
        if tensor.dtype != wanted or not numbers:
            raise TypeError(f"{where}: {name} must be {wanted}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{where}: {name} must be on {device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{where}: {name} must be contiguous, got {tensor.stride()}")


def _own_storage(
    x: Tensor, name: tuple[str, str], owners: dict[int, tuple[str, str]], where: str
) -> None:
    """Raises where a tensor lies where another does: both would be written to."""
    try:
        place = x.data_ptr()
    except RuntimeError:  # a tensor without storage, inside of a transform
        return
    if place and owners.setdefault(place, name) != name:
        first = "".join(owners[place])
        raise ValueError(
            f"{where}: memory must have tensors of its own for every layer, got {first} as "
            f"{''.join(name)}"
        )


def widened(memory: Any) -> Any:
    """A memory with float32 where that must stay though the whole was cast: tools of
    mixed precision cast whatever tensors a module is given. Without such tensors the memory itself.
    """
    rings = getattr(memory, "rings", None)
    if not isinstance(rings, list) or all(_is_wide(ring) for ring in rings):
        return memory
    wide = [
        [
            x.to(dtype_of(name, ring[0].dtype, ring[0].dtype)) if name in WIDE else x
            for name, x in zip(TENSORS, ring, strict=True)
        ]
        for ring in rings
    ]
    return type(memory)(memory.spec, memory.seen, memory.rewindable, wide)


def _is_wide(ring: list[Tensor]) -> bool:
    """Whether nothing was cast with the pairs; float16 and bfloat16 are all that can be."""
    pairs = getattr(ring[0], "dtype", None) if len(ring) == len(TENSORS) else None
    narrow = pairs in (torch.bfloat16, torch.float16)
    return not narrow or all(ring[PLACE[name]].dtype != pairs for name in WIDE)


def same_kind(memory: Memory, other: Memory, where: str, *, device: bool = False) -> None:
    """Raises unless the tensors of `other` have the shapes and dtypes of `memory`'s, but for the
    number of rows where devices count, too (`device`: rows are put together).
    """
    for mine, held in zip(memory.rings, other.rings, strict=True):
        for name, first, second in zip(TENSORS, mine, held, strict=True):
            want, got = (_kind(x, rows=not device, device=device) for x in (first, second))
            if want != got:
                raise ValueError(f"{where}: {name} must be {want}, got {got}")


def _kind(x: Tensor, *, rows: bool, device: bool) -> str:
    size = list(x.shape) if rows else f"[B, {', '.join(map(str, x.shape[1:]))}]"
    return f"{size} {x.dtype}" + (f" on {x.device}" if device else "")
