"""CompressiveAttention: multi-head attention over a compressive memory, as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _check, attention_calls, attention_inputs, engine, memory_check
from ctx.attention_calls import Call
from ctx.compression import Compressor, as_compressor, make_compressor
from ctx.constants import log_ratio, slopes_of
from ctx.engine import Law, Plan, Scores
from ctx.finite import apart
from ctx.hidden import as_stored
from ctx.layer_options import check_by_usage, check_options
from ctx.losses import Decoder
from ctx.memory import Memory
from ctx.memory_check import widened
from ctx.padding import from_right_padded, mask_of, to_right_padded
from ctx.positions import Relative
from ctx.schedule import Schedule
from ctx.spec import Spec, layer_spec
from ctx.state import StateShape, empty_clock, slot_dtypes

__all__ = ["CompressiveAttention"]

_WHERE = "ctx.CompressiveAttention"
#: Attributes that a memory's specification is made of, besides the compressor.
_SPECIFYING = frozenset(
    (
        "_schedule",
        "distance",
        "max_rewind",
        "memory_content",
        "position",
        "rotary_base",
        "rotary_dim",
        "rotary_interleaved",
    )
)


class CompressiveAttention(nn.Module):
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
        settings: optionally first, a ``ctx.AttentionSettings``; it stands for the sizes of the
            memory and for the options that it has fields of, which are not given besides.
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

    spec: Spec
    position: str | None
    distance: str
    memory_content: str
    compressor_grad: str
    aux_loss: str | None
    rotary_base: float
    rotary_interleaved: bool
    compressed_bias_init: float | None
    dropout: float
    max_rewind: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        window: int,
        compressed: int,
        ratio: int,
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
        options = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "compressor": compressor,
            "compressor_kernel": compressor_kernel,
            "memory_content": memory_content,
            "position": position,
            "relative_dim": relative_dim,
            "distance": distance,
            "compressed_bias": compressed_bias,
            "compressed_bias_init": compressed_bias_init,
            "compressor_grad": compressor_grad,
            "aux_loss": aux_loss,
            "dropout": dropout,
            "bias": bias,
            "rotary_base": rotary_base,
            "rotary_dim": rotary_dim,
            "rotary_interleaved": rotary_interleaved,
            "max_rewind": max_rewind,
        }
        super().__init__()
        schedule = Schedule(window, compressed, ratio, segment, sinks)  # type: ignore[arg-type]
        options = check_options(options, (schedule.ratio,), _WHERE)
        if device is not None:
            _check.device(device, _WHERE)
        if dtype is not None and not _check.dtype(dtype, _WHERE).is_floating_point:
            raise TypeError(f"{_WHERE}: dtype must be floating point, got {dtype}")
        self._set(schedule, options, {"device": device, "dtype": dtype})

    def _set(self, schedule: Schedule, options: dict[str, Any], made: dict[str, Any]) -> None:
        """Attributes and parameters, from options that have been checked."""
        embed_dim, num_heads = options["embed_dim"], options["num_heads"]
        kv_heads = num_heads if options["num_kv_heads"] is None else options["num_kv_heads"]
        head_dim = embed_dim // num_heads
        self._schedule = schedule
        self.embed_dim, self.head_dim = embed_dim, head_dim
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        for name in (
            "position",
            "distance",
            "compressor_grad",
            "rotary_base",
            "rotary_interleaved",
            "dropout",
            "max_rewind",
            "compressed_bias_init",
            "memory_content",
            "aux_loss",
        ):
            setattr(self, name, options[name])
        width = head_dim if options["rotary_dim"] is None else options["rotary_dim"]
        self.rotary_dim: int = width if self.position == "rotary" else 0
        #: What is remembered of a token: heads, key width, value width.
        hidden = self.memory_content == "hidden"
        self._stored = (1, embed_dim, 0) if hidden else (kv_heads, head_dim, head_dim)
        bias = options["bias"]
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **made)
        self.k_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=bias, **made)
        self.v_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=bias, **made)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **made)
        compressor = options["compressor"]
        if isinstance(compressor, str):
            heads, widths, kernel = self._stored[0], self._stored[1:], options["compressor_kernel"]
            compressor = make_compressor(
                compressor, heads, schedule.ratio, *widths, kernel=kernel, **made
            )
        if not isinstance(compressor, nn.Module):
            raise TypeError(f"{_WHERE}: compressor must be a name or a module, got {compressor!r}")
        self.compressor: Compressor = compressor  # type: ignore[assignment]  # see __setattr__
        if self.aux_loss == "autoencoding":
            self.decoder = Decoder(self._stored[0], schedule.ratio, *self._stored[1:], **made)
        self._bias_kind = options["compressed_bias"]
        if self._bias_kind == "learned":
            self.register_parameter("compressed_bias", nn.Parameter(torch.empty(num_heads, **made)))
        self.relative: Relative | None = None
        if self.position == "relative":
            given = options["relative_dim"]
            sinusoids = embed_dim if given is None else given
            self.relative = Relative(num_heads, head_dim, sinusoids, **made)
        self._reset_compression()

    def reset_parameters(self) -> None:
        """First values of everything, also of what was made on the meta device."""
        for child in self.children():
            whole = isinstance(child, Compressor)  # which sees to what it owns
            for module in [child] if whole else reversed([*child.modules()]):
                begin = getattr(module, "reset_parameters", None)
                if callable(begin):
                    begin()
        self._reset_compression()

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module does; a compressor is made one, and what follows from settings follows."""
        if name != "compressor":
            super().__setattr__(name, value)
            if name in _SPECIFYING and "spec" in self.__dict__:
                self._specify()
            return
        if not isinstance(value, nn.Module):
            raise TypeError(f"{_WHERE}: compressor must be a module, got {value!r}")
        compressor = as_compressor(value, self._stored[0], self.schedule.ratio, *self._stored[1:])
        if compressor.by_usage:
            check_by_usage(vars(self), _WHERE)
        super().__setattr__(name, compressor)
        self._specify()

    def _specify(self) -> None:
        """What follows from settings and compressor: the specification of the layer's memories, the
        shapes of their tensors, and the law of what a query sees and of what is stored.
        """
        compressor, rotary = self.compressor, self._rotary()
        self.__dict__["spec"] = Spec(
            (
                layer_spec(
                    self._schedule,
                    compressor,
                    self._stored,
                    self.max_rewind,
                    content=self.memory_content,
                    position=self.position,
                    distance=self.distance,
                    rotary=rotary,
                ),
            )
        )
        heads, *widths = self._stored
        self._shape = StateShape.of(
            self._schedule,
            heads,
            widths[0],
            widths[1],
            self.max_rewind,
            overlap=compressor.overlap,
            used=compressor.by_usage,
        )
        self.law = Law((*self._schedule.numbers, compressor.overlap), self.distance, *rotary)
        hidden = self.memory_content == "hidden"  # inputs are stored as they are
        self.stored_law = self.law._replace(rotary_dim=0) if hidden else self.law

    def _rotary(self) -> tuple[int, float, bool]:
        return (self.rotary_dim, self.rotary_base, self.rotary_interleaved)

    def _reset_compression(self) -> None:
        if self._bias_kind == "learned":
            with torch.no_grad():
                ratio, start = self.schedule.ratio, self.compressed_bias_init
                first = math.log(ratio) if start is None else start
                self.get_parameter("compressed_bias").fill_(first)

    @property
    def compressed_bias(self) -> Tensor | None:
        """What is added to the scores of compressed slots, [H]: a parameter where it is learned,
        the constant log ratio in the module's dtype, or None.

        A constant is made of the settings when it is asked for, and is no part of the state.
        """
        if self._bias_kind == "learned":
            try:
                return self._parameters["compressed_bias"]
            except KeyError:
                raise AttributeError("compressed_bias") from None
        return _copied(self._bias_on(self._place()[1]))

    @property
    def alibi_slopes(self) -> Tensor | None:
        """Slopes of ``position="alibi"``, [H] in the module's dtype, else None; a constant that is
        made of the settings when it is asked for.
        """
        return _copied(self._slopes_on(self._place()[1]))

    def _bias_on(self, device: torch.device) -> Tensor | None:
        if self._bias_kind == "learned":
            return self.compressed_bias
        if self._bias_kind == "none":
            return None
        return log_ratio(self.schedule.ratio, self.num_heads, self._place()[0], device)

    def _slopes_on(self, device: torch.device) -> Tensor | None:
        if self.position != "alibi":
            return None
        return slopes_of(self.num_heads, self._place()[0], device)

    def _place(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and device of the module's numbers: of keys, else of whatever it has, else
        torch's own. Where parameters are brought in for each call, the device that they go to.
        """
        dtype, device = _check.numbers_of(self.k_proj, self)
        if device is None or device.type == "meta":
            device = attention_inputs.execution_device(self.k_proj, self) or device
        return dtype or torch.get_default_dtype(), device or torch.get_default_device()

    @property
    def schedule(self) -> Schedule:
        """Sizes of the memory. Another of the same ratio may be assigned, e.g. to evaluate without
        compressed slots; a memory belongs to the schedule that it was made with.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def init_memory(
        self,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        compressed_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """An empty memory for ``batch_size`` streams, a :class:`ctx.Memory` of one layer.

        With ``memory_content="hidden"`` the inputs stand where keys do, [B, 1, capacity, E], and
        values have width 0.

        Args:
            batch_size: rows B.
            dtype: of pairs; default that of the parameters.
            compressed_dtype: of compressed slots, as in :class:`ctx.KVMemory`; default ``dtype``.
            device: default that of the parameters.

        Raises:
            ValueError, TypeError: ``batch_size`` is below 1, or a dtype is none that can be.
        """
        where = f"{_WHERE}.init_memory"
        batch_size = _check.integer(batch_size, "batch_size", where)
        if batch_size < 1:
            raise ValueError(f"{where}: batch_size must be at least 1, got {batch_size}")
        if dtype is not None and not _check.dtype(dtype, where).is_floating_point:
            raise TypeError(f"{where}: dtype must be floating point, got {dtype}")
        if device is not None:
            device = _check.device(device, where)
        own = self._place()
        dtype, device = dtype or own[0], device or own[1]
        if compressed_dtype is not None:
            allowed = slot_dtypes(dtype)
            if _check.dtype(compressed_dtype, where, "compressed_dtype") not in allowed:
                names = ", ".join(map(str, allowed))
                raise TypeError(
                    f"{where}: compressed_dtype must be one of {names}, got {compressed_dtype}"
                )
        rings = self.empty_rings(batch_size, dtype, device, compressed_dtype)
        return Memory(self.spec, *empty_clock(batch_size, device), [rings])

    def empty_rings(
        self,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        slots: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Rings of new streams, in the order of :data:`ctx.state.TENSORS`."""
        return self._shape.zeros(rows, dtype, device, slots)

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
        if memory is not None:
            memory = widened(memory)
        if alone:
            self._check(x, memory, lengths, mask, reset_at, update, return_aux)
        if memory is not None and update:
            attention_inputs.refuse_recomputation(x, _WHERE)
        if plan is None:
            if mask is not None:
                x, lengths = to_right_padded(x, mask)
                if reset_at is not None:
                    reset_at, _ = to_right_padded(reset_at, mask)
            clock = empty_clock(len(x), x.device) if memory is None else memory.clock
            in_place = update and memory is not None and not torch.is_grad_enabled()
            rows = (x.shape[1], lengths, reset_at)
            plan = engine.plans([self], clock, *rows, in_place)[self.law]
        lengths, grad = plan.lengths, torch.is_grad_enabled()
        if lengths is not None and (grad or attention_calls.is_forward_mode()):
            # Padding has no influence on gradients, be it NaN.
            x = x.masked_fill(~mask_of(lengths, x.shape[1]).unsqueeze(-1), 0.0)
        in_place = plan.in_place
        if in_place and passed is not memory:
            passed.rings[0][:] = memory.rings[0]
            memory = passed
        rings = None if memory is None else memory.rings[0]
        call = Call(plan, rings, update, in_place, return_region_weights)
        q = self._heads(apart(x, self.q_proj)[0], self.num_heads)
        dtype, hidden = q.dtype, self.memory_content == "hidden"
        k, v = as_stored(x) if hidden else self.pairs(x.unsqueeze(1))
        if rings is not None and rings[0].dtype != k.dtype:
            k, v = k.to(rings[0].dtype), v.to(rings[0].dtype)
            q = q if hidden else q.to(rings[0].dtype)
        if return_aux:
            aux = attention_calls.auxiliary(self, q, k, v, call)
        if alone and in_place:
            engine.begin(plan, memory.clock)
        if hidden:
            out, weights, rings = attention_calls.projecting(self, q, k, v, call, x.dtype)
        elif attention_calls.streams(self, call):
            out, weights, rings = attention_calls.streaming(self, q, k, v, call)
        else:
            out, weights, rings = attention_calls.differentiable(self, q, k, v, call)
        (y,) = apart(out.to(dtype).transpose(1, 2).flatten(2), self.out_proj)
        if self.training and self.dropout:
            y = nn.functional.dropout(y, self.dropout)
        if x.shape[1] == 0 and grad:
            y = y + self._nothing(y) + x.sum().to(y.dtype)  # what made x wants a gradient, too
        if mask is not None:
            y = from_right_padded(y, mask)
            if return_region_weights:
                weights = from_right_padded(weights.transpose(1, 2), mask).transpose(1, 2)
        elif lengths is not None:
            y = y.masked_fill(mask_of(lengths, y.shape[1]).logical_not().unsqueeze(-1), 0.0)
        if not update:
            memory = passed
        elif not in_place:
            memory = Memory(self.spec, *(engine.ends(plan) if alone else plan.clock), [rings])
        elif alone:
            engine.advance(plan, memory.clock)
        return (
            y,
            memory,
            *([aux] if return_aux else []),
            *([weights] if return_region_weights else []),
        )

    def _check(
        self,
        x: Tensor,
        memory: Memory | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        reset_at: Tensor | None,
        update: bool,
        return_aux: bool,
    ) -> None:
        """Raises where an argument of :meth:`forward` does not fit; in a compiled graph only where
        the memory is another's.
        """
        _check.flag(update, "update", _WHERE)
        if return_aux and (self.aux_loss is None or reset_at is not None):
            got = "aux_loss=None" if self.aux_loss is None else "reset_at"
            raise ValueError(
                f"{_WHERE}: return_aux must go with an aux_loss and without reset_at, got {got}"
            )
        if torch.compiler.is_compiling():
            if memory is not None:
                memory_check.kind(memory, self.spec, _WHERE)
            return
        attention_inputs.check(self, x, lengths, mask, reset_at, _WHERE)
        if memory is not None:
            memory_check.call(memory, self.spec, x.shape[0], x.device, _WHERE, "x")

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.reshape(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, 1, n, E] to un-rotated keys and values [B, Hkv, n, D]."""
        k, v = apart(x[:, 0], self.k_proj, self.v_proj)
        return self._heads(k, self.num_kv_heads), self._heads(v, self.num_kv_heads)

    def constant_pairs(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """:meth:`pairs` of inputs of any dtype, by constant weights."""
        made = []
        for projection in (self.k_proj, self.v_proj):
            rows = x[:, 0].to(dtype)
            weights = {name: w.detach() for name, w in projection.named_parameters()}
            if any(w.is_meta for w in weights.values()) and not rows.is_meta:
                y = projection(rows)  # weights that are brought in for the call are not trained
            else:
                y = torch.func.functional_call(projection, weights, (rows,))
            made.append(self._heads(y, self.num_kv_heads).to(x.dtype))
        return made[0], made[1]

    def scores(self, device: torch.device) -> Scores:
        """What scores are made of besides queries and keys; constants on that device."""
        relative = [] if self.relative is None else [*self.relative()]
        bias, slopes = self._bias_on(device), self._slopes_on(device)
        return Scores(bias, slopes, relative, self.head_dim**-0.5)

    def _nothing(self, like: Tensor) -> Tensor:
        """Zero, as a sum over no number of every parameter: gives each a gradient of zeros where a
        call has no token, as data-parallel training expects of every call.
        """
        none = [p.flatten()[:0].to(like.dtype).sum() for p in self.parameters() if p.requires_grad]
        return sum(none, start=like.new_zeros(()))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"{self.schedule}, "
            f"position={self.position!r}, distance={self.distance!r}"
        )


def _copied(constant: Tensor | None) -> Tensor | None:
    """A constant that the caller may write to: the one that layers compute with is shared."""
    return None if constant is None else constant.clone()
