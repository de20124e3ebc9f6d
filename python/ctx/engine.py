"""The operators of ``torch.ops.ctx`` as the library calls them, and nowhere else.

A call is planned once (:func:`plans`), each layer writes into its rings and reads them by the plan,
and the clock advances once at the end (:func:`advance`). What layers write before that stands where
nothing shows it yet, so a call that is interrupted has not happened; :func:`begin` marks the memory
where that does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ctx import _C
from ctx.settings import AttentionSettings
from ctx.state import OPEN, empty_clock, ordinary, writing

if TYPE_CHECKING:
    from ctx.memory import Memory

__all__ = [
    "Law", "Plan", "Scores", "Slots", "advance", "append", "attend", "begin",
    "evicted_groups", "law_of", "native_settings", "plans", "rotary", "step",
]  # fmt: skip


class Law(NamedTuple):
    """Settings as operators take them; their order is known to the engine alone."""

    settings: tuple[int, ...]
    numbers: tuple[float, ...]


class Scores(NamedTuple):
    """What scores are made of besides queries and keys."""

    bias: Tensor | None  # [H], of compressed slots
    slopes: Tensor | None  # [H], of ALiBi
    relative: list[Tensor]  # none, or the five of ctx.positions.Relative


#: Slots of groups: keys [B, Hkv, G, D] and values [B, Hkv, G, Dv]; where they count, their log-mass
#: [B, Hkv, G]; and where they are tokens, after a mass or a tensor [0], which ones, int64
#: [B, Hkv, G].
Slots = Sequence[Tensor]


def native_settings(
    settings: AttentionSettings, slopes: Tensor | None = None, relative: Sequence[Tensor] = ()
) -> _C.AttentionSettings:
    """The engine's own, of settings that are resolved."""
    return _C.AttentionSettings(
        settings.schedule._law,
        settings.distance,
        settings.rotary_dim or 0,
        settings.rotary_base,
        settings.rotary_interleaved,
        [*(settings.inv_freq or ())],
        settings.attention_factor,
        settings.keys == "rotated",
        settings.scale or 0.0,
        settings.slot_mass,
        settings.logit_softcap or 0.0,
        slopes,
        [*relative],
    )


def law_of(settings: AttentionSettings, compressor: str, head_dim: int, overlap: int) -> Law:
    """What operators take of resolved settings and a compressor by the engine's name.

    Raises:
        ValueError: a setting is out of range.
    """
    numbers, floats = _C.pack(native_settings(settings), compressor, head_dim, overlap)
    return Law(tuple(numbers), tuple(floats))


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
        carried: bool,
        law: Law,
    ) -> None:
        self.seen, self.rewindable, self.tokens = seen, rewindable, tokens
        self.lengths, self.reset_at = lengths, reset_at
        self.max_rewind, self.counts_attention = max_rewind, counts_attention
        #: Whether the memory that was given is written, and not a copy.
        self.in_place = in_place
        #: Whether there is a memory.
        self.carried = carried
        #: What operators take, int64 [B, columns]; `ops/plan.h` says what stands in it.
        self.tensor: Tensor = torch.ops.ctx.plan(
            seen, lengths, reset_at, tokens, law.settings, carried
        )
        #: `rewindable` before the call where :func:`begin` wrote what :func:`advance` cannot undo.
        self.before: Tensor | None = None

    @property
    def clock(self) -> tuple[Tensor, Tensor]:
        """seen and rewindable before the call."""
        return self.seen, self.rewindable

    def longer(self, law: Law) -> Plan:
        """The plan of the same call with one more token in every row, and without resets."""
        lengths = None if self.lengths is None else self.lengths + 1
        return Plan(
            self.seen, self.rewindable, self.tokens + 1, lengths, None,
            self.max_rewind, self.counts_attention, False, self.carried, law,
        )  # fmt: skip


