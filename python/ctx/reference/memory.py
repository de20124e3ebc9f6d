"""The memory of one attention layer, one token after another, in Python lists.

Rae et al. 2019 (arXiv:1911.05507), section 3 and algorithm 1. Deviations: keys and values are
stored instead of hidden states; see schedule.py for when groups leave the window.

A list index is an absolute number: `tokens[t]` is token t, `slots[g]` is group g. Nothing is ever
dropped, the schedule alone says what a query may see; only rings.py lays the lists out in rings.
What is stored is what the real memory stores: keys rotated to the clock of their region, everything
rounded to the dtype of the memory. Masses of slots are kept in the dtype of the arithmetic.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compression import (
    Compressor,
    compress_group,
    is_by_usage,
    make_compressor,
    most_used,
    overlap,
)
from .rings import rings_of
from .schedule import Schedule
from .scores import Scores, mix, products_of, region_weights_of, working_dtype
from .settings import Settings


class Pair(NamedTuple):
    """A token as stored."""

    key: Tensor  # [Hkv, D]
    value: Tensor  # [Hkv, Dv]


class StoredSlot(NamedTuple):
    """A compressed slot as stored."""

    key: Tensor  # [Hkv, D]
    value: Tensor  # [Hkv, Dv]
    mass: Tensor  # [Hkv]


class Row:
    """One stream."""

    def __init__(self) -> None:
        self.tokens: list[Pair] = []
        self.slots: list[StoredSlot] = []
        self.usage: list[Tensor] = []  # of every token, [Hkv]: the attention it received
        self.positions: list[list[int]] = []  # of every slot, [Hkv]: the token it is, if it is one
        self.margin = math.inf  # see KVMemory.margin
        self.rewindable = 0  # tokens that the rings of the real memory could take back

    def copy(self) -> Row:
        """The same stream, to go on by itself."""
        row = Row()
        row.tokens, row.slots, row.rewindable = [*self.tokens], [*self.slots], self.rewindable
        row.usage, row.positions, row.margin = [*self.usage], [*self.positions], self.margin
        return row


class KVMemory:
    """Sinks, window and compressed memory of `batch_size` independent streams.

    The arguments are those of `ctx.KVMemory`; `options` are those of `Settings`. `max_rewind`
    decides what `rewind` takes back and the shapes of `tensors`, and nothing else.
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
        max_rewind: int = 64,
        dtype: torch.dtype = torch.float32,
        compressed_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        self.settings = Settings(**options)
        self.schedule = schedule
        self.batch_size = batch_size
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.max_rewind = max_rewind
        self.dtype = dtype
        self.compressed_dtype = dtype if compressed_dtype is None else compressed_dtype
        self.device = torch.device(device)
        self.work = working_dtype(dtype)
        self.rotary = self.settings.rotary
        self.scores = Scores(self.settings, schedule.ratio, self.work)
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
        """Takes back the last tokens of every row, as if they had never been appended.

        Refused with "most_used": attention that was counted cannot be taken back.
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
        """Appends T tokens and returns their outputs, [B, H, T, Dv].

        Args:
            q: [B, H, T, D], without rotation.
            k: [B, Hkv, T, D], without rotation, or rotated with `keys="rotated"`.
            v: [B, Hkv, T, Dv].
            lengths: of the rows; tokens behind are padding, and their outputs zero.
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
        """Appends T tokens, k [B, Hkv, T, D] and v [B, Hkv, T, Dv] as for `step`."""
        if self.by_usage:
            raise ValueError("ctx.reference.KVMemory.append: compressor must not be 'most_used'")
        for b, row in enumerate(self.rows):
            for i in range(k.shape[2]):
                self._append_token(row, k[b, :, i], v[b, :, i])

    @torch.no_grad()
    def attend(self, q: Tensor, *, return_region_weights: bool = False) -> Any:
        """Outputs of the last T tokens, [B, H, T, Dv], given their queries q [B, H, T, D]."""
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
        if self.settings.keys == "plain":
            key = self.rotary.rotate(key.to(self.work), t)
        row.tokens.append(Pair(key.to(self.dtype, copy=True), value.to(self.dtype, copy=True)))
        row.usage.append(torch.zeros(self.kv_heads, dtype=self.work))
        row.rewindable = min(row.rewindable + 1, self.max_rewind)

    def _make_slot(self, row: Row, g: int) -> StoredSlot:
        keys, values = [], []
        members = self.schedule.members(g)
        for j in range(members.start - self.overlap, members.stop):
            if j < 0:
                keys.append(torch.zeros(1, self.kv_heads, self.head_dim, dtype=self.work))
                values.append(torch.zeros(1, self.kv_heads, self.value_dim, dtype=self.work))
                continue
            token = row.tokens[j]
            keys.append(self.rotary.unrotate(token.key.to(self.work), j)[None])
            values.append(token.value.to(self.work)[None])
        slot = compress_group(self.compress, keys, values, self.schedule.ratio)
        clock = g if self.settings.distance == "slot" else self.schedule.centre(g)
        key = self.rotary.rotate(slot.key[0], clock)
        return StoredSlot(
            self._round_slot(key), self._round_slot(slot.value[0]), slot.mass[0].to(self.work)
        )

    def _round_slot(self, x: Tensor) -> Tensor:
        """A slot [Hkv, width] as stored; int8 stores multiples of 1/127 of its largest number."""
        if self.compressed_dtype != torch.int8:
            return x.to(self.compressed_dtype, copy=True)
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.where(scale > 0, (x / scale).round(), 0.0).clamp(-127, 127) * scale

    def _choose_slots(self, row: Row, groups: range) -> None:
        """The most used of all tokens that leave now become slots, unchanged."""
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
                clock = g if self.settings.distance == "slot" else j
                key = self.rotary.unrotate(row.tokens[j].key[None, head].to(self.work), j)
                keys.append(self.rotary.rotate(key, clock)[0])
                values.append(row.tokens[j].value[head].to(self.work))
            pair = self._round_slot(torch.stack(keys)), self._round_slot(torch.stack(values))
            row.slots.append(StoredSlot(*pair, mass=torch.zeros(self.kv_heads, dtype=self.work)))
            row.positions.append(list(tokens))

    def _attend_token(
        self, row: Row, t: int, q: Tensor, count: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The output [H, Dv] of the query q [H, D] of token t, and what share of its attention
        each region gets, [H, 3].

        Every region has a clock, the position that the query is rotated to before it is multiplied
        with the keys of the region.

        `count`: the attention of the query is added to the usage of the window's tokens.
        """
        sinks, groups, tokens = self.schedule.visible(t)
        sink_clock = group_clock = t
        if self.settings.distance == "slot":
            behind_begin = t - self.schedule.window_begin(t)
            group_clock = behind_begin + self.schedule.groups(t)
            sink_clock = behind_begin + self.schedule.slots(t) + self.schedule.sinks
        slots = [row.slots[g] for g in groups]
        regions: list[tuple[int, Sequence[Pair | StoredSlot]]] = [
            (sink_clock, [row.tokens[j] for j in sinks]),
            (group_clock, slots),
            (t, [row.tokens[j] for j in tokens]),
        ]
        query = q.to(self.work)[None]
        content = self.scores.content_query(query)
        products, values = [], []
        for clock, stored in regions:
            if stored:
                keys = torch.stack([pair.key for pair in stored], 1).to(self.work)
                products.append(products_of(self.rotary.rotate(content, clock), keys[None]))
                values += [pair.value.to(self.work) for pair in stored]
        among_keys = range(len(sinks), len(sinks) + len(groups))  # where the slots stand
        distances = torch.tensor(self.schedule.distances(t, self.settings.distance))
        distances = distances.double().expand(1, self.kv_heads, -1).clone()
        if self.by_usage and self.settings.distance == "token":  # every head has slots of its own
            for i, g in zip(among_keys, groups, strict=True):
                distances[0, :, i] = t - torch.tensor(row.positions[g])
        mass = None
        if self.settings.slot_mass and slots:
            mass = torch.stack([slot.mass for slot in slots], 1)[None]
        weights = self.scores.weights(query, torch.cat(products, 2), distances, among_keys, mass)
        if count:
            of_kv_heads = weights.reshape(self.kv_heads, -1, weights.shape[2]).mean(1)
            for j, weight in zip(tokens, of_kv_heads[:, among_keys.stop :].unbind(1), strict=True):
                row.usage[j] = row.usage[j] + weight
        output = mix(weights, torch.stack(values, 1)[None])[0]
        return output, region_weights_of(weights, among_keys)[0]

    @property
    def seen(self) -> Tensor:
        """Tokens that each stream has appended, int64 [B]."""
        return torch.tensor([len(row.tokens) for row in self.rows], dtype=torch.int64)

    @property
    def rewindable(self) -> Tensor:
        """How many of them can be taken back, int64 [B]."""
        return torch.tensor([row.rewindable for row in self.rows], dtype=torch.int64)

    @property
    def margin(self) -> float:
        """The smallest difference in usage between a token that became a slot and one that did
        not: a computation with larger rounding errors may choose other tokens.
        """
        return min(row.margin for row in self.rows)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The lists laid out as the real memory lays them out (rings.py)."""
        return rings_of(self)

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
