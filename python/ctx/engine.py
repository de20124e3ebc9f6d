"""The operators of ``torch.ops.ctx`` as the library calls them, and nowhere else.

A call is planned once (:func:`plans`), each layer writes into its rings and reads them by the plan,
and the clock advances once at the end (:func:`advance`). What layers write before that stands where
nothing shows it yet, so a call that is interrupted has not happened; :func:`begin` marks the memory
where that does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctx.state import OPEN, ordinary, writing

__all__ = [
    "Law", "Plan", "Scores", "advance", "append", "attend", "begin", "choose", "evicted_groups",
    "plans", "rotary", "step",
]  # fmt: skip


class Law(NamedTuple):
    """What decides where tokens are stored and how far they are: constants of a layer."""

    schedule: tuple[int, ...]  # window, compressed, ratio, segment, sinks, overlap
    distance: str
    rotary_dim: int
    rotary_base: float
    rotary_interleaved: bool


class Scores(NamedTuple):
    """What scores are made of besides queries and keys."""

    bias: Tensor | None  # [H], of compressed slots
    slopes: Tensor | None  # [H], of ALiBi
    relative: list[Tensor]  # none, or the five of ctx.positions.Relative
    scale: float


class Plan:
    """Where the tokens of one call stand in the streams of its rows, the same for every layer.

    Not a tuple: modules that cast or move what they are given leave it as it is.
    """

    def __init__(
        self,
        seen: Tensor,  # int64 [B], before the call
        rewindable: Tensor,
        tokens: int,
        lengths: Tensor | None,  # int64 [B]
        reset_at: Tensor | None,  # bool [B, T]
        max_rewind: int,
        counts_attention: bool,
        in_place: bool,
    ) -> None:
        self.seen, self.rewindable, self.tokens = seen, rewindable, tokens
        self.lengths, self.reset_at = lengths, reset_at
        self.max_rewind, self.counts_attention = max_rewind, counts_attention
        #: Whether the memory that was given is written, and not a copy.
        self.in_place = in_place
        #: (seen, rewindable) after the call where :func:`begin` had to work them out.
        self.after: tuple[Tensor, Tensor] | None = None

    @property
    def clock(self) -> tuple[Tensor, Tensor]:
        """seen and rewindable before the call."""
        return self.seen, self.rewindable

    def longer(self) -> Plan:
        """The plan of the same call with one more token in every row, and without resets."""
        lengths = None if self.lengths is None else self.lengths + 1
        return Plan(
            self.seen, self.rewindable, self.tokens + 1, lengths, None,
            self.max_rewind, self.counts_attention, in_place=False,
        )  # fmt: skip


def plans(
    layers: Sequence[Any],
    clock: tuple[Tensor, Tensor],
    tokens: int,
    lengths: Tensor | None,
    reset_at: Tensor | None,
    in_place: bool,
) -> dict[Law, Plan]:
    """The plan of a call for each law among `layers` (:class:`ctx.CompressiveAttention`).

    Args:
        clock: seen and rewindable, int64 [B]; read, and written by :func:`begin` and
            :func:`advance` only.
        tokens: T.
        lengths, reset_at: int64 [B] and bool [B, T] or None; padding stands on the right.
        in_place: whether the memory that was given is written.
    """
    if lengths is not None:
        lengths = lengths.clone()  # a memory's own counter changes before the next layer
    max_rewind = min(layer.max_rewind for layer in layers)
    counts = any(layer.compressor.by_usage for layer in layers)
    made: dict[Law, Plan] = {}
    for layer in layers:
        if layer.law not in made:
            made[layer.law] = Plan(*clock, tokens, lengths, reset_at, max_rewind, counts, in_place)
    return made


def ends(call: Plan) -> tuple[Tensor, Tensor]:
    """seen and rewindable after a call, int64 [B] each, new tensors."""
    with ordinary():
        return _ends(call)


def _ends(call: Plan) -> tuple[Tensor, Tensor]:
    count: Any = call.tokens if call.lengths is None else call.lengths
    seen, rewindable = call.seen + count, call.rewindable + count
    if call.reset_at is not None and call.tokens:
        column = torch.arange(call.tokens, device=seen.device)
        inside = (
            call.reset_at
            if call.lengths is None
            else (call.reset_at & (column < call.lengths[:, None]))
        )
        begins = inside.any(1)
        since = count - torch.where(inside, column, 0).amax(1)
        seen = torch.where(begins, since, seen)
        rewindable = torch.where(begins, since, rewindable)
    return seen, rewindable.clamp_max(call.max_rewind)


def begin(call: Plan) -> None:
    """Says in the clock, before a ring is written, what an interrupted call would leave.

    Entries that could be rewound to are going to be overwritten, so `rewindable` is lowered; rows
    in which visible entries are going to be, become open.
    """
    rewindable = call.rewindable
    with writing(rewindable):
        if (
            call.lengths is None
            and call.reset_at is None
            and call.tokens <= call.max_rewind
            and not call.counts_attention
        ):
            rewindable.clamp_max_(call.max_rewind - call.tokens)
            return
        call.after = ends(call)
        count = call.lengths
        if count is None:
            count = torch.full_like(rewindable, call.tokens)
        opened = count > call.max_rewind
        if call.counts_attention:
            opened = opened | (count > 0)
        if call.reset_at is not None:
            opened = opened | call.reset_at.any(1)
        left = torch.minimum(rewindable, call.max_rewind - count)
        rewindable.copy_(torch.where(opened, OPEN, left))


def advance(call: Plan) -> None:
    """Counts the call's tokens, in place, once every layer has written."""
    seen, rewindable = call.clock
    with writing(seen):
        if call.after is None:
            seen.add_(call.tokens)
            rewindable.add_(call.tokens)
        else:
            seen.copy_(call.after[0])
            rewindable.copy_(call.after[1])