def plans(
    layers: Sequence[Any],
    memory: Memory | None,
    x: Tensor,
    lengths: Tensor | None,
    reset_at: Tensor | None,
    update: bool,
) -> dict[tuple[int, ...], Plan]:
    """The plan of a call for each distinct schedule among `layers`
    (:class:`ctx.CompressiveAttention`), by their ``plan_key``.

    Args:
        memory: whose clock is read, and written by :func:`begin` and :func:`advance` only; None:
            new streams.
        x: tokens, or what stands for them, [B, T, ...].
        lengths, reset_at: int64 [B] and bool [B, T] or None; padding stands on the right.
        update: whether the tokens are remembered: without grad in the memory that was given.
    """
    clock = empty_clock(len(x), x.device) if memory is None else memory.clock
    carried = memory is not None
    in_place = update and carried and not torch.is_grad_enabled()
    tokens = x.shape[1]
    max_rewind = min([layer.max_rewind for layer in layers])
    counts = any(layer.counts_attention for layer in layers)
    made: dict[tuple[int, ...], Plan] = {}
    for layer in layers:
        if layer.plan_key not in made:
            made[layer.plan_key] = Plan(
                *clock, tokens, lengths, reset_at, max_rewind, counts, in_place, carried, layer.law
            )
    return made


def ends(call: Plan) -> tuple[Tensor, Tensor]:
    """seen and rewindable after a call, int64 [B] each, new tensors."""
    with ordinary(), torch.no_grad():
        seen, rewindable = call.seen.clone(), call.rewindable.clone()
        torch.ops.ctx.advance_(seen, rewindable, call.tensor, call.max_rewind)
    return seen, rewindable


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
        call.before = rewindable.clone()
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
        if call.before is None:
            torch.ops.ctx.advance_(seen, rewindable, call.tensor, call.max_rewind)
            return
        counted = seen.clone()
        torch.ops.ctx.advance_(counted, call.before, call.tensor, call.max_rewind)
        seen.copy_(counted)  # first: what is open stays so until both stand
        rewindable.copy_(call.before)


def evicted_groups(
    k: Tensor, v: Tensor, call: Plan, rings: Sequence[Tensor], law: Law
) -> tuple[Tensor, Tensor]:
    """Groups that may fall due in a call, un-rotated: keys [B, Hkv, G, overlap + c, D] and values.
    Differentiable.
    """
    made: tuple[Tensor, Tensor] = torch.ops.ctx.evicted_groups(k, v, call.tensor, rings, *law)
    return made


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Plan,
    rings: Sequence[Tensor],
    law: Law,
    operands: Sequence[Tensor],
    scores: Scores,
    region_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes a call's pairs and slots into the rings, and attends.

    Args:
        operands: the compressor's parameters; of one that is not the engine's (the law says it) the
            slots that it made.

    Returns:
        [B, H, T, Dv]; the weight of each region [B, H, T, 3], or [0]; and, where slots are tokens,
        which ones became slots, int64 [B, Hkv, G], as their places among the groups and as their
        numbers in the stream.
    """
    made: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.ctx.step_(
        q, k, v, call.tensor, rings, operands, *scores, *law, region_weights
    )
    return made


def append(
    k: Tensor,
    v: Tensor,
    call: Plan,
    rings: Sequence[Tensor],
    law: Law,
    operands: Sequence[Tensor],
) -> None:
    """Writes a call's pairs and slots into the rings."""
    torch.ops.ctx.append_(k, v, call.tensor, rings, operands, *law)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Plan,
    rings: Sequence[Tensor],
    law: Law,
    slots: Slots,
    scores: Scores,
    region_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to the rings as they lie, the call's pairs and its slots; differentiable.

    Returns:
        [B, H, T, Dv]; the log-sum-exp of every query's scores, [B, H, T]; and the weight of each
        region [B, H, T, 3], or [0].
    """
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.ctx.attend(
        q, k, v, call.tensor, rings, slots, *scores, *law, region_weights
    )
    return made


def rotary(x: Tensor, position: Tensor, law: Law) -> Tensor:
    """Keys or queries [..., n, D] rotated to positions; differentiable."""
    made: Tensor = torch.ops.ctx.rotary(x, position, *law)
    return made
