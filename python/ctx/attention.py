"""CompressiveAttention: multi-head attention over a compressive memory, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctx import _check, attention_calls, attention_inputs, engine, memory_check
from ctx.attention_calls import Call
from ctx.attention_parts import AttentionParts
from ctx.engine import Plan
from ctx.finite import apart
from ctx.hidden import as_stored
from ctx.layer_options import SETTINGS_ONLY, check_options, with_settings
from ctx.memory import Memory
from ctx.memory_check import widened
from ctx.padding import blanked, moved, moved_back, weights_moved_back
from ctx.schedule import SIZES, Schedule
from ctx.settings import AttentionSettings

__all__ = ["CompressiveAttention"]

_WHERE = "ctx.CompressiveAttention"


class CompressiveAttention(AttentionParts):
    """Causal multi-head self-attention over new tokens, a window, compressed slots and sinks.

    Under grad the call is differentiable, compression included; the carried memory is constant, the
    one passed in is left as it is, and a new one is returned. Under ``torch.no_grad()`` or
    ``torch.inference_mode()`` the memory passed in is written in place and returned. Both give the
    same numbers, however a stream is cut into calls.

    Source: Rae et al. 2019 (arXiv:1911.05507), section 3. Deviations: keys and values are stored
    instead of layer inputs (``memory_content="hidden"`` stores these), positions are rotary (Su et
    al. 2021, arXiv:2104.09864) unless the paper's are asked for, and ``dropout`` acts on the
    module's output, not on attention weights.

    Args:
        settings: a :class:`ctx.AttentionSettings` in place of the sizes of the memory and of the
            options that are fields of it, which must not be given then; or, as a number, embed_dim.
            ``keys`` must be ``"plain"``: a layer makes its own. With ``slot_mass`` a learned bias
            of slots starts at 0 unless ``compressed_bias_init`` says otherwise.
        embed_dim: width E of the input and output.
        num_heads: query heads H; head_dim is E / H.
        num_kv_heads: key/value heads Hkv, a divisor of H; default H.
        window: exact tokens that every query is guaranteed to see behind it.
        compressed: capacity of the compressive memory in slots.
        ratio: tokens per slot.
        segment: eviction happens only at positions that are multiples of it; default ``ratio``.
        sinks: first tokens of a stream that are kept exactly for ever.
        compressor: a name of :data:`ctx.compression.COMPRESSORS` (``"mean"``, ``"max"``,
            ``"conv"``, ``"dilated"``, ``"gated"``, ``"most_used"``), or a module that maps groups
            to slots as those do.
        compressor_kernel: tokens that ``"conv"`` reads for a slot, those left of the group
            included; default ``ratio``.
        memory_content: ``"kv"`` remembers keys and values, and compresses each kv head's own;
            ``"hidden"`` (the paper's) remembers the inputs, E numbers per token, projects them
            with the current weights on every call (slower; the projections get a gradient through
            the memory) and compresses them: the compressor sees one head of width E as keys, and
            values of width 0; not with ``"most_used"``.
        position: ``"rotary"``; ``"relative"``, the paper's, adds a :class:`ctx.positions.Relative`
            to the parameters; ``"alibi"`` adds the constants of :func:`ctx.positions.alibi_slopes`,
            in the module's dtype; or None.
        relative_dim: sines and cosines of ``"relative"``, even; default E, as Transformer-XL has.
        distance: ``"slot"`` or ``"token"``.
        compressed_bias: ``"none"``, ``"log_ratio"`` or ``"learned"`` (per query head, starting at
            ``compressed_bias_init``).
        compressed_bias_init: where the learned bias starts; default log ratio, as a slot stands for
            that many tokens. A low one, such as -4, keeps slots nearly out of attention until the
            model has a use for them. Only with ``compressed_bias="learned"``.
        compressor_grad: ``"task"`` (the task's gradient trains the compressor, and keys and values
            through it) or ``"aux"`` (the paper's: compressed slots are constants to the task; only
            an auxiliary loss trains it).
        aux_loss: what ``forward(..., return_aux=True)`` gives: ``"reconstruction"`` (the paper's
            attention reconstruction), ``"autoencoding"`` (adds a decoder to the parameters), or
            None. See :mod:`ctx.losses`.
        dropout: probability of the dropout of the output, in training mode.
        bias: biases of the four projections.
        rotary_base, rotary_dim, rotary_interleaved: as in :class:`ctx.KVMemory`.
        max_rewind: how many tokens :meth:`ctx.Memory.rewind` can take back.

    Raises:
        ValueError, TypeError: a setting is out of range; the message names it.
    """

    def __init__(
        self,
        settings: AttentionSettings | int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        *,
        embed_dim: int | None = None,
        window: int | None = None,
        compressed: int | None = None,
        ratio: int | None = None,
        segment: int | None = None,
        sinks: int = 0,
        compressor: str | nn.Module = "conv",
        compressor_kernel: int | None = None,
        memory_content: str = "kv",
        position: str | None = "rotary",
        relative_dim: int | None = None,
        distance: str = "slot",
        compressed_bias: str = "learned",
        compressed_bias_init: float | None = None,
        compressor_grad: str = "task",
        aux_loss: str | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        rotary_base: float = 10000.0,
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        max_rewind: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {**locals(), **SETTINGS_ONLY}
        for name in ("self", "__class__", "settings", "device", "dtype"):
            options.pop(name, None)
        super().__init__()
        if isinstance(settings, AttentionSettings):
            options = with_settings(settings, options, _WHERE)
        elif settings is not None:
            if embed_dim is not None:
                raise TypeError(f"{_WHERE}: embed_dim must be given once, got {settings!r}, too")
            options["embed_dim"] = settings
        schedule = Schedule(*(options.pop(name) for name in SIZES))
        options = check_options(options, (schedule.ratio,), _WHERE)
        if device is not None:
            _check.device(device, _WHERE)
        if dtype is not None and not _check.dtype(dtype, _WHERE).is_floating_point:
            raise TypeError(f"{_WHERE}: dtype must be floating point, got {dtype}")
        self._set(schedule, options, {"device": device, "dtype": dtype})

    def forward(
        self,
        x: Tensor,
        memory: Memory | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset_at: Tensor | None = None,
        update: bool = True,
        return_aux: bool = False,
        return_region_weights: bool = False,
        plan: Plan | None = None,
    ) -> Any:
        """Attends from T new tokens per row to the memory and to themselves, and remembers them.

        Args:
            x: [B, T, E], floating point.
            memory: what ``init_memory`` or an earlier call returned; None: every row begins a new
                stream. It may be kept in another dtype than ``x``. Under grad it must not be
                written to before the call's backward, which reads it; autograd notices.
            lengths: int64 [B]: row b is its first ``lengths[b]`` tokens, the rest is padding.
            mask: bool [B, T], true at tokens: as ``lengths``, for padding on the left or anywhere.
            reset_at: bool [B, T], true where a token is the first of a new stream (a document of a
                packed batch), which sees nothing of what its row held before.
            update: False reads the memory and does not write it: the output is the same, and the
                memory returned is the one passed in, bit for bit as it was (None stays None). For
                scoring candidates, bootstrapping a value, or validating over a training memory.
            return_aux: also return the auxiliary loss of this call, a scalar whose gradient reaches
                the compressor (and the decoder) only; not together with ``reset_at``.
            return_region_weights: also return the share of its attention that every query gives to
                sinks, compressed slots and window, for inspection: [B, H, T, 3], adding up to one,
                zero at padding, constant, in float32 (float64 for float64).
            plan: of a model, whose call this is a part of: arguments have been checked, ``lengths``
                and ``reset_at`` are the plan's, and the model advances the clock.

        Returns:
            The output [B, T, E], zero at padding, and the memory after these tokens: a new one
            under grad, the one passed in otherwise (always with ``update=False``); then the loss
            with ``return_aux``, then the shares with ``return_region_weights``. A call without grad
            that is interrupted leaves the memory as it was before, or refused from then on where
            the rings no longer hold that.

        Raises:
            ValueError, TypeError: an argument does not fit this module; nothing has been written
                then.
        """
        passed, alone = memory, plan is None
        memory = widened(memory)
        if alone:
            given = (x, memory, lengths, mask, reset_at)
            attention_inputs.check(self, _WHERE, *given, update=update, return_aux=return_aux)
        if memory is not None and update:
            attention_inputs.refuse_recomputation(x, _WHERE)
        if plan is None:
            x, lengths, reset_at = moved(x, mask, lengths, reset_at)
            plans = engine.plans([self], memory, x, lengths, reset_at, update)
            plan = plans[self.plan_key]
        lengths, grad = plan.lengths, torch.is_grad_enabled()
        if lengths is not None and (grad or attention_calls.is_forward_mode()):
            # Padding has no influence on gradients, be it NaN.
            x = blanked(x, lengths)
        in_place = plan.in_place
        memory = memory_check.written(passed, memory, in_place)
        rings = None if memory is None else memory.rings[0]
        call = Call(plan, rings, update, in_place, return_region_weights)
        q = self._heads(apart(x, self.q_proj)[0], self.num_heads)
        dtype, hidden = q.dtype, self.memory_content == "hidden"
        k, v = as_stored(x) if hidden else self._projected(x)
        if rings is not None and rings[0].dtype != k.dtype:
            k, v = k.to(rings[0].dtype), v.to(rings[0].dtype)
            q = q if hidden else q.to(rings[0].dtype)
        if return_aux:
            aux = attention_calls.auxiliary(self, q, k, v, call)
        if alone and in_place:
            engine.begin(plan)
        if hidden:
            out, weights, rings = attention_calls.projecting(self, q, k, v, call, x.dtype)
        elif attention_calls.streams(self, call):
            out, weights, rings = attention_calls.streaming(self, q, k, v, call)
        else:
            out, weights, rings = attention_calls.differentiable(self, q, k, v, call)
        if out.dtype != dtype:
            out = out.to(dtype)
        (y,) = apart(self._joined(out), self.out_proj)
        if self.training and self.dropout:
            y = nn.functional.dropout(y, self.dropout)
        if x.shape[1] == 0 and grad:
            y = y + self._nothing(y) + x.sum().to(y.dtype)  # what made x wants a gradient, too
        y = moved_back(y, mask, lengths)
        if return_region_weights:
            weights = weights_moved_back(weights, mask)
        if not update:
            memory = passed
        elif not in_place:
            assert rings is not None
            memory = Memory(self.spec, *(engine.ends(plan) if alone else plan.clock), [rings])
        elif alone:
            engine.advance(plan)
        return (
            y,
            memory,
            *([aux] if return_aux else []),
            *([weights] if return_region_weights else []),
        )
