"""The memory of one attention layer, one token after another, in Python lists.

Rae et al. 2019 (arXiv:1911.05507), section 3 and algorithm 1. Deviations: keys and values are
stored instead of hidden states; see schedule.py for when groups leave the window.

A list index is an absolute number: `tokens[t]` is token t, `slots[g]` is group g. Nothing is ever
dropped, the schedule alone says what a query may see; only `tensors` lays the lists out in rings.
What is stored is what the real memory stores: keys turned to the clock of their region, everything
rounded to the dtype of the memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import mass_of, mix, scores_of, slot_bias, working_dtype
from .compression import (
    Compressor,
    compress_group,
    is_by_usage,
    make_compressor,
    most_used,
    overlap,
)
from .positions import Scores, added_by_head
from .rotary import make_position
from .schedule import Schedule


class Pair(NamedTuple):
    """A key [Hkv, D] and a value [Hkv, Dv] as stored."""

    key: Tensor
    value: Tensor


class Row:
    """One stream."""

    def __init__(self) -> None:
        self.tokens: list[Pair] = []
        self.slots: list[Pair] = []
        self.usage: list[Tensor] = []  # of every token, [Hkv]: the attention it got
        self.positions: list[list[int]] = []  # of every slot, [Hkv]: the token it is, if it is one
        self.margin = math.inf
        self.rewindable = 0  # tokens that the rings of the real memory could take back

    def copy(self) -> Row:
        """The same stream, to go on by itself."""
        row = Row()
        row.tokens, row.slots, row.rewindable = [*self.tokens], [*self.slots], self.rewindable
        row.usage, row.positions, row.margin = [*self.usage], [*self.positions], self.margin
        return row


class KVMemory:
    """Sinks, window and compressed memory of `batch_size` independent streams.

    The arguments are those of `ctx.KVMemory`. `max_rewind` shapes `tensors` and nothing else.
    """

    def __init__(
        self,
        schedule: Schedule,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        compressor: str | Compressor = "mean",
        position: str | None = "rotary",
        alibi_slopes: Sequence[float] | Tensor | None = None,
        relative: Sequence[Tensor] | None = None,
        rotary_base: float = 10000.0,
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        distance: str = "slot",
        compressed_bias: str | Tensor | Sequence[float] = "none",
        scale: float | None = None,
        max_rewind: int = 64,
        dtype: torch.dtype = torch.float32,
        compressed_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if distance not in ("slot", "token"):
            raise ValueError(
                f"ctx.reference.KVMemory: distance must be 'slot' or 'token', got {distance!r}"
            )
        self.schedule = schedule
        self.batch_size = batch_size
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.distance = distance
        self.compressed_bias = compressed_bias
        self.scale = head_dim**-0.5 if scale is None else scale
        self.max_rewind = max_rewind
        self.dtype = dtype
        self.compressed_dtype = dtype if compressed_dtype is None else compressed_dtype
        self.device = torch.device(device)
        self.work = working_dtype(dtype)
        self.turn = make_position(position, rotary_base, rotary_dim, rotary_interleaved).rotate
        self.scheme = Scores(position, alibi_slopes, relative, self.work)
        self.compress = make_compressor(
            compressor, kv_heads, schedule.ratio, head_dim, self.value_dim, self.work
        )
        self.overlap = overlap(self.compress, schedule.ratio)
        self.by_usage = is_by_usage(self.compress)
        self.reset()

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forgets everything, in these rows or in all: their streams start again at token 0."""
        if rows is None:
            self.rows = [Row() for _ in range(self.batch_size)]
        else:
            for b in rows:
                self.rows[b] = Row()

    def rewind(self, tokens: Sequence[int]) -> None:
        """Takes back the last tokens of every row, as if they had not come.

        What was counted cannot be taken back: refused where usage matters.
        """
        if self.by_usage:
            raise ValueError("ctx.reference.KVMemory.rewind: compressor must not be 'most_used'")
        for row, count in zip(self.rows, tokens, strict=True):
            if not 0 <= count <= row.rewindable:
                raise ValueError(
                    "ctx.reference.KVMemory.rewind: tokens must be between 0 and "
                    f"{row.rewindable}, got {count}"
                )
        for row, count in zip(self.rows, tokens, strict=True):
            left = len(row.tokens) - count
            del row.tokens[left:]
            del row.usage[left:]
            del row.slots[self.schedule.groups(left - 1) if left else 0 :]
            row.rewindable -= count

    def select(self, rows: Sequence[int]) -> KVMemory:
        """A new memory of these rows, in this order."""
        other = copy.copy(self)
        other.rows = [self.rows[b].copy() for b in rows]
        other.batch_size = len(other.rows)
        return other

    def clone(self) -> KVMemory:
        """A new memory that holds the same."""
        return self.select(range(self.batch_size))

    @staticmethod
    def merge(memories: Sequence[KVMemory]) -> KVMemory:
        """A new memory of the rows of several, one after the other."""
        other = memories[0].clone()
        other.rows = [row.copy() for memory in memories for row in memory.rows]
        other.batch_size = len(other.rows)
        return other

    @torch.no_grad()
    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | None = None,
        reset_at: Tensor | None = None,
        *,
        return_region_weights: bool = False,
    ) -> Any:
        """Appends T tokens and returns what each of them sees, [B, H, T, Dv].

        Args:
            q: [B, H, T, D].
            k: [B, Hkv, T, D], without rotation.
            v: [B, Hkv, T, Dv].
            lengths: of the rows; what comes behind is padding, and its output zero.
            reset_at: bool [B, T], true where a token is the first of a new stream.
            return_region_weights: also return the share of attention that sinks, compressed slots
                and window get, [B, H, T, 3].
        """
        out = q.new_zeros(*q.shape[:3], self.value_dim)
        region_weights = q.new_zeros(*q.shape[:3], 3, dtype=self.work)
        for b in range(self.batch_size):
            for i in range(q.shape[2] if lengths is None else lengths[b]):
                if reset_at is not None and reset_at[b, i]:
                    self.reset([b])
                self._append_token(self.rows[b], k[b, :, i], v[b, :, i])
                row = self.rows[b]
                out[b, :, i], region_weights[b, :, i] = self._attend_token(
                    row, len(row.tokens) - 1, q[b, :, i], count=True
                )
        return (out, region_weights) if return_region_weights else out

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Appends T tokens, k [B, Hkv, T, D] without rotation and v [B, Hkv, T, Dv]."""
        if self.by_usage:
            raise ValueError("ctx.reference.KVMemory.append: compressor must not be 'most_used'")
        for b, row in enumerate(self.rows):
            for i in range(k.shape[2]):
                self._append_token(row, k[b, :, i], v[b, :, i])

    @torch.no_grad()
    def attend(self, q: Tensor, *, return_region_weights: bool = False) -> Any:
        """What the last T tokens see, [B, H, T, Dv]; q [B, H, T, D] holds their queries."""
        out = q.new_empty(*q.shape[:3], self.value_dim)
        region_weights = q.new_empty(*q.shape[:3], 3, dtype=self.work)
        for b, row in enumerate(self.rows):
            first = len(row.tokens) - q.shape[2]
            for i in range(q.shape[2]):
                out[b, :, i], region_weights[b, :, i] = self._attend_token(
                    row, first + i, q[b, :, i]
                )
        return (out, region_weights) if return_region_weights else out

    def _append_token(self, row: Row, key: Tensor, value: Tensor) -> None:
        t = len(row.tokens)
        if self.by_usage:
            self._choose_slots(row, range(len(row.slots), self.schedule.groups(t)))
        for g in range(len(row.slots), self.schedule.groups(t)):
            row.slots.append(self._make_slot(row, g))
        row.tokens.append(self._store(key.to(self.work), value, position=t))
        row.usage.append(torch.zeros(self.kv_heads, dtype=self.work))
        row.rewindable = min(row.rewindable + 1, self.max_rewind)

    def _make_slot(self, row: Row, g: int) -> Pair:
        keys, values = [], []
        members = self.schedule.members(g)
        for j in range(members.start - self.overlap, members.stop):
            if j < 0:
                keys.append(torch.zeros(1, self.kv_heads, self.head_dim, dtype=self.work))
                values.append(torch.zeros(1, self.kv_heads, self.value_dim, dtype=self.work))
                continue
            token = row.tokens[j]
            keys.append(self.turn(token.key.to(self.work), -j)[None])
            values.append(token.value.to(self.work)[None])
        key, value = compress_group(self.compress, keys, values)
        turned = self.turn(key[0], self._slot_clock(g))
        return Pair(self._round_slot(turned), self._round_slot(value[0]))

    def _round_slot(self, x: Tensor) -> Tensor:
        """A slot [Hkv, width] as it is stored; int8 stores multiples of a 127th of its largest."""
        if self.compressed_dtype != torch.int8:
            return x.to(self.compressed_dtype, copy=True)
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.where(scale > 0, (x / scale).round(), 0.0).clamp(-127, 127) * scale

    def _choose_slots(self, row: Row, groups: range) -> None:
        """Of all tokens that leave now the most used become slots, as they are."""
        leaving = [j for g in groups for j in self.schedule.members(g)]
        if not leaving:
            return
        usage = torch.stack([row.usage[j] for j in leaving], 1)
        if len(leaving) > len(groups):
            order = usage.sort(-1, descending=True).values
            ahead = order[:, len(groups) - 1] - order[:, len(groups)]
            row.margin = min(row.margin, float(ahead.min()))
        kept = [[leaving[i] for i in chosen] for chosen in most_used(usage, len(groups))]
        for g, tokens in zip(groups, zip(*kept, strict=True), strict=True):
            keys, values = [], []
            for head, j in enumerate(tokens):
                clock = g if self.distance == "slot" else j
                key = self.turn(row.tokens[j].key[None, head].to(self.work), -j)
                keys.append(self.turn(key, clock)[0])
                values.append(row.tokens[j].value[head].to(self.work))
            pair = self._round_slot(torch.stack(keys)), self._round_slot(torch.stack(values))
            row.slots.append(Pair(*pair))
            row.positions.append(list(tokens))

    def _store(self, key: Tensor, value: Tensor, position: float) -> Pair:
        turned = self.turn(key, position)
        return Pair(turned.to(self.dtype, copy=True), value.to(self.dtype, copy=True))

    def _slot_clock(self, g: int) -> float:
        return g if self.distance == "slot" else self.schedule.centre(g)

    def _attend_token(
        self, row: Row, t: int, q: Tensor, count: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The output [H, Dv], and what share of the attention each region gets, [H, 3].

        Every region has a clock of its own, to which the query is turned.

        `count`: what the window's tokens are attended to becomes part of their usage.
        """
        sinks, groups, tokens = self.schedule.visible(t)
        sink_clock = group_clock = t
        if self.distance == "slot":
            behind_edge = t - self.schedule.edge(t)
            group_clock = behind_edge + self.schedule.groups(t)
            sink_clock = behind_edge + self.schedule.slots(t) + self.schedule.sinks
        regions = [
            (sink_clock, [row.tokens[j] for j in sinks], 0.0),
            (group_clock, [row.slots[g] for g in groups], 1.0),
            (t, [row.tokens[j] for j in tokens], 0.0),
        ]
        query = q.to(self.work)
        bias = slot_bias(self.compressed_bias, self.schedule.ratio, len(q), self.work)
        scores, values = [], []
        for clock, pairs, biased in regions:
            if not pairs:
                continue
            keys = torch.stack([pair.key for pair in pairs], 1).to(self.work)
            content = self.scheme.content_query(query)
            score = self.scale * scores_of(self.turn(content, clock)[None], keys[None])[0]
            scores.append(score + biased * bias[:, None])
            values += [pair.value.to(self.work) for pair in pairs]
        heads = [self.schedule.distances(t, self.distance) for _ in range(self.kv_heads)]
        if self.by_usage and self.distance == "token":  # every head has slots of its own
            for i, g in enumerate(groups, start=len(sinks)):
                for own, token in zip(heads, row.positions[g], strict=True):
                    own[i] = t - token
        first, last = len(sinks), len(sinks) + len(groups)
        slots = range(first, last)
        added = added_by_head(self.scheme, query[None], [heads], slots, self.scale)
        weights = (torch.cat(scores, 1) + added[0]).softmax(-1)[None]
        if count:
            shared = weights[0].reshape(self.kv_heads, -1, weights.shape[2]).mean(1)
            for j, weight in zip(reversed(tokens), reversed(shared.unbind(1)), strict=False):
                row.usage[j] = row.usage[j] + weight
        return mix(weights, torch.stack(values, 1)[None])[0], mass_of(weights, first, last)[0]

    @property
    def seen(self) -> Tensor:
        """How many tokens each stream has brought, int64 [B]."""
        return torch.tensor([len(row.tokens) for row in self.rows], dtype=torch.int64)

    @property
    def rewindable(self) -> Tensor:
        """How many of them can be taken back, int64 [B]."""
        return torch.tensor([row.rewindable for row in self.rows], dtype=torch.int64)

    @property
    def margin(self) -> float:
        """By how much, at least, a token that stayed was used more than one that did not: another
        computation that rounds by more may choose otherwise.
        """
        return min(row.margin for row in self.rows)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The lists laid out as the real memory lays them out: token t >= A of the window and
        group g of the compressed memory stand at their number modulo the capacity of the ring, and
        a place never written is zero. int8 slots are shown as the numbers that they stand for.
        """
        s = self.schedule
        segment = s.segment or s.ratio
        window = s.window + segment + s.ratio - 1 + self.max_rewind + self.overlap
        late = segment * -(-(self.max_rewind - 1) // segment)  # tokens evicted late by long calls
        compressed = s.compressed + -(-late // s.ratio) if s.compressed else 0
        places = {"window": window, "compressed": compressed, "sink": s.sinks}
        rings = {}
        for region, capacity in places.items():
            for part, width in (("keys", self.head_dim), ("values", self.value_dim)):
                shape = self.batch_size, self.kv_heads, capacity, width
                slots = region == "compressed" and self.compressed_dtype != torch.int8
                dtype = self.compressed_dtype if slots else self.dtype
                rings[f"{region}_{part}"] = torch.zeros(shape, dtype=dtype)
        for b, row in enumerate(self.rows):
            for t, pair in enumerate(row.tokens):
                region, place = ("sink", t) if t < s.sinks else ("window", t % window)
                rings[f"{region}_keys"][b, :, place] = pair.key
                rings[f"{region}_values"][b, :, place] = pair.value
            for g, pair in enumerate(row.slots if compressed else []):
                rings["compressed_keys"][b, :, g % compressed] = pair.key
                rings["compressed_values"][b, :, g % compressed] = pair.value
        counts = {"seen": self.seen, "rewindable": self.rewindable}
        return {**rings, **counts, **self._choices(window, compressed)}

    def _choices(self, window: int, compressed: int) -> dict[str, Tensor]:
        """What a compressor that chooses by usage keeps besides: nothing for any other."""
        sizes = (window, compressed) if self.by_usage else (0, 0)
        shape = self.batch_size, self.kv_heads
        usage = torch.zeros(*shape, sizes[0], dtype=self.work)
        positions = torch.zeros(*shape, sizes[1], dtype=torch.int64)
        for b, row in enumerate(self.rows if self.by_usage else []):
            for t in range(self.schedule.sinks, len(row.usage)):
                usage[b, :, t % window] = row.usage[t]
            for g, tokens in enumerate(row.positions if compressed else []):
                positions[b, :, g % compressed] = torch.tensor(tokens)
        return {"attention_received": usage, "slot_positions": positions}

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
