"""The law of a compressive memory as integers: which tokens a query sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ctx import _C

__all__ = [
    "SIZES", "Schedule", "Sizes", "as_sizes", "boundaries_at", "clocks_at", "first_token",
    "groups_at", "schedules_of", "slot_positions",
]  # fmt: skip

#: A size of every layer, or one for each.
Sizes = int | Sequence[int]
#: Names of the five settings, in their order.
SIZES = ("window", "compressed", "ratio", "segment", "sinks")


@dataclass(frozen=True)
class Schedule:
    """Sizes of a compressive memory; everything it holds at any moment follows from them.

    ``segment = n_s, sinks = 0`` is the Compressive Transformer (Rae et al. 2019, arXiv:1911.05507,
    section 3); ``segment = 1`` streams token by token; ``compressed = 0`` is a sliding window, with
    ``sinks`` as in StreamingLLM (Xiao et al. 2023, arXiv:2309.17453). Deviation from the paper:
    tokens that wait for their group to fill stay exact and visible, they are never padded.

    Args:
        window: exact tokens that every query is guaranteed to see behind it (*Mem*), >= 0.
        compressed: capacity of the compressive memory (*CMem*) in slots, >= 0.
        ratio: tokens that become one slot, >= 1.
        segment: eviction happens only at positions that are multiples of it, >= 1; default
            ``ratio``.
        sinks: first tokens of a stream that are kept exactly for ever, >= 0.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is not an integer.
    """

    window: int
    compressed: int
    ratio: int
    segment: int = None  # type: ignore[assignment]  # resolved to ratio below
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.segment is None:
            object.__setattr__(self, "segment", self.ratio)
        for name in SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"ctx.Schedule: {name} must be an integer, got {value!r}")
            if not -(2**63) <= (number := value.__index__()) < 2**63:
                raise ValueError(f"ctx.Schedule: {name} must fit into 64 bits, got {value}")
            object.__setattr__(self, name, number)
        _ = self._law  # validates

    @property
    def _law(self) -> _C.Schedule:
        return _C.Schedule(*self.numbers)

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """``(window, compressed, ratio, segment, sinks)``, as operators take them."""
        return (self.window, self.compressed, self.ratio, self.segment, self.sinks)

    def groups(self, t: int) -> int:
        """Groups compressed before the segment of token ``t`` began: n(t)."""
        return self._law.groups(t)

    def window_begin(self, t: int) -> int:
        """First token still held exactly in the window when token ``t`` attends: w(t)."""
        return self._law.window_begin(t)

    def slots(self, t: int) -> int:
        """Compressed slots that token ``t`` attends to: m(t)."""
        return self._law.slots(t)

    def visible(self, t: int) -> tuple[range, range, range]:
        """What token ``t`` attends to: (sink tokens, groups, window tokens)."""
        groups = self.groups(t)
        return (
            range(self._law.visible_sinks(t)),
            range(groups - self.slots(t), groups),
            range(self.window_begin(t), t + 1),
        )

    @property
    def reach(self) -> int:
        """Tokens that the memory reaches back to, exactly or compressed: A + c C + M."""
        return self._law.reach

    @property
    def max_slots(self) -> int:
        """The most a query ever attends to: A + C + M + S + c - 1."""
        return self._law.max_slots

    def resized(self, **sizes: int) -> Schedule:
        """The same schedule with other sizes, e.g. ``resized(compressed=0)``."""
        return replace(self, **sizes)


def groups_at(schedule: Schedule, t: Tensor) -> Tensor:
    """n(t) of the law for a tensor of positions; none before the first token."""
    begun = t.div(schedule.segment, rounding_mode="floor") * schedule.segment
    left = begun - schedule.sinks - schedule.window
    return left.clamp_min(0).div(schedule.ratio, rounding_mode="floor")


def boundaries_at(schedule: Schedule, seen: Tensor, tokens: int) -> Tensor:
    """Positions, after those seen, at which segments begin: all that a call of so many tokens can
    reach, [B, N].
    """
    first = (seen.div(schedule.segment, rounding_mode="floor") + 1) * schedule.segment
    number = torch.arange(-(-tokens // schedule.segment), device=seen.device)
    return first[:, None] + schedule.segment * number


def first_token(schedule: Schedule, groups: Tensor) -> Tensor:
    """The first token of each group."""
    return schedule.sinks + schedule.ratio * groups


def as_sizes(value: Any, name: str, layers: int, where: str) -> Any:
    """A list, a tuple or a NumPy array as the tuple of one size per layer; anything else as it is.

    Raises:
        ValueError: there are not as many as layers.
    """
    if hasattr(value, "__array_interface__") and value.ndim == 1:
        value = list(value)
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != layers:
        raise ValueError(
            f"{where}: {name} must be one int or num_layers = {layers} of them, got {list(value)}"
        )
    return tuple(value)


def schedules_of(layers: int, sizes: dict[str, Any]) -> tuple[Schedule, ...]:
    """The schedule of every layer, of sizes by name that are one for all or a tuple.

    Raises:
        ValueError, TypeError: what :class:`Schedule` raises, and of which layer it is.
    """
    if not any(isinstance(size, tuple) for size in sizes.values()):
        return (Schedule(**sizes),) * layers
    schedules = []
    for layer in range(layers):
        mine = {
            name: size[layer] if isinstance(size, tuple) else size for name, size in sizes.items()
        }
        try:
            schedules.append(Schedule(**mine))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} in layer {layer}") from None
    return tuple(schedules)


def clocks_at(schedule: Schedule, distance: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """To what queries of tokens t are rotated for compressed slots, and for sinks; int64."""
    if distance == "token":
        return t, t
    groups = groups_at(schedule, t)
    held = groups.clamp_max(schedule.compressed)
    since = t - first_token(schedule, groups)
    return since + groups, since + held + schedule.sinks


def slot_positions(schedule: Schedule, distance: str, groups: Tensor) -> Tensor:
    """Where the slots of groups stand, int64, or float64 for the middle between two tokens."""
    if distance == "slot":
        return groups
    return first_token(schedule, groups.to(torch.float64)) + (schedule.ratio - 1) / 2