def _state(call: Plan, rings: Sequence[Tensor]) -> list[Tensor]:
    """A layer's rings as operators take them today: with counters of their own, which they
    advance. No rings, no memory.
    """
    if not rings:
        return []
    return [*rings[:6], call.seen.clone(), call.seen.clone(), *rings[6:]]


def evicted_groups(
    k: Tensor, v: Tensor, call: Plan, rings: Sequence[Tensor], law: Law
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups that fall due in a call, un-rotated: keys [B, Hkv, G, overlap + c, D], values, and the
    index of each row's first, int64 [B]. Differentiable.
    """
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.ctx.evicted_groups(
        k, v, call.lengths, call.reset_at, _state(call, rings), *law
    )
    return made


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Plan,
    rings: Sequence[Tensor],
    law: Law,
    slots: tuple[list[Tensor], str, list[Tensor]],
    scores: Scores,
    region_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Writes a call's pairs and slots into the rings, and attends: [B, H, T, Dv], and the weight of
    each region [B, H, T, 3] where asked for. `slots`: the compressor's parameters and name, and
    what its call made.
    """
    bias, slopes, relative, scale = scores
    made: tuple[Tensor, Tensor] = torch.ops.ctx.step_(
        q, k, v, call.lengths, call.reset_at, *_state(call, rings), *slots,
        bias, slopes, relative, *law, scale, region_weights,
    )  # fmt: skip
    return made


def append(
    k: Tensor,
    v: Tensor,
    call: Plan,
    rings: Sequence[Tensor],
    law: Law,
    slots: tuple[list[Tensor], str, list[Tensor]],
) -> None:
    """Writes a call's pairs and slots into the rings."""
    torch.ops.ctx.append_(k, v, call.lengths, call.reset_at, *_state(call, rings), *slots, *law)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Plan,
    rings: Sequence[Tensor],
    law: Law,
    scores: Scores,
    block: Tensor,
    slots: int,
) -> tuple[Tensor, Tensor]:
    """:func:`step` with the compressor "most_used"; returns which tokens became slots, int64
    [B, Hkv, slots], as their places among the groups and as their numbers in the stream.
    """
    bias, slopes, relative, scale = scores
    made: tuple[Tensor, Tensor] = torch.ops.ctx.choose_(
        q, k, v, call.lengths, call.reset_at, *_state(call, rings), bias, slopes, relative, *law,
        scale, block, slots,
    )  # fmt: skip
    return made


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Plan,
    rings: Sequence[Tensor],
    law: Law,
    slots: tuple[Tensor, Tensor, Tensor | None],
    scores: Scores,
    region_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Attention to the rings as they lie, the call's pairs and its slots; differentiable. `slots`:
    keys, values, and positions where they were chosen. Returns what :func:`step` does.
    """
    bias, slopes, relative, scale = scores
    made: tuple[Tensor, Tensor] = torch.ops.ctx.attend_sequence(
        q, k, v, call.lengths, call.reset_at, _state(call, rings), *slots,
        bias, slopes, relative, *law, scale, region_weights,
    )  # fmt: skip
    return made


def rotary(x: Tensor, position: Tensor, law: Law) -> Tensor:
    """Keys or queries [..., n, D] rotated to positions; differentiable."""
    made: Tensor = torch.ops.ctx.rotary(
        x, position, law.rotary_dim, law.rotary_base, law.rotary_interleaved
    )
    return made
