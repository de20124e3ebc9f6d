"""A layer's compressor, fitted to what the full cache makes of the same queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ctx import engine
from ctx.compression import MostUsed
from ctx.hf.fitting.recording import Recorded
from ctx.hf.layer_law import LayerLaw
from ctx.memory import Memory
from ctx.schedule import clocks_at, first_token, groups_at, slot_positions
from ctx.spec import Spec

__all__ = ["LayerProblem", "error_of", "fit_layer", "problems_of"]

#: Added to the scores of what is not visible.
_HIDDEN = -1e30


class _Part(NamedTuple):
    """Attention to some of what queries see: output [H, Q, Dv], and the logarithm of the sum of
    exponentials [H, Q].
    """

    out: Tensor
    total: Tensor

    def with_(self, other: _Part) -> _Part:
        """Attention to both, in one softmax."""
        share = torch.sigmoid(other.total - self.total)[..., None]
        total = torch.logaddexp(self.total, other.total)
        return _Part(torch.lerp(self.out, other.out, share), total)


class LayerProblem:
    """One layer and one excerpt under one law: everything that parameters do not change.

    Args:
        law: measured; its compressor and bias are what :meth:`error` depends on.
        recorded: of the layer.
        queries: int64 [Q], positions of the excerpt's queries.
        excerpt: its number.
    """

    def __init__(self, law: LayerLaw, recorded: Recorded, queries: Tensor, excerpt: int) -> None:
        self.law, self.recorded = law, recorded
        self.keys, self.values = (x[excerpt].float() for x in (recorded.keys, recorded.values))
        device, schedule, distance = self.keys.device, law.schedule, law.settings.distance
        self.t = queries.to(device)
        self.weight = recorded.weight.float()
        self.wanted = self._seen_through(recorded.out[excerpt].float())
        self.size = self.wanted.square().sum()
        q = self._turned(recorded.q[excerpt].float(), -self.t, unrotate=True)
        to_slots, to_sinks = clocks_at(schedule, distance, self.t)
        self.exact = self._window(self._turned(q, self.t))
        if schedule.sinks:
            self.exact = self.exact.with_(self._sinks(self._turned(q, to_sinks)))
        if not schedule.compressed:
            return
        place = torch.arange(self.keys.shape[1], device=device)
        self.plan = engine.plans([law], None, place[None], None, None, False)[law.plan_key]
        pairs = (self.keys[None], self.values[None])
        self.groups = engine.evicted_groups(*pairs, self.plan, (), law.law)
        number = torch.arange(self.groups[0].shape[2], device=device)
        self.positions = slot_positions(schedule, distance, number)
        self.taken: tuple[Tensor, Tensor] | None = None
        if law.by_usage:
            assert recorded.every_q is not None
            every = recorded.every_q[excerpt].float()
            self._take(self._turned(every, -place, unrotate=True))
        # A column for what is exact stands behind those of the slots.
        begun = groups_at(schedule, self.t)[:, None]
        visible = (number < begun) & (number >= begun - schedule.compressed)
        hidden = torch.where(visible, 0.0, _HIDDEN).repeat(self._per_kv_head, 1)
        exact = self._by_kv_head(self.exact.total[..., None])
        self.offset = torch.cat([hidden.expand(len(exact), -1, -1), exact], 2)
        self.exact_out = self._by_kv_head(self.exact.out)
        self.q = self._by_kv_head(self._turned(q, to_slots))

    @property
    def _per_kv_head(self) -> int:
        return self.recorded.q.shape[1] // len(self.keys)

    def _by_kv_head(self, x: Tensor) -> Tensor:
        """[H, Q, n] as [Hkv, H / Hkv * Q, n]."""
        return x.reshape(len(self.keys), -1, x.shape[2])

    def _turned(self, x: Tensor, position: Tensor, unrotate: bool = False) -> Tensor:
        """[H, n, D] rotated to positions [n]."""
        law = self.law.unrotating if unrotate else self.law.law
        return engine.rotary(x[None], position.double()[None], law)[0]

    def _window(self, q: Tensor) -> _Part:
        begin = first_token(self.law.schedule, groups_at(self.law.schedule, self.t))[:, None]
        place = torch.arange(self.keys.shape[1], device=self.keys.device)
        visible = (place >= begin) & (place <= self.t[:, None])
        visible[:, : self.law.schedule.sinks] = False
        return self._attended(q, self.keys, self.values, visible)

    def _sinks(self, q: Tensor) -> _Part:
        count = self.law.schedule.sinks
        place = torch.arange(count, device=self.keys.device)
        return self._attended(
            q, self.keys[:, :count], self.values[:, :count], place <= self.t[:, None]
        )

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> _Part:
        """Attention of [H, Q, D] to [Hkv, n, D], where visible [Q, n]."""
        scores = self._scores(self._by_kv_head(q), k)
        hidden = ~visible.repeat(self._per_kv_head, 1)
        scores = scores.masked_fill(hidden, _HIDDEN)
        total = scores.logsumexp(-1)
        out = torch.exp(scores - total[..., None]) @ v
        return _Part(out.reshape(*q.shape[:2], -1), total.reshape(q.shape[:2]))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.mT * self.recorded.scale
        cap = self.recorded.softcap
        return cap * torch.tanh(scores / cap) if cap else scores

    def _seen_through(self, out: Tensor) -> Tensor:
        """[H, Q, Dv] as what goes on into the model, [Q, width]."""
        return out.transpose(0, 1).flatten(1) @ self.weight.T

    @torch.no_grad()
    def _take(self, q: Tensor) -> None:
        """Slots that are tokens, by the attention that they receive where no bias is fitted.

        Args:
            q: of all tokens, [H, T, D], without rotation.
        """
        law = self.law
        rings = Memory.empty(Spec((law.spec,)), 1, q.dtype, q.device).rings[0]
        numbers = law.scored(self.recorded.scale, self.recorded.softcap)
        pairs = (q[None], self.keys[None], self.values[None])
        *_, chosen, positions = engine.step(
            *pairs, self.plan, rings, numbers, (), law.scores(q[None]), False
        )
        keys, values = (MostUsed.take(x, chosen)[0] for x in self.groups)
        if law.settings.distance == "token":  # each at its own place, which differs by head
            keys = engine.rotary(keys[:, None], positions[0].double(), law.law)[:, 0]
        else:
            keys = self._turned(keys, self.positions)
        self.taken = (keys, values)

    def error(self) -> Tensor:
        """The squared error of what goes on into the model, as a share of its square."""
        out = self.exact.out
        if self.law.schedule.compressed:
            out = self._with_slots().reshape(out.shape)
        return (self._seen_through(out) - self.wanted).square().sum() / self.size

    def _with_slots(self) -> Tensor:
        """Outputs [Hkv, H / Hkv * Q, Dv] of attention to what is exact and to slots."""
        law = self.law
        if self.taken is None:
            keys, values, mass = (x[0] for x in law.compressor.slots(*self.groups, mass=True))
            keys = self._turned(keys, self.positions)
        else:
            keys, values = self.taken
            mass = keys.new_zeros(keys.shape[:2])
        bias = mass if law.bias is None else mass + law.bias[:, None]
        scores = self._scores(self.q, keys) + bias[:, None]
        scores = torch.nn.functional.pad(scores, (0, 1)) + self.offset
        weights = torch.softmax(scores, -1)
        return weights[..., :-1] @ values + weights[..., -1:] * self.exact_out


def problems_of(
    law: LayerLaw, recorded: Recorded, queries: Tensor, excerpts: Sequence[int]
) -> list[LayerProblem]:
    """The problems of some excerpts.

    Args:
        queries: int64 [excerpts, Q].
    """
    return [LayerProblem(law, recorded, queries[x], x) for x in excerpts]


def error_of(problems: Sequence[LayerProblem]) -> float:
    """The mean error of a law over excerpts."""
    with torch.no_grad():
        return sum(problem.error().item() for problem in problems) / len(problems)


def fit_layer(
    law: LayerLaw,
    problems: Sequence[LayerProblem],
    steps: int,
    lr: float,
    last_lr: float = 1e-3,
) -> None:
    """Fits a law's compressor and bias: Adam, a rate that falls linearly, an excerpt per step."""
    assert law.bias is not None
    parameters = [*law.compressor.parameters(), law.bias]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    with torch.enable_grad():
        for step in range(steps):
            done = step / max(steps - 1, 1)
            for group in optimizer.param_groups:
                group["lr"] = lr + (min(last_lr, lr) - lr) * done
            optimizer.zero_grad()
            torch.autograd.backward(problems[step % len(problems)].error())
            optimizer.step()
