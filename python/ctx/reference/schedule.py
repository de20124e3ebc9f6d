"""Which tokens a query sees: the bookkeeping of the Compressive Transformer, as plain integers.

Rae et al. 2019 (arXiv:1911.05507), section 3: at every segment boundary the oldest memories
leave the window, every `ratio` of them become one compressed memory, and the compressed memory is
itself a queue of fixed length. Deviations from the paper:

- eviction happens at absolute multiples of `segment`, whatever the size of the calls, so everything
  here depends on the token number alone (the paper evicts once per call);
- tokens whose group is not yet full wait in the window and stay exact (the paper has none: there
  the ratio divides the segment);
- the first `sinks` tokens may be kept for ever (Xiao et al. 2023, arXiv:2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The five sizes of a memory, and the integers that follow from them.

    Args:
        window: exact tokens every query is guaranteed to see behind it (M in the law), >= 0.
        compressed: capacity of the compressed memory in slots (C), >= 0.
        ratio: tokens that one slot stands for (c), >= 1.
        segment: eviction happens at multiples of this token number (S), >= 1; None means `ratio`.
        sinks: first tokens of the stream that are kept exactly for ever (A), >= 0.
    """

    window: int
    compressed: int
    ratio: int
    segment: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.segment is None:
            object.__setattr__(self, "segment", self.ratio)
        for name, least in LEAST.items():
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"ctx.Schedule: {name} must be an integer, got {number!r}")
            if number < least:
                raise ValueError(f"ctx.Schedule: {name} must be at least {least}, got {number}")

    def boundary(self, t: int) -> int:
        """First token of the segment of token t: the moment of the last eviction."""
        segment = self.segment or self.ratio
        return segment * (t // segment)

    def groups(self, t: int) -> int:
        """How many groups were compressed before the segment of token t began: n(t)."""
        evictable = self.boundary(t) - self.sinks - self.window
        return max(0, evictable // self.ratio)

    def window_begin(self, t: int) -> int:
        """First token still held exactly in the window of token t: w(t)."""
        return self.sinks + self.ratio * self.groups(t)

    def slots(self, t: int) -> int:
        """How many compressed slots are held when token t attends: m(t)."""
        return min(self.groups(t), self.compressed)

    def members(self, g: int) -> range:
        """The tokens that group g is made of."""
        first = self.sinks + self.ratio * g
        return range(first, first + self.ratio)

    def visible(self, t: int) -> tuple[range, range, range]:
        """What the query of token t attends to: sinks, groups, window tokens (itself included)."""
        sinks = range(min(self.sinks, t + 1))
        groups = range(self.groups(t) - self.slots(t), self.groups(t))
        tokens = range(self.window_begin(t), t + 1)
        return sinks, groups, tokens

    def centre(self, g: int) -> float:
        """Middle of the tokens of group g: the position of its slot under distance="token"."""
        return self.members(g)[0] + (self.ratio - 1) / 2

    def distances(self, t: int, distance: str = "slot") -> list[float]:
        """How far each visible key is from the query of token t, in the order of `visible`.

        "slot" counts keys, as the paper does (section 3: memories are concatenated and then
        numbered), so it is bounded however long the stream; "token" counts tokens.
        """
        sinks, groups, tokens = self.visible(t)
        if distance == "token":
            to_groups = [t - self.centre(g) for g in groups]
            return [*[t - j for j in sinks], *to_groups, *[t - j for j in tokens]]
        oldest_token = t - self.window_begin(t)
        oldest_slot = oldest_token + len(groups)
        to_sinks = [oldest_slot + (self.sinks - j) for j in sinks]
        to_groups = [oldest_token + (self.groups(t) - g) for g in groups]
        return [*to_sinks, *to_groups, *[t - j for j in tokens]]

    @property
    def reach(self) -> int:
        """Tokens that the memory reaches back to, exactly or compressed."""
        return self.sinks + self.ratio * self.compressed + self.window

    @property
    def max_slots(self) -> int:
        """The most keys that one query ever attends to."""
        segment = self.segment or self.ratio
        return self.sinks + self.compressed + self.window + segment + self.ratio - 1


LEAST = {"window": 0, "compressed": 0, "ratio": 1, "segment": 1, "sinks": 0}
