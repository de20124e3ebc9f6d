"""A memory as the key and value columns that attention of transformers' own reads.

That attention has one causal mask for all layers, in which every query sees all columns before the
call's own; so a call is laid out only where the law says the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctx import engine
from ctx.hf.layer_law import LayerLaw
from ctx.memory import Memory
from ctx.schedule import Schedule
from ctx.state import PLACE, slots_as

__all__ = ["check", "count", "exact", "slots"]

_INSTEAD = 'or call ctx.hf.register(); model.set_attn_implementation("ctx")'

#: Keys and values, [B, Hkv, n, D] and [B, Hkv, n, Dv].
Pairs = tuple[Tensor, Tensor]


def count(schedule: Schedule, seen: int) -> int:
    """Columns of the memory that token `seen` attends to."""
    sinks, groups, window = schedule.visible(seen)
    return min(len(sinks), seen) + len(groups) + max(seen - window.start, 0)


def check(laws: list[LayerLaw], memory: Memory, seen: int, tokens: int, where: str) -> None:
    """Raises unless every query of a call sees the same of the memory, in every layer.

    Args:
        seen: tokens before the call.
        tokens: of the call.

    Raises:
        ValueError: it does not; the message names what to change.
    """
    first = laws[0]
    schedule = first.schedule
    if any(law.schedule != schedule for law in laws):
        raise ValueError(
            f"{where}: window, compressed, ratio, segment and sinks must be one int for all "
            f"layers, {_INSTEAD}; got one per layer"
        )
    if any(law.by_usage for law in laws):
        raise ValueError(
            f"{where}: compressor must not be 'most_used', which needs the queries, {_INSTEAD}"
        )
    if not bool((memory.seen == seen).all()):
        raise ValueError(
            f"{where}: batch must not be padded, {_INSTEAD}; got rows of {memory.seen.tolist()} "
            f"tokens in {seen} columns"
        )
    last = seen + max(tokens, 1) - 1
    if schedule.groups(last) == 0:
        return
    if memory.batch_size > 1:
        raise ValueError(
            f"{where}: batch must be 1 once tokens leave the window, as padding of rows would be "
            f"compressed unseen, {_INSTEAD}; got {memory.batch_size} rows"
        )
    if schedule.groups(seen) != schedule.groups(last):
        raise ValueError(
            f"{where}: a call must not reach over an eviction, which is due at multiples of "
            f"segment = {schedule.segment}; feed fewer tokens in a call "
            f"(generate(prefill_chunk_size={schedule.segment}) of a new cache), {_INSTEAD}; "
            f"got tokens {seen} to {last} in one call"
        )
    if first.settings.slot_mass and schedule.slots(last):
        raise ValueError(
            f"{where}: slot_mass must be False, as it is added to scores, {_INSTEAD}; got True"
        )


def exact(law: LayerLaw, rings: Sequence[Tensor], seen: int) -> tuple[Pairs, Pairs]:
    """Sinks and window that token `seen` attends to, without itself; copies."""
    schedule = law.schedule
    _, groups, window = schedule.visible(seen)
    sinks = range(min(schedule.sinks, seen))
    # The query stands at t, and a sink at t - w + m + A: keys go on by the difference.
    turn = window.start - len(groups) - schedule.sinks
    return (
        _taken(law, rings, "sink", sinks, turn),
        _taken(law, rings, "window", range(window.start, max(seen, window.start)), 0),
    )


def slots(law: LayerLaw, rings: Sequence[Tensor], seen: int) -> tuple[Pairs]:
    """Slots that token `seen` attends to, once those that fell due are written; copies."""
    _, groups, window = law.schedule.visible(seen)
    return (_taken(law, rings, "compressed", groups, window.start - groups.stop),)


def _taken(
    law: LayerLaw, rings: Sequence[Tensor], region: str, positions: range, turn: int
) -> Pairs:
    """Entries of a ring, their keys rotated so that a query at its own token's number is as far
    from them as the law says.

    Args:
        positions: at which the entries stand in their region.
        turn: how much further keys are rotated under ``distance="slot"``.
    """
    keys, values = (rings[PLACE[f"{region}_{part}"]] for part in ("keys", "values"))
    capacity = max(keys.shape[2], 1)
    index = torch.tensor([at % capacity for at in positions], dtype=torch.int64, device=keys.device)
    dtype = rings[0].dtype
    k, v = (slots_as(x.index_select(2, index), dtype) for x in (keys, values))
    settings = law.settings
    if turn and len(positions) and settings.position == "rotary" and settings.distance == "slot":
        further = torch.full((k.shape[0], len(positions)), turn, device=k.device)
        k = engine.rotary(k, further, law.turning)
    return k, v
