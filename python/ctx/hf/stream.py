"""The memory of all full-attention layers of a model, on one clock, and the calls that write it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ctx import engine, memory_check
from ctx.hf import columns
from ctx.hf.forward import Forward, mask_of_call
from ctx.hf.layer_law import Geometry, LayerLaw
from ctx.memory import Memory
from ctx.spec import Spec
from ctx.state import PLACE, writing

__all__ = ["Stream"]

_WHERE = "ctx.hf.CompressiveCache"


class Stream:
    """What the layers of a :class:`ctx.hf.CompressiveCache` share.

    Args:
        laws: one per full-attention layer, first layer first.
        dtype, compressed_dtype: what pairs and slots are stored as; None: as the model's keys.
    """

    def __init__(
        self,
        laws: list[LayerLaw],
        dtype: torch.dtype | None,
        compressed_dtype: torch.dtype | None,
    ) -> None:
        self.use(laws)
        self.dtype, self.compressed_dtype = dtype, compressed_dtype
        self.memory: Memory | None = None
        #: Tokens and padding that have come, the length of a 2-D mask.
        self.columns = 0
        #: The last so many of them were tokens in every row.
        self.unpadded = 0
        self.forward: Forward | None = None
        #: What the layer before was given, and its attention has not come for.
        self.pending: int | None = None

    def use(self, laws: list[LayerLaw]) -> None:
        """Goes on by these laws, which must be the memory's."""
        self.laws = laws
        #: Whether rings are smaller than asked for.
        self.small = any(law.schedule != law.asked for law in laws)

    # ---- what a call needs

    def spec(self, geometry: Geometry, device: torch.device) -> Spec:
        """The specification of a memory for a model that stores so much of a token."""
        for law in self.laws:
            law.measure(geometry, device, _WHERE)
        return Spec(tuple(law.spec for law in self.laws))

    def receive(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Says that a layer's keys and values have come: makes the memory for the first ones.

        Raises:
            ValueError, RuntimeError: they do not fit the memory, or it is not this layer's turn.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                f"{_WHERE}: keys must not require a gradient, which a memory does not record; call "
                "the model under torch.no_grad()"
            )
        waiting, self.pending = self.pending, None
        if waiting is not None and (layer > 0 or len(self.laws) == 1):
            raise RuntimeError(
                f"{_WHERE}: config must be the model's own (model.config), whose attention is the "
                'one that runs, got one that says "ctx" for a model of another attention'
            )
        if layer == 0:
            self.forward = None
            self._grow(self.columns + k.shape[2])
            self._fit(k, v)
        elif layer != (0 if self.forward is None else self.forward.next):
            raise RuntimeError(
                f"{_WHERE}: layers must come in their order, first to last, in every call, "
                f"got full-attention layer {layer}"
            )
        self.laws[layer].measure((k.shape[1], k.shape[3], v.shape[3]), k.device, _WHERE)

    def _grow(self, tokens: int) -> None:
        """Makes rings that hold all of a stream so far large enough for so many tokens, at least
        twice as large as they were, up to what was asked for. The laws of forks stay as they are.
        """
        last = max(tokens - 1, 0)
        if not self.small or not any(law.schedule.groups(last) for law in self.laws):
            return
        laws = [law.sized(max(tokens, 2 * law.schedule.window)) for law in self.laws]
        if self.memory is not None:
            self.memory = self.memory.resized([law.schedule for law in laws])
            for law, before in zip(laws, self.laws, strict=True):
                assert before.geometry is not None
                law.measure(before.geometry, self.memory.seen.device, _WHERE)
        self.use(laws)

    def _fit(self, k: Tensor, v: Tensor) -> None:
        """Makes a memory where there is none, or only an empty one of another batch."""
        batch, device, held = k.shape[0], k.device, self.memory
        if held is not None:
            same = held.batch_size == batch and held.seen.device == device
            if self.columns and not same:
                raise ValueError(
                    f"{_WHERE}: batch must be that of the cache, {held.batch_size} rows on "
                    f"{held.seen.device}, until it is reset; got {batch} on {device}"
                )
            if same:
                memory_check.call(held, held.spec, batch, device, _WHERE, "keys")
                return
        spec = self.spec((k.shape[1], k.shape[3], v.shape[3]), device)
        dtype = k.dtype if self.dtype is None else self.dtype
        self.memory = Memory.empty(spec, batch, dtype, device, self.compressed_dtype)

    def _begin(self, tokens: int, mask: Any, position_ids: Tensor | None) -> Forward:
        memory = self.memory
        assert memory is not None
        now = mask_of_call(mask, memory, tokens, self.columns, _WHERE)
        if position_ids is None and (now is not None or self.unpadded < self.columns):
            raise ValueError(
                f"{_WHERE}: position_ids must reach the attention where rows are padded, got a "
                "model that does not pass them on"
            )
        self.forward = Forward(self.laws, memory, tokens, now, position_ids, _WHERE)
        return self.forward

    def _end(self, forward: Forward) -> None:
        """Counts the call once every layer has written."""
        forward.next += 1
        if forward.next < len(self.laws):
            return
        engine.advance(forward.plan)
        self.columns += forward.tokens
        self.unpadded = 0 if forward.mask is not None else self.unpadded + forward.tokens
        self.forward = None

    # ---- the two ways in which a layer attends

    @torch.no_grad()
    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        position_ids: Tensor | None,
        scale: float | None,
        softcap: float | None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Writes a layer's pairs and attends, on the library's own kernels.

        Args:
            q, k, v: [B, H, T, D], [B, Hkv, T, D] and [B, Hkv, T, Dv]; q and k as the model rotated
                them.
            mask: of the whole stream, see :func:`ctx.hf.forward.mask_of_call`.
            sink_logits: [H], scores of nothing, which take their share of the softmax.

        Returns:
            [B, T, H, Dv]; zero at padding.
        """
        self.pending = None
        law, memory, dtype = self.laws[layer], self.memory, q.dtype
        assert memory is not None
        forward = self._begin(q.shape[2], mask, position_ids) if layer == 0 else self.forward
        assert forward is not None
        plan, rings = forward.plans[law.plan_key], memory.rings[layer]
        stored = rings[0].dtype
        q, k, v = (forward.moved(x) for x in (q, k, v))
        q, k = forward.queries(q, law).to(stored), forward.keys(k, law).to(stored)
        v = v.to(stored)
        if sink_logits is not None:
            self._check_sink_logits(law, rings)
        custom = sink_logits is not None or not law.compressor.in_engine
        numbers = law.scored(scale, softcap, custom)
        operands, scores = law.operands(), law.scores(q)
        if custom:
            groups = engine.evicted_groups(k, v, plan, rings, numbers)
            operands = law.compressor.slots(*groups, mass=law.settings.slot_mass)
        if layer == 0:
            engine.begin(plan)
        if sink_logits is None:
            out = engine.step(q, k, v, plan, rings, numbers, operands, scores, False)[0]
        else:
            pairs, read = (q, k, v), law.scored(scale, softcap)
            out, total, _ = engine.attend(*pairs, plan, rings, read, operands, scores, False)
            share = torch.sigmoid(total - sink_logits.to(total)[:, None])
            out = out * share[..., None].to(out.dtype)
            engine.append(k, v, plan, rings, numbers, operands)
        self._end(forward)
        return forward.moved_back(out.to(dtype))

    @staticmethod
    def _check_sink_logits(law: LayerLaw, rings: list[Tensor]) -> None:
        """Raises where attention would not be the same however a text is cut."""
        if law.by_usage:
            raise ValueError(
                f"{_WHERE}: compressor must not be 'most_used' for a model with sink logits "
                "(s_aux), which take a share of the attention, got 'most_used'"
            )
        if rings[PLACE["compressed_keys"]].dtype != rings[0].dtype:
            raise ValueError(
                f"{_WHERE}: compressed_dtype must be that of the pairs for a model with sink "
                f"logits (s_aux), got {rings[PLACE['compressed_keys']].dtype}"
            )

    @torch.no_grad()
    def laid_out(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's pairs, and gives what attention of transformers' own reads: the memory
        and the new pairs, one behind the other.

        Raises:
            ValueError: the law is not that every query of the call sees all of the memory.
        """
        law, memory, tokens = self.laws[layer], self.memory, k.shape[2]
        assert memory is not None
        if layer == 0:
            columns.check(self.laws, memory, self.columns, tokens, _WHERE)
        forward = self._begin(tokens, None, None) if layer == 0 else self.forward
        assert forward is not None
        plan, rings, numbers = forward.plans[law.plan_key], memory.rings[layer], law.law
        stored = rings[0].dtype
        pairs = (k.to(stored), v.to(stored))
        operands = law.operands()
        if not law.compressor.in_engine:
            numbers = law.scored(None, None, True)
            groups = engine.evicted_groups(*pairs, plan, rings, numbers)
            operands = law.compressor.slots(*groups, mass=law.settings.slot_mass)
        if layer == 0:
            engine.begin(plan)
        exact = columns.exact(law, rings, self.columns)
        engine.append(*pairs, plan, rings, numbers, operands)
        slots = columns.slots(law, rings, self.columns)
        self._end(forward)
        parts = zip(*exact[:1], *slots, *exact[1:], (k, v), strict=True)
        keys, values = (torch.cat([x.to(k.dtype) for x in part], 2) for part in parts)
        return keys, values

    # ---- rows

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """In it what :meth:`rewind` did is undone where something else fails."""
        memory, counts = self.memory, (self.columns, self.unpadded)
        clock = None if memory is None else [x.clone() for x in memory.clock]
        try:
            yield
        except BaseException:
            self.columns, self.unpadded = counts
            if memory is not None and clock is not None:
                with writing(memory.seen):
                    for count, before in zip(memory.clock, clock, strict=True):
                        count.copy_(before)
            raise

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows, in this order."""
        if self.memory is not None:
            kind = torch.bool if rows.dtype == torch.bool else torch.int64
            self.memory = self.memory.select(rows.to(self.memory.seen.device, kind))

    def rewind(self, tokens: int) -> None:
        """Takes the last tokens of every row back.

        Raises:
            ValueError: more than can be; nothing has been changed then.
        """
        if self.memory is None or tokens == 0:
            return
        if tokens > self.unpadded:
            raise ValueError(
                f"{_WHERE}.crop: tokens_to_remove must not reach back to padding or to before the "
                f"first token, at least {-self.unpadded}, got {-tokens}"
            )
        self.memory.rewind(tokens)
        self.columns -= tokens
        self.unpadded -= tokens

    def reset(self) -> None:
        """Begins new streams."""
        if self.memory is not None:
            self.memory.reset()
        self.columns = self.unpadded = 0
        self.forward = self.pending = None

    def like(self, spec: Spec, tokens: int) -> Stream:
        """An empty stream whose rings, where they grow, are as large as those of a memory that has
        seen so many tokens, all of which it still has.
        """
        laws, last = self.laws, max(tokens - 1, 0)
        whole = not any(held.schedule.groups(last) for held in spec.layers)
        if whole and len(spec.layers) == len(laws) and all(law.grows for law in laws):
            laws = [law.sized(held.window) for law, held in zip(laws, spec.layers, strict=True)]
        return Stream(laws, self.dtype, self.compressed_dtype)

    def clone(self) -> Stream:
        """Another stream that holds the same; laws and compressors are shared."""
        other = Stream(self.laws, self.dtype, self.compressed_dtype)
        other.memory = None if self.memory is None else self.memory.clone()
        other.columns, other.unpadded = self.columns, self.unpadded
        return other
