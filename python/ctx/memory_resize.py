"""A running memory carried over to other sizes: the function behind ctx.Memory.resized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ctx import memory_check
from ctx.schedule import Schedule
from ctx.spec import LayerSpec, Spec
from ctx.state import PLACE, RINGS, ordinary, ring_positions

if TYPE_CHECKING:
    from ctx.memory import Memory

__all__ = ["refuse_counted", "resized"]


def refuse_counted(memory: Memory, where: str) -> None:
    """Raises where slots are chosen by attention received, which depends on sizes and on what was
    read since.
    """
    if any(layer.counts_attention for layer in memory.spec.layers):
        raise ValueError(
            f"{where}: compressor must be one whose slots follow from the tokens alone, "
            'got "most_used"'
        )


def resized(memory: Memory, schedule: Schedule | Sequence[Schedule], where: str) -> Memory:
    """See :meth:`ctx.Memory.resized`."""
    refuse_counted(memory, where)
    schedules = _each(schedule, memory.layers, where)
    seen = memory.seen.tolist()
    rewindable = memory.rewindable.tolist()
    for spec, new in zip(memory.spec.layers, schedules, strict=True):
        _check_sizes(spec.schedule, new, seen, where)
        rewindable = [
            _agreeing(spec.schedule, new, count, most)
            for count, most in zip(seen, rewindable, strict=True)
        ]
    specs = [spec.rescheduled(new) for spec, new in zip(memory.spec.layers, schedules, strict=True)]
    rings = [
        _layer(spec, made, ring, memory.seen)
        for spec, made, ring in zip(memory.spec.layers, specs, memory.rings, strict=True)
    ]
    with ordinary():
        clock = memory.seen.clone(), memory.seen.new_tensor(rewindable)
    return type(memory)(Spec(tuple(specs)), *clock, rings)


def _layer(old: LayerSpec, new: LayerSpec, held: list[Tensor], seen: Tensor) -> list[Tensor]:
    keys, slots = held[PLACE["window_keys"]], held[PLACE["compressed_keys"]]
    made = memory_check.zeros(new, len(keys), keys.dtype, keys.device, slots.dtype)
    groups = seen.new_tensor([old.schedule.groups(count - 1) for count in seen.tolist()])
    newest = {"window": seen - 1, "compressed": groups - 1}
    oldest = {"window": old.sinks, "compressed": 0}
    with ordinary():
        for name in ("sink_keys", "sink_values"):
            made[PLACE[name]].copy_(held[PLACE[name]])
        for region, names in RINGS.items():
            for place in map(PLACE.__getitem__, names):
                _refill(made[place], held[place], newest[region], oldest[region])
    return made


def _check_sizes(old: Schedule, new: Schedule, seen: list[int], where: str) -> None:
    for name in ("ratio", "segment", "sinks"):
        was, asked = getattr(old, name), getattr(new, name)
        if asked != was:
            raise ValueError(f"{where}: {name} must stay as it is = {was}, got {asked}")
    for row, count in enumerate(seen):
        made, asked = old.groups(count - 1), new.groups(count - 1)
        if asked != made:
            raise ValueError(
                f"{where}: window must leave {made} groups compressed, as there are in row {row}, "
                f"got {new.window}, which makes them {asked}"
            )
        if made > old.compressed < new.compressed:
            raise ValueError(
                f"{where}: compressed must be at most {old.compressed} in row {row}, which has "
                f"dropped all but that many of {made} slots, got {new.compressed}"
            )


def _agreeing(old: Schedule, new: Schedule, seen: int, most: int) -> int:
    """How many tokens can be taken back so that both schedules have the same groups throughout."""
    for count in range(1, most + 1):
        if old.groups(seen - 1 - count) != new.groups(seen - 1 - count):
            return count - 1
    return most


def _refill(ring: Tensor, source: Tensor, newest: Tensor, oldest: int) -> None:
    """Fills a ring with what another ring of other capacity holds of the same positions."""
    capacity = source.shape[2]
    if ring.shape[2] == 0 or capacity == 0:
        return
    positions = ring_positions(newest, ring.shape[2])
    held = (positions >= oldest) & (positions > newest[:, None] - capacity)
    wide = (len(ring), 1, ring.shape[2], *[1] * (ring.dim() - 3))
    index = positions.remainder(capacity).reshape(wide).expand_as(ring)
    ring.copy_(source.gather(2, index).masked_fill(held.logical_not().reshape(wide), 0))


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
