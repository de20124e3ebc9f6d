"""Auxiliary losses, which train the compressor and nothing else (Rae et al. 2019, arXiv:1911.05507,
section 3.2 and algorithm 2).

At an eviction boundary some groups of c tokens leave the window and become slots. *Attention
reconstruction* asks that the queries of the segment that ends there get the same from the slots as
from the tokens they are made of; *auto-encoding* asks that the tokens can be rebuilt from the
slots.
Both are mean squared errors, averaged over boundaries. Deviations from the paper: keys and values
are compressed instead of hidden states, per kv head; and the boundaries are those of the law, so a
call may hold none or several (the paper has one for each call).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctx import _check, engine
from ctx.compression import Compressor
from ctx.engine import Law, Plan
from ctx.schedule import Schedule, boundaries_at, groups_at

__all__ = ["LOSSES", "Decoder", "Evictions", "attention_reconstruction", "auto_encoding"]

LOSSES: tuple[str, ...] = ("reconstruction", "autoencoding")


@dataclass(frozen=True)
class Evictions:
    """What leaves the window at the boundaries at which segments end inside a call of T tokens.

    N is the number of boundaries that a row may meet, K that of groups at one of them; what is not
    there is masked. Everything is constant: no gradient leaves it.
    """

    queries: Tensor  #: [B, H, N, S, D] un-rotated queries of the segments that end there
    asked: Tensor  #: bool [B, N, S], true at queries that belong to this call
    keys: Tensor  #: [B, Hkv, N, K, overlap + c, D] un-rotated keys of the groups
    values: Tensor  #: [B, Hkv, N, K, overlap + c, Dv]
    due: Tensor  #: bool [B, N, K], true at groups that leave there

    @property
    def boundaries(self) -> Tensor:
        """bool [B, N], true where something leaves and somebody asks."""
        return self.asked.any(-1) & self.due.any(-1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, heads, n, ...] at index [B, ...], clamped: [B, heads, *index, ...]."""
    inside = index.clamp(0, max(x.shape[2] - 1, 0)).flatten(1)
    wide = inside.reshape(len(x), 1, -1, *[1] * (x.dim() - 3))
    taken = x.gather(2, wide.expand(-1, x.shape[1], -1, *x.shape[3:]))
    return taken.reshape(*x.shape[:2], *index.shape[1:], *x.shape[3:])


