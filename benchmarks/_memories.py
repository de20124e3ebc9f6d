"""Full memories without streaming into them for minutes, and what an expert would write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ctx
from ctx.state import TENSORS

__all__ = ["CatLoop", "as_int8", "fill", "full_memory", "sdpa_ways", "visible"]


def fill(state: dict[str, Any], seen: int) -> dict[str, Any]:
    """A memory's state as after `seen` tokens, with random keys and values."""
    filled = {
        name: torch.randn(part.shape, device=part.device).to(part.dtype)
        if name in TENSORS and part.is_floating_point()
        else part
        for name, part in state.items()
    }
    filled["seen"] = torch.full_like(state["seen"], seen)
    filled["rewindable"] = torch.ones_like(state["rewindable"])
    return filled


def as_int8(x: Tensor) -> Tensor:
    """Rows [..., width] as int8 slots are stored: multiples of a scale, and the scale behind."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    steps = (x / scale).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([steps, scale.view(torch.int8)], -1)


def full_memory(
    schedule: ctx.Schedule, kv_heads: int, head_dim: int, *, batch: int = 1, **options: Any
) -> ctx.KVMemory:
    """A memory in which every slot is in use, at the first token of a segment."""
    memory = ctx.KVMemory(schedule, batch, kv_heads, head_dim, **options)
    seen = schedule.segment * -(-2 * schedule.reach // schedule.segment) + 1
    memory.load_state_dict(fill(memory.state_dict(), seen))
    return memory


def visible(schedule: ctx.Schedule, t: int) -> int:
    """Slots and tokens that the query of token t sees."""
    return min(schedule.sinks, t + 1) + schedule.slots(t) + t - schedule.window_begin(t) + 1


def sdpa_ways(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """One decode query over the same slots, in each way that torch's own attention offers.

    Args:
        q: [B, H, 1, D].
        k: [B, Hkv, S, D], contiguous.
        v: [B, Hkv, S, Dv].
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = heads != kv_heads

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    def math() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    ways = {"sdpa": plain, "sdpa math": math}
    if grouped:
        # One query per head and nothing masked: the heads of a group are as good as a sequence.
        folded = q.view(q.shape[0], kv_heads, heads // kv_heads, q.shape[3])

        def as_sequence() -> Tensor:
            return F.scaled_dot_product_attention(folded, k, v)

        def repeated() -> Tensor:
            more = [x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)]
            return F.scaled_dot_product_attention(q, *more)

        ways["sdpa folded"] = as_sequence
        ways["sdpa repeated"] = repeated
    return ways


class CatLoop:
    """The loop that everyone writes: cat the new pair, keep the last S, attend.

    No rotation and no compression: less work than a memory does.
    """

    def __init__(self, kv_heads: int, slots: int, head_dim: int, dtype: torch.dtype) -> None:
        self.slots = slots
        self.keys = torch.randn(1, kv_heads, slots, head_dim).to(dtype)
        self.values = torch.randn(1, kv_heads, slots, head_dim).to(dtype)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys = torch.cat([self.keys, k], 2)[:, :, -self.slots :]
        self.values = torch.cat([self.values, v], 2)[:, :, -self.slots :]
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=grouped)
