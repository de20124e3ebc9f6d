"""A layer's compressor, fitted to what the full cache makes of the same queries."""

from __future__ import annotations

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

__all__ = ["LayerProblem", "Part", "fit_layer"]


class Part(NamedTuple):
    """Attention of queries to some of what they see: its output [..., H, Q, Dv], and the logarithm
    of the sum of exponentials [..., H, Q].
    """

    out: Tensor
    total: Tensor

    def with_(self, other: Part) -> Tensor:
        """The output of attention to both, in one softmax."""
        share = torch.sigmoid(other.total - self.total)[..., None]
        return torch.lerp(self.out, other.out, share)


class LayerProblem:
    """One layer under one law: everything about some excerpts that parameters do not change.

    Args:
        law: measured; its compressor and bias are what :meth:`loss` depends on.
        recorded: of the layer.
        queries: int64 [excerpts, Q], their positions.
        chosen: the excerpts to look at.
    """

    def __init__(
        self, law: LayerLaw, recorded: Recorded, queries: Tensor, chosen: list[int]
    ) -> None:
        self.law, self.recorded = law, recorded
        device, schedule, distance = recorded.keys.device, law.schedule, law.settings.distance
        self.keys, self.values = recorded.keys[chosen].float(), recorded.values[chosen].float()
        self.t = queries[chosen].to(device)
        q = engine.rotary(recorded.q[chosen].float(), -self.t.double(), law.unrotating)
        to_slots, to_sinks = clocks_at(schedule, distance, self.t)
        tokens = self.keys.shape[2]
        place = torch.arange(tokens, device=device)
        window = place >= first_token(schedule, groups_at(schedule, self.t))[..., None]
        window &= place <= self.t[..., None]
        sinks = place[: schedule.sinks].expand(*self.t.shape, -1) <= self.t[..., None]
        window[..., : schedule.sinks] = False
        exact = self._attended(self._at(q, self.t), self.keys, self.values, window)
        if schedule.sinks:
            first = [x[:, :, : schedule.sinks] for x in (self.keys, self.values)]
            part = self._attended(self._at(q, to_sinks), first[0], first[1], sinks)
            exact = Part(exact.with_(part), torch.logaddexp(exact.total, part.total))
        self.exact = exact
        out = recorded.out[chosen].float()
        self.wanted = self._seen_through(out)
        self.size = self.wanted.square().sum()
        if not schedule.compressed:
            return
        self.q = self._at(q, to_slots)
        place = place.expand(len(chosen), -1)
        self.plan = engine.plans([law], None, place, None, None, False)[law.plan_key]
        self.groups = engine.evicted_groups(self.keys, self.values, self.plan, (), law.law)
        number = torch.arange(self.groups[0].shape[2], device=device)
        begun = groups_at(schedule, self.t)[..., None]
        self.visible = (number < begun) & (number >= begun - schedule.compressed)
        self.positions = slot_positions(schedule, distance, number).expand(len(chosen), -1)
        self.taken: tuple[Tensor, Tensor] | None = None
        if law.by_usage:
            assert recorded.every_q is not None
            self._take(
                engine.rotary(recorded.every_q[chosen].float(), -place.double(), law.unrotating)
            )

    def _at(self, q: Tensor, position: Tensor) -> Tensor:
        return engine.rotary(q, position.double(), self.law.law)

    @torch.no_grad()
    def _take(self, q: Tensor) -> None:
        """Slots that are tokens, by the attention that they receive where no bias is fitted.

        Args:
            q: of all tokens, [E, H, T, D], without rotation.
        """
        law = self.law
        rings = Memory.empty(Spec((law.spec,)), len(q), q.dtype, q.device).rings[0]
        numbers = law.scored(self.recorded.scale, self.recorded.softcap)
        *_, chosen, positions = engine.step(
            q, self.keys, self.values, self.plan, rings, numbers, (), law.scores(q), False
        )
        keys, values = (MostUsed.take(x, chosen) for x in self.groups)
        if law.settings.distance == "token":  # each at its own place, which differs by head
            apart = keys.flatten(0, 1)[:, None]
            keys = engine.rotary(apart, positions.flatten(0, 1), law.law).reshape(keys.shape)
        else:
            keys = engine.rotary(keys, self.positions, law.law)
        self.taken = (keys, values)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None = None
    ) -> Part:
        """Attention of [E, H, Q, D] to [E, Hkv, n, D].

        Args:
            visible: bool [E, Q, n].
            bias: [E, Hkv, n], added to scores.
        """
        rows, heads, queries, width = q.shape
        held = k.shape[1]
        grouped = q.reshape(rows, held, heads // held * queries, width)
        scores = grouped @ k.mT * self.recorded.scale
        if self.recorded.softcap:
            scores = self.recorded.softcap * torch.tanh(scores / self.recorded.softcap)
        if bias is not None:
            scores = scores + bias[:, :, None]
        hidden = ~visible[:, None].repeat(1, 1, heads // held, 1)
        scores = scores.masked_fill(hidden, -1e30)
        total = scores.logsumexp(-1)
        out = torch.exp(scores - total[..., None]) @ v
        shape = (rows, heads, queries)
        return Part(out.reshape(*shape, -1), total.reshape(shape))

    def _seen_through(self, out: Tensor) -> Tensor:
        """[E, H, Q, Dv] as what goes on into the model, [E, Q, width]."""
        return out.transpose(1, 2).flatten(2) @ self.recorded.weight.float().T

    def loss(self) -> Tensor:
        """The squared error of what goes on into the model, of its square."""
        out = self.exact.out
        if self.law.schedule.compressed:
            out = self.exact.with_(self._slots())
        return (self._seen_through(out) - self.wanted).square().sum() / self.size

    def _slots(self) -> Part:
        law = self.law
        if self.taken is None:
            keys, values, mass = law.compressor.slots(*self.groups, mass=True)
            keys = engine.rotary(keys, self.positions, law.law)
        else:
            keys, values = self.taken
            mass = keys.new_zeros(keys.shape[:3])
        bias = mass if law.bias is None else mass + law.bias[:, None]
        return self._attended(self.q, keys, values, self.visible, bias)


def fit_layer(
    law: LayerLaw, problem: LayerProblem, steps: int, lr: float, last_lr: float = 1e-3
) -> None:
    """Fits a law's compressor and bias: Adam, a rate that falls linearly."""
    assert law.bias is not None
    parameters = [*law.compressor.parameters(), law.bias]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    with torch.enable_grad():
        for step in range(steps):
            done = step / max(steps - 1, 1)
            for group in optimizer.param_groups:
                group["lr"] = lr + (min(last_lr, lr) - lr) * done
            optimizer.zero_grad()
            torch.autograd.backward(problem.loss())
            optimizer.step()