def evictions(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, Hkv, T, D]
    v: Tensor,  # [B, Hkv, T, Dv]
    call: Plan,
    rings: Sequence[Tensor],
    schedule: Schedule,
    law: Law,
) -> Evictions:
    """The evictions of one call over a layer's rings (none: an empty memory)."""
    q, k, v = q.detach(), k.detach(), v.detach()
    batch, _, tokens, _ = q.shape
    segment, ratio = schedule.segment, schedule.ratio
    seen, lengths = call.seen, call.lengths
    counts = torch.full_like(seen, tokens) if lengths is None else lengths
    # A segment that ends with the call is evicted by the next token, which is any token here.
    ahead = [torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (k, v)]
    keys, values = engine.evicted_groups(ahead[0], ahead[1], call.longer(law), rings, law)
    begun = groups_at(schedule, seen - 1)

    boundary = boundaries_at(schedule, seen, tokens)  # [B, N]
    ends_here = boundary <= (seen + counts)[:, None]
    place = (
        boundary[..., None] - segment + torch.arange(segment, device=q.device) - seen[:, None, None]
    )
    asked = (place >= 0) & ends_here[..., None]
    most = -(-segment // ratio)
    before, after = groups_at(schedule, boundary - 1), groups_at(schedule, boundary)
    group = before[..., None] + torch.arange(most, device=q.device)  # [B, N, K]
    due = (group < after[..., None]) & ends_here[..., None]
    if keys.shape[2] == 0:  # no compressive memory
        due = torch.zeros_like(due)
        shape = (batch, k.shape[1], boundary.shape[1], most, keys.shape[3])
        none = keys.new_zeros(*shape, k.shape[3]), values.new_zeros(*shape, v.shape[3])
        return Evictions(_take(q, place), asked, *none, due)
    index = group - begun[:, None, None]
    # What is not there is zero, so that whatever stands in its place reaches no gradient.
    absent = ~due[:, None, :, :, None, None]
    held, made = (_take(x, index).masked_fill(absent, 0.0) for x in (keys, values))
    queries = _take(q, place).masked_fill(~asked[:, None, :, :, None], 0.0)
    return Evictions(queries, asked, held, made, due)


def _average(error: Tensor, weight: Tensor, boundaries: Tensor) -> Tensor:
    """Means over what `weight` [B, N, ...] marks at each boundary, and of these over boundaries."""
    error = torch.where(weight, error, 0.0)  # not a product: what is masked may be anything
    each = error.flatten(2).sum(-1) / weight.flatten(2).sum(-1).clamp_min(1)
    return torch.where(boundaries, each, 0.0).sum() / boundaries.sum().clamp_min(1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention by content; q [B, H, N, S, D], keys [B, Hkv, N, L, D], visible [B, N, L]."""
    share = q.shape[1] // keys.shape[1]
    if share > 1:
        keys, values = (x.repeat_interleave(share, 1) for x in (keys, values))
    scores = (scale * q) @ keys.transpose(-1, -2)
    # A boundary at which nothing is due is left out later; until then it must stay finite.
    hidden = (~visible & visible.any(-1, keepdim=True))[:, None, :, None]
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ values


def attention_reconstruction(
    evicted: Evictions,
    compressor: Compressor,
    scale: float | None = None,
    *,
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """What the queries of a segment get from slots, against what they get from the tokens.

    Both by content alone: no positions, no bias, nothing else to attend to. The gradient reaches
    the compressor's parameters only. Source: algorithm 2 of the paper.

    Args:
        evicted: what :func:`evictions` found in a call.
        compressor: makes the slots.
        scale: of the scores; default D^-1/2.
        project: where layer inputs are remembered: makes constant-weight keys [B, Hkv, n, D] and
            values [B, Hkv, n, Dv] of inputs [B, 1, n, E].

    Returns:
        A scalar; zero where the call has no boundary.
    """
    boundaries, groups = evicted.keys.shape[2:4]
    scale = evicted.queries.shape[-1] ** -0.5 if scale is None else scale
    flat = [x.flatten(2, 3) for x in (evicted.keys, evicted.values)]
    made: Sequence[Tensor] = compressor.slots(flat[0], flat[1])
    own = [x[..., compressor.overlap :, :] for x in (evicted.keys, evicted.values)]
    ratio = own[0].shape[4]
    tokens = [x.flatten(2, 4) for x in own]
    if project is not None:
        made, tokens = project(made[0]), [*project(tokens[0])]

    def each(x: Tensor, count: int) -> Tensor:
        return x.reshape(*x.shape[:2], boundaries, count, x.shape[3])

    slots = [each(x, groups) for x in made]
    exact = [each(x, groups * ratio) for x in tokens]
    queries = evicted.queries.to(evicted.keys.dtype)
    visible = evicted.due[..., None].expand(-1, -1, -1, ratio).flatten(2)
    want = _attend(queries, exact[0], exact[1], visible, scale)
    got = _attend(queries, slots[0], slots[1], evicted.due, scale)
    error = (got - want).square().mean((1, -1))  # [B, N, S]
    return _average(error, evicted.asked, evicted.boundaries)


class Decoder(nn.Module):
    """Rebuilds the c tokens of a group from its slot: a linear map D -> c D for each kv head."""

    def __init__(
        self,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int,  # 0: there are no values
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"kv_heads": kv_heads, "ratio": ratio, "head_dim": head_dim, "value_dim": value_dim}
        kv_heads, ratio, head_dim, value_dim = _check.integers("ctx.losses.Decoder", **sizes)
        made = {"device": device, "dtype": dtype}
        shapes = [(kv_heads, width, ratio * width) for width in (head_dim, value_dim)]
        self.ratio = ratio
        self.key_weight = nn.Parameter(torch.empty(shapes[0], **made))  # type: ignore[arg-type]
        self.value_weight: nn.Parameter | None = None
        if value_dim > 0:  # inputs of a layer have none
            self.value_weight = nn.Parameter(torch.empty(shapes[1], **made))  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts by repeating the slot, which is the best a mean can do."""
        with torch.no_grad():
            for weight in self.parameters():
                eye = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
                weight.copy_(eye.repeat(1, self.ratio).expand_as(weight))

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [B, Hkv, G, D] and [B, Hkv, G, Dv] -> groups [B, Hkv, G, c, D] and [.., Dv]."""
        return self._rebuilt(keys, self.key_weight), self._rebuilt(values, self.value_weight)

    def _rebuilt(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x[:, :, :, None].expand(-1, -1, -1, self.ratio, -1)
        return (x @ weight.to(x.dtype)).reshape(*x.shape[:3], self.ratio, x.shape[3])


def auto_encoding(evicted: Evictions, compressor: Compressor, decoder: Decoder) -> Tensor:
    """What the decoder makes of the slots, against the tokens they are made of.

    The gradient reaches the parameters of compressor and decoder only. Source: section 3.2 of the
    paper.

    Returns:
        A scalar; zero where the call has no boundary.
    """
    groups = [x.flatten(2, 3) for x in (evicted.keys, evicted.values)]
    rebuilt = decoder(*compressor.slots(groups[0], groups[1]))
    own = [x[..., compressor.overlap :, :] for x in groups]
    error = sum(
        (
            (got - want).square().mean((1, 3, 4))
            for got, want in zip(rebuilt, own, strict=True)
            if want.shape[4] > 0
        ),
        start=torch.zeros((), device=groups[0].device, dtype=groups[0].dtype),
    )
    return _average(error.reshape(evicted.due.shape), evicted.due, evicted.boundaries)
