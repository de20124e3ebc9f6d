"""What a fit is asked for, as one validated value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ctx import _check
from ctx.hf.budgets import schedule_of
from ctx.schedule import Schedule

__all__ = ["FitSettings", "placed_in", "placements_of"]

_WHERE = "ctx.hf.fit"
_WORDS = {"distance": ("slot", "token"), "allocation": ("equal", "measured")}


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """The settings of :func:`ctx.hf.fit` by their names there."""

    slots: int = 512
    ratio: int = 4
    sinks: int = 4
    compressor: str = "gated"
    distance: str = "slot"
    allocation: str = "equal"
    excerpts: int = 6
    validation: int = 2
    excerpt_tokens: int = 4096
    queries: int = 112
    steps: int = 60
    lr: float = 3e-2
    end_to_end: bool = False
    end_to_end_steps: int = 48
    end_to_end_tokens: int = 2048
    end_to_end_queries: int = 512
    end_to_end_lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"ratio": 2, "sinks": 0, "end_to_end_steps": 1, "seed": 0, "steps": 0}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                whole = _check.integer(value, field.name, _WHERE, least.get(field.name, 1))
                object.__setattr__(self, field.name, whole)
            elif field.type == "bool":
                _check.flag(value, field.name, _WHERE)
            elif field.type == "float":
                number = _check.number(value, field.name, _WHERE)
                if not (math.isfinite(number) and number > 0):
                    raise ValueError(f"{_WHERE}: {field.name} must be positive, got {value}")
        for name, known in _WORDS.items():
            if getattr(self, name) not in known:
                one, other = known
                got = getattr(self, name)
                raise ValueError(f"{_WHERE}: {name} must be {one!r} or {other!r}, got {got!r}")
        schedule_of(self.sizes[0], 1, self.ratio, self.sinks)
        for name in ("excerpt_tokens", "end_to_end_tokens"):
            if getattr(self, name) <= self.first_query:
                raise ValueError(
                    f"{_WHERE}: {name} must be more than slots + 8 = {self.first_query}, so that "
                    f"something is compressed, got {getattr(self, name)}"
                )

    @property
    def sizes(self) -> list[int]:
        """How many entries a layer may get: `slots`, or half, two or four times as many, but not
        more than half of an excerpt, behind which predictions are compared.
        """
        if self.allocation == "equal":
            return [self.slots]
        most = max(self.excerpt_tokens // 2, self.slots)
        return [
            x for x in (self.slots // 2, self.slots, 2 * self.slots, 4 * self.slots) if x <= most
        ]

    @property
    def first_query(self) -> int:
        """The first token whose output counts: those before it see everything exactly."""
        return self.slots + 8

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


def placements_of(settings: FitSettings) -> list[Schedule]:
    """What a layer may hold, from no slots to half of all entries, all of one ratio."""
    s, made = settings, [schedule_of(settings.slots, sinks=settings.sinks)]
    for part in (8, 4, 2):
        compressed = s.slots // part - s.sinks
        if compressed > 0 and s.sinks + compressed + s.ratio <= s.slots:
            made.append(schedule_of(s.slots, compressed, s.ratio, s.sinks))
    return made


def placed_in(slots: int, schedule: Schedule) -> Schedule:
    """A placement in other entries than it was made for, of which slots have the same share."""
    s = schedule
    if not s.compressed:
        return schedule_of(slots, sinks=s.sinks)
    compressed = (s.compressed + s.sinks) * slots // s.max_slots - s.sinks
    return schedule_of(slots, max(compressed, 1), s.ratio, s.sinks)
