"""What must hold of a memory's tensors, checked before a call writes to one of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctx import _C, _check
from ctx.spec import Spec
from ctx.state import PLACE, TENSORS, WIDE, dtype_of

if TYPE_CHECKING:
    from ctx.memory import Memory

__all__ = ["call", "kind", "shapes", "tensors", "whole", "widened", "written"]


@functools.lru_cache(maxsize=256)
def shapes(spec: Spec) -> list[_C.LayerShape]:
    """The shapes of each layer's tensors."""
    made = []
    for x in spec.layers:
        sizes = (x.overlap, x.kv_heads, x.head_dim, x.value_dim, x.max_rewind)
        law = x.schedule._law
        made.append(_C.LayerShape(law, *sizes, x.counts_attention, x.slot_mass))
    return made


def call(memory: Any, spec: Spec, rows: int, device: torch.device, where: str, of: str) -> None:
    """Raises unless `memory` is one of `spec`, with the rows and device of input `of`, and whole.

    Shapes and dtypes of its tensors are read once per memory; the operators check them again.

    Raises:
        ValueError, TypeError: the message begins with `where` and names what does not fit.
    """
    kind(memory, spec, where)
    whole(memory, where)
    seen = memory.seen
    if seen.shape[0] != rows:
        raise ValueError(
            f"{where}: {of} must have as many rows as memory = {seen.shape[0]}, got {rows}"
        )
    if seen.device != device:
        raise ValueError(f"{where}: memory must be on {device} as {of}, got {seen.device}")
    if device.type == "cpu":  # a device is never waited for
        _C.check_clock(seen, memory.rewindable, where)


def kind(memory: Any, spec: Spec, where: str) -> None:
    """Raises unless `memory` is a memory of `spec`; reads no tensor, so it holds in graphs."""
    if type(memory).__name__ != "Memory" or not hasattr(memory, "spec"):
        got = type(memory).__name__
        raise TypeError(f"{where}: memory must be a ctx.Memory or None, got {got}")
    spec.check(memory.spec, where)


def whole(memory: Any, where: str) -> None:
    """Raises unless it is a memory with the tensors that its spec says."""
    if not hasattr(memory, "_checked") or not hasattr(memory, "rings"):
        raise TypeError(f"{where}: memory must be a ctx.Memory, got {type(memory).__name__}")
    if not memory._checked:
        tensors(memory, where)
        memory._checked = True


def tensors(memory: Memory, where: str) -> None:
    """Raises unless all tensors have the shapes of the spec, one device, and fitting dtypes, and
    none stands in two places.
    """
    _check.tensors(where, seen=memory.seen, rewindable=memory.rewindable)
    layers, got = len(memory.spec.layers), len(memory.rings)
    if got != layers:
        raise ValueError(f"{where}: memory must have {layers} layers, got {got}")
    for layer, ring in enumerate(memory.rings):
        at = f"{where}: memory[{layer}]" if layers > 1 else where
        if len(ring) != len(TENSORS):
            raise ValueError(f"{at}: rings must be {', '.join(TENSORS)}, got {len(ring)} tensors")
        named: dict[str, Any] = dict(zip(TENSORS, ring, strict=True))
        _check.tensors(at, **named)
    flat = [x for ring in memory.rings for x in ring]
    _C.check_state([*flat, memory.seen, memory.rewindable], shapes(memory.spec), where)


def widened(memory: Any) -> Any:
    """A memory with float32 where that must stay though the whole was cast: tools of
    mixed precision cast whatever tensors a module is given. Without such tensors the memory itself,
    and anything else as it is.
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


def written(passed: Memory | None, memory: Memory | None, in_place: bool) -> Memory | None:
    """The memory that a call writes: in place the one passed, with the tensors of `memory`, which
    :func:`widened` made of it.
    """
    if not in_place or memory is passed or memory is None or passed is None:
        return memory
    for mine, wide in zip(passed.rings, memory.rings, strict=True):
        mine[:] = wide
    return passed


def _is_wide(ring: list[Tensor]) -> bool:
    """Whether nothing was cast with the pairs; float16 and bfloat16 are all that can be."""
    pairs = getattr(ring[0], "dtype", None) if len(ring) == len(TENSORS) else None
    narrow = pairs in (torch.bfloat16, torch.float16)
    return not narrow or all(ring[PLACE[name]].dtype != pairs for name in WIDE)
