"""One segment of a training sequence over a full memory: ours, and torch's attention on the same.

Segment, window and compressed slots are equally many, so a segment's queries see all compressed
slots, all of the window and the segment itself, causally.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ctx
from benchmarks._memories import fill, visible
from ctx.engine import law_of
from ctx.state import TENSORS

__all__ = ["Segment"]


class Segment:
    """Inputs of one segment in the middle of a stream.

    Args:
        size: tokens of the segment, the window, and compressed slots, each.
        heads, head_dim, batch: of the queries; as many key/value heads.
        dtype: of everything.
        rotary: keys and queries are rotated; torch gets them as if they had been already.
        device: where all of it is.
    """

    ratio = 4

    def __init__(
        self,
        size: int,
        heads: int = 8,
        head_dim: int = 64,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        rotary: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, heads, size, head_dim)
        self.schedule = ctx.Schedule(size, size, self.ratio, size)
        self.seen = seen = 2 * size * self.ratio
        place = {"dtype": dtype, "device": device}
        empty = ctx.KVMemory(self.schedule, batch, heads, head_dim, max_rewind=size, **place)
        state = fill(empty.tensors, seen)
        self.memory = [state[name] for name in TENSORS]
        self.q, self.k, self.v = (torch.randn(shape).to(**place) for _ in range(3))
        self.grad = torch.randn(shape).to(**place)
        settings = ctx.AttentionSettings(
            schedule=self.schedule, position="rotary" if rotary else None
        )
        self.law = law_of(settings.resolved(head_dim), "mean", head_dim, 0)
        self.plan = torch.ops.ctx.plan(state["seen"], None, None, size, self.law.settings, True)
        keys, values = torch.ops.ctx.evicted_groups(
            self.k, self.v, self.plan, self.memory, *self.law
        )
        self.slots = [part.mean(3).contiguous() for part in (keys, values)]
        # The same for torch, laid out as one would wish.
        self.past = [torch.randn(batch, heads, 2 * size, head_dim).to(**place) for _ in range(2)]
        mask = torch.ones(size, 3 * size, dtype=torch.bool)
        mask[:, 2 * size :].tril_()
        self.mask = mask.to(device)
        self.pairs = sum(visible(self.schedule, t) for t in range(seen, seen + size))
        assert self.pairs == int(mask.sum())
        self.all_pairs = mask.numel()

    def requires_grad(self) -> Segment:
        for part in (self.q, self.k, self.v, *self.slots):
            part.requires_grad_()
        return self

    def ours(self) -> Tensor:
        """From the rings, the new pairs and the new slots: as `ctx.CompressiveAttention` does."""
        out: Tensor = torch.ops.ctx.attend(
            self.q,
            self.k,
            self.v,
            self.plan,
            self.memory,
            self.slots,
            None,
            None,
            [],
            *self.law,
            False,
        )[0]
        return out

    def theirs(self) -> Tensor:
        """The same from the same parts: cat, mask, SDPA."""
        keys, values = (
            torch.cat([past, new], 2) for past, new in zip(self.past, (self.k, self.v), strict=True)
        )
        return F.scaled_dot_product_attention(self.q, keys, values, self.mask)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, one tensor each, for SDPA alone."""
        return tuple(  # type: ignore[return-value]
            torch.cat([past, new.detach()], 2).requires_grad_(new.requires_grad)
            for past, new in zip(self.past, (self.k, self.v), strict=True)
        )

    def forwards(self) -> dict[str, tuple[Callable[[], Tensor], int]]:
        """{name: (call, pairs of a query and a slot that it computes)}."""
        keys, values = self.joined()

        def every() -> Tensor:
            return F.scaled_dot_product_attention(self.q, keys, values)

        def masked() -> Tensor:
            return F.scaled_dot_product_attention(self.q, keys, values, self.mask)

        return {
            "ctx": (self.ours, self.pairs),
            "sdpa, no mask": (every, self.all_pairs),
            "sdpa, mask": (masked, self.pairs),
        }

    def steps(self) -> dict[str, tuple[Callable[[], object], int]]:
        """The same, and the gradients that `backwards` asks for, in one call."""
        keys, values = self.joined()
        own = [self.q, self.k, self.v, *self.slots]
        sources = {"ctx": own}

        def both(name: str, forward: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(forward(), sources.get(name, joined), self.grad)

        joined = [self.q, keys, values]

        def every() -> Tensor:
            return F.scaled_dot_product_attention(self.q, keys, values)

        def masked() -> Tensor:
            return F.scaled_dot_product_attention(self.q, keys, values, self.mask)

        return {
            "ctx": (both("ctx", self.ours), self.pairs),
            "sdpa, no mask": (both("", every), self.all_pairs),
            "sdpa, mask": (both("", masked), self.pairs),
        }

    def backwards(self) -> dict[str, tuple[Callable[[], object], int]]:
        """The same for the gradients of queries, and of keys and values that are not constant."""
        keys, values = self.joined()
        sources = {
            "ctx": [self.q, self.k, self.v, *self.slots],
            "sdpa, no mask": [self.q, keys, values],
            "sdpa, mask": [self.q, keys, values],
        }
        outs = {
            "ctx": self.ours(),
            "sdpa, no mask": F.scaled_dot_product_attention(self.q, keys, values),
            "sdpa, mask": F.scaled_dot_product_attention(self.q, keys, values, self.mask),
        }

        def gradients(name: str) -> Callable[[], object]:
            out, inputs = outs[name], sources[name]
            return lambda: torch.autograd.grad(out, inputs, self.grad, retain_graph=True)

        pairs = {"ctx": self.pairs, "sdpa, no mask": self.all_pairs, "sdpa, mask": self.pairs}
        return {name: (gradients(name), pairs[name]) for name in outs}
