"""Sizes that fit a number of slots."""

from __future__ import annotations

from ctx import _check
from ctx.schedule import Schedule

__all__ = ["schedule_of"]

_WHERE = "ctx.hf.budgets.schedule_of"


def schedule_of(
    slots: int, compressed: int = 0, ratio: int = 1, sinks: int = 4, segment: int = 1
) -> Schedule:
    """The schedule with the largest window of which no query ever attends to more than `slots`.

    Everything that is visible counts: sinks, slots, the window, and tokens that wait for their
    group to fill (:attr:`ctx.Schedule.max_slots`). With ``segment=1`` the fewest wait.

    Args:
        slots: the budget, >= what the other sizes need.
        compressed, ratio, sinks, segment: as in :class:`ctx.Schedule`.

    Raises:
        ValueError, TypeError: a size is out of range, or the others leave no room for a window.
    """
    slots = _check.integer(slots, "slots", _WHERE, 1)
    least = Schedule(0, compressed, ratio, segment, sinks)
    window = slots - least.max_slots
    if window < 0:
        raise ValueError(
            f"{_WHERE}: slots must be at least {least.max_slots}, which the other sizes need "
            f"without a window, got {slots}"
        )
    return least.resized(window=window)
