"""A call of :class:`ctx.KVMemory` whose slots the compressor's own call makes: something acts on
that call (:attr:`ctx.compression.Compressor.in_engine`), so the engine cannot make them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctx import engine
from ctx.state import arithmetic

if TYPE_CHECKING:
    from ctx.kv_memory import KVMemory

__all__ = ["written"]


@torch.no_grad()
def written(
    memory: KVMemory,
    where: str,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    reset_at: Tensor | None,
    with_region_weights: bool = False,
) -> Any:
    """A step, or an append without ``q``; it writes to the same tensors as the engine's own."""
    settings, compressor, held = memory._settings, memory.compressor, memory.memory
    rings, device = held.rings[0], k.device
    law = engine.law_of(memory._attention, "custom", settings["head_dim"], compressor.overlap)
    tokens = k.shape[2] if k.dim() == 4 else 0
    most = settings["max_rewind"]
    try:
        plan = engine.Plan(*held.clock, tokens, lengths, reset_at, most, False, True, True, law)
        groups = engine.evicted_groups(k, v, plan, rings, law)
        slots = compressor.slots(*groups, mass=memory._attention.slot_mass)
        if q is None:
            engine.append(k, v, plan, rings, law, slots)
            out = None
        else:
            slopes = settings["alibi_slopes"]
            slopes = None if slopes is None else slopes.to(device, arithmetic(rings[0].dtype))
            relative = [] if memory.relative is None else [*memory.relative()]
            scores = engine.Scores(memory._bias_on(device), slopes, relative)
            out = engine.step(q, k, v, plan, rings, law, slots, scores, with_region_weights)[:2]
    except (ValueError, TypeError) as error:
        operator, _, rest = str(error).partition(": ")
        if operator not in ("ctx.plan", "ctx.evicted_groups", "ctx.step_", "ctx.append_"):
            raise
        raise type(error)(f"{where}: {rest}") from None
    engine.begin(plan)
    engine.advance(plan)
    return out
