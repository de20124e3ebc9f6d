"""The three ways in which a layer computes a call: streaming into the rings, differentiably over
rings that stay as they are, and over remembered layer inputs. All give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ctx import engine
from ctx.compression import MostUsed
from ctx.engine import Plan
from ctx.hidden import pairs_of
from ctx.losses import attention_reconstruction, auto_encoding, evictions

if TYPE_CHECKING:
    from ctx.attention import CompressiveAttention

__all__ = ["Call", "auxiliary", "differentiable", "projecting", "streaming", "streams"]

# Output [B, H, T, Dv], region weights [B, H, T, 3] or [0], and the rings after the call; none where
# nothing is remembered.
Result = tuple[Tensor, Tensor, list[Tensor] | None]


class Call(NamedTuple):
    """What a call says besides its tokens."""

    plan: Plan
    rings: list[Tensor] | None  # of the layer's memory; None: an empty one
    update: bool  # whether the tokens are remembered
    in_place: bool  # whether that is in `rings` themselves
    region_weights: bool


def _past(call: Call) -> Sequence[Tensor]:
    """The rings as the engine reads them."""
    return call.rings or ()


def is_forward_mode() -> bool:
    """Whether derivatives are computed along with values (torch.autograd.forward_ad,
    torch.func.jvp): operators that write into a memory have none.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch.autograd.forward_ad._current_level >= 0)


def streams(layer: CompressiveAttention, call: Call) -> bool:
    """Whether a memory of pairs is streamed into, or else read where it lies.

    A call that does not write is read like one under grad, but where the numbers depend on the
    writing: slots chosen by attention received, or rounded to a dtype of their own. These write a
    copy.
    """
    if torch.is_grad_enabled() or is_forward_mode():
        return False
    if call.update:
        return True
    rounded = call.rings is not None and call.rings[2].dtype != call.rings[0].dtype
    return layer.compressor.by_usage or rounded


def auxiliary(layer: CompressiveAttention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """The auxiliary loss of a call, a scalar."""
    law = layer.stored_law
    evicted = evictions(q, k, v, call.plan, _past(call), layer.schedule, law)
    if layer.aux_loss == "autoencoding":
        return auto_encoding(evicted, layer.compressor, layer.decoder)
    project = None
    if layer.memory_content == "hidden":
        project = partial(layer.constant_pairs, dtype=q.dtype)
    return attention_reconstruction(evicted, layer.compressor, project=project)


def _filled(layer: CompressiveAttention, call: Call, stored: Tensor) -> list[Tensor]:
    """The rings that a call is going to write: the ones given or their copy, or empty ones."""
    if call.rings is None:
        return layer.state_shape.zeros(stored.shape[0], stored.dtype, stored.device)
    return call.rings if call.in_place else [x.clone() for x in call.rings]


def streaming(layer: CompressiveAttention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """A call that writes into the rings and then reads them."""
    rings, law, plan, compressor = _filled(layer, call, k), layer.law, call.plan, layer.compressor
    operands: Sequence[Tensor]
    if compressor.in_engine:
        operands = [x.detach() for x in compressor.operands()]
    else:  # its call makes the slots
        law = layer.custom_law
        groups = engine.evicted_groups(k, v, plan, rings, law)
        operands = compressor.slots(*groups, mass=layer.slot_mass)
    scores = layer.scores(q.device)
    out, weights, *_ = engine.step(q, k, v, plan, rings, law, operands, scores, call.region_weights)
    return out, weights, rings if call.update else call.rings


def differentiable(
    layer: CompressiveAttention, q: Tensor, k: Tensor, v: Tensor, call: Call
) -> Result:
    """A call that reads the rings where they lie, and then writes into a copy of them."""
    law, plan, chooses = layer.law, call.plan, layer.compressor.by_usage
    keys, values = engine.evicted_groups(k, v, plan, _past(call), law)
    rings: list[Tensor] = []
    if call.update or chooses:
        with torch.no_grad():
            rings = _filled(layer, call._replace(in_place=False), k)
    scores = layer.scores(q.device)
    slots: tuple[Tensor, ...]
    if chooses:  # what stays is what streaming keeps
        with torch.no_grad():
            tokens, operands = [x.detach() for x in (q, k, v)], engine.Scores(*_detached(scores))
            *_, chosen, positions = engine.step(
                tokens[0], tokens[1], tokens[2], plan, rings, law, (), operands, False
            )
        mass = keys.new_zeros(keys.shape[:3]) if layer.slot_mass else keys.new_zeros(0)
        slots = (MostUsed.take(keys, chosen), MostUsed.take(values, chosen), mass, positions)
    else:
        slots = layer.compressor.slots(keys, values, mass=layer.slot_mass)
    constants = [x.detach() for x in slots]
    attended = constants if layer.compressor_grad == "aux" else slots
    out, _, weights = engine.attend(
        q, k, v, plan, _past(call), law, attended, scores, call.region_weights
    )
    if not call.update:
        return out, weights, call.rings
    with torch.no_grad():
        if not chooses:  # which has written, too
            engine.append(k.detach(), v.detach(), plan, rings, layer.custom_law, constants)
        if not call.in_place or call.rings is None:
            return out, weights, rings
        for held, new in zip(call.rings, rings, strict=True):  # forward mode without grad
            held.copy_(new)
    return out, weights, call.rings


def projecting(
    layer: CompressiveAttention,
    q: Tensor,
    hidden: Tensor,  # [B, 1, T, E], as stored
    none: Tensor,  # [B, 1, T, 0]
    call: Call,
    dtype: torch.dtype,
) -> Result:
    """A call over a memory of inputs, under grad and without."""

    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer.pairs(x.to(dtype))

    law, plan = layer.stored_law, call.plan
    groups = engine.evicted_groups(hidden, none, plan, _past(call), law)
    slots = layer.compressor.slots(*groups, mass=layer.slot_mass)
    made = [slot.detach() for slot in slots]
    if layer.compressor_grad == "aux":
        slots = tuple(made)
    past: Sequence[Tensor] = ()
    if call.rings is not None:
        past = pairs_of(call.rings, plan.seen, layer, project)
    # A slot is rounded as the memory will, so that it never matters which call made it.
    masses = [x.expand(-1, layer.num_kv_heads, -1) for x in slots[2:]]  # one for all heads
    slots = (*project(slots[0].to(hidden.dtype)), *masses)
    scores = layer.scores(q.device)
    out, _, weights = engine.attend(
        q, *project(hidden), plan, past, layer.law, slots, scores, call.region_weights
    )
    if not call.update:
        return out, weights, call.rings
    with torch.no_grad():
        rings = _filled(layer, call, hidden)
        engine.append(hidden.detach(), none.detach(), plan, rings, law, made)
    return out, weights, rings


def _detached(operands: Sequence[Any]) -> list[Any]:
    """The operands of an operator with their tensors detached, those in lists, too: without
    tangents of forward mode, which torch.no_grad leaves.
    """
    return [
        x.detach() if isinstance(x, Tensor) else _detached(x) if isinstance(x, list) else x
        for x in operands
    ]
