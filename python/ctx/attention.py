"""CompressiveAttention: multi-head attention over a compressive memory, as a module."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctx import _check, identity
from ctx.compression import (
    COMPRESSORS,
    Compressor,
    MostUsed,
    as_compressor,
    check_kernel,
    make_compressor,
)
from ctx.constants import log_ratio, slopes_of
from ctx.finite import apart
from ctx.hidden import as_stored, pairs_of
from ctx.losses import LOSSES, Decoder, attention_reconstruction, auto_encoding, evictions
from ctx.memory import rotary_width
from ctx.model_memory import keep, kept
from ctx.padding import check_rows, from_right_padded, mask_of, to_right_padded
from ctx.positions import Relative
from ctx.schedule import Schedule
from ctx.state import STATE, Memory, StateShape, check_names, ordinary, slot_dtypes

__all__ = ["CompressiveAttention", "Memory"]

_WHERE = "ctx.CompressiveAttention"
#: Attributes that a memory's identity is made of, besides the compressor.
_IDENTIFYING = (
    "_schedule",
    "distance",
    "memory_content",
    "position",
    "rotary_base",
    "rotary_dim",
    "rotary_interleaved",
)


class _Call(NamedTuple):
    """What a call says besides its tokens."""

    lengths: Tensor | None  # int64 [B]
    reset_at: Tensor | None  # bool [B, T]
    memory: Memory | None
    update: bool  # whether the tokens are remembered
    with_region_weights: bool

    @property
    def rows(self) -> tuple[Tensor | None, Tensor | None]:
        """Lengths and resets, as operators take them."""
        return self.lengths, self.reset_at

    @property
    def state(self) -> list[Tensor]:
        """The memory's tensors, as functional operators take them; none of an empty memory."""
        return [] if self.memory is None else [self.memory[name] for name in STATE]


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
        max_rewind: tokens that can be written before the first of them attends; longer calls are
            walked in blocks.

    Raises:
        ValueError, TypeError: a setting is out of range; the message names it.
    """

    _trusted: Memory | None = None

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
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": kv_heads,
            "max_rewind": max_rewind,
        }
        for name, size in sizes.items():
            sizes[name] = _check.integer(size, name, _WHERE)
            if sizes[name] < 1:
                raise ValueError(f"{_WHERE}: {name} must be at least 1, got {size}")
        embed_dim, num_heads, kv_heads, max_rewind = sizes.values()
        if rotary_dim is not None:
            rotary_dim = _check.integer(rotary_dim, "rotary_dim", _WHERE)
        if relative_dim is not None:
            relative_dim = _check.integer(relative_dim, "relative_dim", _WHERE)
        dropout = _check.number(dropout, "dropout", _WHERE)
        rotary_base = _check.number(rotary_base, "rotary_base", _WHERE)
        _check.flag(bias, "bias", _WHERE)
        _check.flag(rotary_interleaved, "rotary_interleaved", _WHERE)
        if device is not None:
            _check.device(device, _WHERE)
        if dtype is not None and not _check.dtype(dtype, _WHERE).is_floating_point:
            raise TypeError(f"{_WHERE}: dtype must be floating point, got {dtype}")
        if embed_dim % num_heads:
            raise ValueError(
                f"{_WHERE}: embed_dim must be a multiple of num_heads = {num_heads}, "
                f"got {embed_dim}"
            )
        if num_heads % kv_heads:
            raise ValueError(
                f"{_WHERE}: num_kv_heads must divide num_heads = {num_heads}, got {kv_heads}"
            )
        if isinstance(compressor, str):
            _one_of("compressor", compressor, tuple(COMPRESSORS))
        _one_of("memory_content", memory_content, ("kv", "hidden"))
        _one_of("distance", distance, ("slot", "token"))
        _one_of("compressed_bias", compressed_bias, ("none", "log_ratio", "learned"))
        if compressed_bias_init is not None:
            compressed_bias_init = bias_start(compressed_bias_init, compressed_bias, _WHERE)
        _one_of("compressor_grad", compressor_grad, ("task", "aux"))
        if aux_loss is not None:
            _one_of("aux_loss", aux_loss, LOSSES)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{_WHERE}: dropout must be at least 0 and below 1, got {dropout}")
        if not (math.isfinite(rotary_base) and rotary_base > 0):
            raise ValueError(
                f"{_WHERE}: rotary_base must be positive and finite, got {rotary_base}"
            )
        head_dim = embed_dim // num_heads
        width = rotary_width(position, rotary_dim, head_dim, _WHERE)
        if not (0 <= width <= head_dim and width % 2 == 0):
            raise ValueError(
                f"{_WHERE}: rotary_dim must be even and at most head_dim = {head_dim}, got {width}"
            )
        sinusoids = embed_dim if relative_dim is None else relative_dim
        if sinusoids < 1 or (position == "relative" and sinusoids % 2):
            raise ValueError(f"{_WHERE}: relative_dim must be even and positive, got {sinusoids}")

        schedule = Schedule(window, compressed, ratio, segment, sinks)  # type: ignore[arg-type]
        called = compressor if isinstance(compressor, str) else "a module"
        ratio = schedule.ratio
        compressor_kernel = check_kernel(
            called, ratio, compressor_kernel, _WHERE, "compressor_kernel"
        )
        self._schedule = schedule
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = (
            embed_dim,
            num_heads,
            kv_heads,
            head_dim,
        )
        self.position, self.distance, self.compressor_grad = position, distance, compressor_grad
        self.rotary_dim, self.rotary_base, self.rotary_interleaved = (
            width,
            rotary_base,
            rotary_interleaved,
        )
        self.dropout, self.max_rewind = dropout, max_rewind
        self.compressed_bias_init = compressed_bias_init
        self.memory_content, self.aux_loss = memory_content, aux_loss
        #: What is remembered of a token: heads, key width, value width.
        self._stored = (
            (1, embed_dim, 0) if memory_content == "hidden" else (kv_heads, head_dim, head_dim)
        )
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **made)
        self.k_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=bias, **made)
        self.v_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=bias, **made)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **made)
        if isinstance(compressor, str):
            heads, widths = self._stored[0], self._stored[1:]
            compressor = make_compressor(
                compressor, heads, ratio, *widths, kernel=compressor_kernel, **made
            )
        if not isinstance(compressor, nn.Module):
            raise TypeError(f"{_WHERE}: compressor must be a name or a module, got {compressor!r}")
        self.compressor: Compressor = compressor  # type: ignore[assignment]  # __setattr__ sees to it
        if aux_loss == "autoencoding":
            self.decoder = Decoder(self._stored[0], ratio, *self._stored[1:], **made)
        self._learns_bias = compressed_bias == "learned"
        self._counts_tokens = compressed_bias == "log_ratio"
        if self._learns_bias:
            self.register_parameter("compressed_bias", nn.Parameter(torch.empty(num_heads, **made)))
        self.relative: Relative | None = None
        if position == "relative":
            self.relative = Relative(num_heads, head_dim, sinusoids, **made)
        self._reset_compression()
        self._identity = self._described()

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
            if name in _IDENTIFYING and "_identity" in self.__dict__:
                self._identity = self._described()
            return
        if not isinstance(value, nn.Module):
            raise TypeError(f"{_WHERE}: compressor must be a module, got {value!r}")
        compressor = as_compressor(value, self._stored[0], self.schedule.ratio, *self._stored[1:])
        for setting, other in (("aux_loss", None), ("memory_content", "kv")):
            got = getattr(self, setting)
            if compressor.by_usage and got != other:
                raise ValueError(
                    f"{_WHERE}: {setting} must be {other!r} for compressor 'most_used', got {got!r}"
                )
        super().__setattr__(name, compressor)
        self.schedule = self._schedule  # the window's ring depends on what a compressor reads

    def _described(self) -> str:
        """The name of the entry that says what this layer's memories are made for."""
        return identity.describe(
            self.schedule,
            self.compressor,
            content=self.memory_content,
            position=self.position,
            distance=self.distance,
            rotary=self._rotary(),
        )

    def _reset_compression(self) -> None:
        if self._learns_bias:
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
        if self._learns_bias:
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
        if self._learns_bias:
            return self.compressed_bias
        if not self._counts_tokens:
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
            device = _execution_device(self.k_proj, self) or device
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
        self._state = StateShape.of(
            schedule,
            *self._stored,
            self.max_rewind,
            overlap=self.compressor.overlap,
            used=self.compressor.by_usage,
        )

    def init_memory(
        self,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        compressed_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """An empty memory for ``batch_size`` streams.

        Returns:
            A dict of tensors: ``window_keys`` [B, Hkv, capacity, D] and ``window_values``,
            ``compressed_keys`` and ``compressed_values``, ``sink_keys`` [B, Hkv, sinks, D] and
            ``sink_values``, of the parameters' dtype and device unless given, and ``seen`` int64
            [B]. With ``memory_content="hidden"`` the inputs stand where keys do, [B, 1, capacity,
            E], and values have width 0. It can be saved, copied and flattened like any dict of
            tensors. One more entry, uint8 [B, 0], says in its name what the memory was made for
            (:mod:`ctx.identity`); a layer with other settings refuses it.

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
        return self._empty(batch_size, dtype, device, compressed_dtype)

    def _empty(
        self,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        slots: torch.dtype | None = None,
    ) -> Memory:
        memory = self._state.zeros(rows, dtype, device, slots)
        with ordinary():
            return memory | identity.entry(self._identity, rows, device)

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
    ) -> Any:
        """Attends from T new tokens per row to the memory and to themselves, and remembers them.

        Args:
            x: [B, T, E], floating point.
            memory: what an earlier call returned; None: every row begins a new stream. It may be
                kept in another dtype than ``x``. Under grad it must not be written to before the
                call's backward, which reads it; autograd notices.
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

        Returns:
            The output [B, T, E], zero at padding, and the memory after these tokens: a new one
            under grad, the one passed in otherwise (always with ``update=False``); then the loss
            with ``return_aux``, then the shares with ``return_region_weights``.

        Raises:
            ValueError, TypeError: an argument does not fit this module; nothing has been written
                then.
        """
        _check.flag(update, "update", _WHERE)
        passed, memory = memory, kept(memory)
        self.check(x, memory, lengths, mask, reset_at, _WHERE)
        if update and memory is not None:
            _refuse_recomputation(x)
        if mask is not None:
            x, lengths = to_right_padded(x, mask)
            if reset_at is not None:
                reset_at, _ = to_right_padded(reset_at, mask)
        records = torch.is_grad_enabled() or _is_forward_mode()
        if lengths is not None and records:  # padding has no influence on gradients, be it NaN
            x = x.masked_fill(~mask_of(lengths, x.shape[1]).unsqueeze(-1), 0.0)
        if update and passed is not None and not torch.is_grad_enabled():
            keep(passed, memory)
            memory = passed
        call = _Call(lengths, reset_at, memory, update, return_region_weights)
        q = self._heads(apart(x, self.q_proj)[0], self.num_heads)
        dtype, hidden = q.dtype, self.memory_content == "hidden"
        if hidden:
            k, v = as_stored(x)
        else:
            k, v = self._pairs(x.unsqueeze(1))
        if memory is not None:
            pairs = memory["window_keys"].dtype
            k, v = k.to(pairs), v.to(pairs)
            q = q if hidden else q.to(pairs)
        if return_aux:
            if self.aux_loss is None or reset_at is not None:
                got = "aux_loss=None" if self.aux_loss is None else "reset_at"
                raise ValueError(
                    f"{_WHERE}: return_aux must go with an aux_loss and without reset_at, got {got}"
                )
            aux = self._auxiliary(q, k, v, call)
        if hidden:
            out, usage, memory = self._projecting(q, k, v, call, x.dtype)
        elif self._streams(call):
            out, usage, memory = self._streaming(q, k, v, call)
        else:
            out, usage, memory = self._differentiable(q, k, v, call)
        (y,) = apart(out.to(dtype).transpose(1, 2).flatten(2), self.out_proj)
        y = nn.functional.dropout(y, self.dropout, self.training)
        if x.shape[1] == 0 and torch.is_grad_enabled():
            y = y + self._nothing(y) + x.sum().to(y.dtype)  # what made x wants a gradient, too
        if mask is not None:
            y = from_right_padded(y, mask)
            if return_region_weights:
                usage = from_right_padded(usage.transpose(1, 2), mask).transpose(1, 2)
        elif lengths is not None:
            y = y.masked_fill(mask_of(lengths, y.shape[1]).logical_not().unsqueeze(-1), 0.0)
        if passed is not None and not update:
            memory = passed
        return (
            y,
            memory,
            *([aux] if return_aux else []),
            *([usage] if return_region_weights else []),
        )

    def check(
        self,
        x: Tensor,
        memory: Memory | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        reset_at: Tensor | None,
        where: str,
    ) -> None:
        """Raises what :meth:`forward` would, `where` in front; in a compiled graph only where the
        memory is another's.
        """
        if torch.compiler.is_compiling():
            if isinstance(memory, dict):  # names are constants of a graph
                identity.check(memory, self._identity, where)
            return
        _check.tensors(where, x=x)
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            got = list(x.shape)
            raise ValueError(f"{where}: x must be [B, T, E] = [B, T, {self.embed_dim}], got {got}")
        if x.shape[0] < 1:
            raise ValueError(f"{where}: x must have at least one row, B >= 1, got {list(x.shape)}")
        if x.layout != torch.strided:
            raise ValueError(f"{where}: x must be a dense tensor, got {x.layout}")
        k_proj = self.k_proj
        dtype, device = _check.numbers_of(k_proj, self)
        # meta: the parameters are brought in when the module is called
        if device is not None and x.device != device and device.type != "meta":
            raise ValueError(f"{where}: x must be on {device} as the parameters, got {x.device}")
        # Where numbers are cast on the way, or a projection is another than torch's (an adapter, a
        # quantised layer), it knows better what it takes.
        cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        exact = None
        if not cast:
            exact = dtype if _is_linear(k_proj) else _linear_dtype(self.q_proj, self.v_proj)
        if not x.is_floating_point() or (exact is not None and x.dtype != exact):
            kind = exact or "floating point"
            raise TypeError(f"{where}: x must be {kind} as the parameters, got {x.dtype}")
        check_rows(x.shape[0], x.shape[1], lengths, mask, reset_at, where, x.device)
        trusted, self.__dict__["_trusted"] = self._trusted, None
        if memory is not None and memory is not trusted:
            self.check_memory(memory, x.shape[0], x.device, where, "x")

    def trust(self, memory: Memory | None) -> None:
        """The next call need not check this memory: a model has, before its first layer ran. None:
        whatever memory the next call is given, it checks.
        """
        self.__dict__["_trusted"] = memory  # not by nn.Module's __setattr__, which takes longer

    def check_memory(
        self, memory: Memory, rows: int, device: torch.device, where: str, of: str
    ) -> None:
        """Raises unless `memory` is one of this layer, with the rows and device of input `of`."""
        if not (isinstance(memory, dict) and self._identity in memory):
            check_names(memory, where)
            identity.check(memory, self._identity, where)
        self._state.check(memory, rows, device, where, of)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.reshape(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, 1, n, E] to un-rotated keys and values [B, Hkv, n, D]."""
        k, v = apart(x[:, 0], self.k_proj, self.v_proj)
        return self._heads(k, self.num_kv_heads), self._heads(v, self.num_kv_heads)

    def _constant_pairs(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """:meth:`_pairs` of inputs of any dtype, by constant weights."""
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

    def _rotary(self) -> tuple[int, float, bool]:
        return (self.rotary_dim, self.rotary_base, self.rotary_interleaved)

    def _settings(self) -> tuple[tuple[int, ...], str, int, float, bool]:
        numbers = (*self.schedule.numbers, self.compressor.overlap)
        return (numbers, self.distance, *self._rotary())

    def _stored_settings(self) -> tuple[tuple[int, ...], str, int, float, bool]:
        """:meth:`_settings` of what is stored: inputs are not rotated."""
        numbers, distance, width, base, interleaved = self._settings()
        width = width if self.memory_content == "kv" else 0
        return (numbers, distance, width, base, interleaved)

    def _scores(
        self, with_region_weights: bool = False, device: torch.device | None = None
    ) -> tuple[Any, ...]:
        """What operators that attend take last: operands, settings, scale, region weights.

        Args:
            with_region_weights: the last of them.
            device: of the constants among them; default the parameters'.
        """
        device = device or self._place()[1]
        relative = [] if self.relative is None else [*self.relative()]
        operands = (self._bias_on(device), self._slopes_on(device), relative)
        return (*operands, *self._settings(), self.head_dim**-0.5, with_region_weights)

    def _slots_of(
        self, slots: Sequence[Tensor], block: Tensor | None
    ) -> tuple[list[Tensor], str, list[Tensor]]:
        """What operators that write take of the compressor: parameters, name, slots made.

        The engine makes the slots itself where it can, and is given `slots` and their `block` (what
        the compressor's call made) where it cannot.
        """
        compressor = self.compressor
        if compressor.in_engine:
            return [x.detach() for x in compressor.operands()], compressor.engine_name, []
        assert block is not None
        return [], "custom", [*slots, block]

    def _filled(self, memory: Memory | None, stored: Tensor, *, copied: bool) -> Memory:
        """The memory that a call is going to fill: the one given or its copy, or an empty one."""
        if memory is None:
            return self._empty(stored.shape[0], stored.dtype, stored.device)
        return {name: x.clone() for name, x in memory.items()} if copied else memory

    def _nothing(self, like: Tensor) -> Tensor:
        """Zero, as a sum over no number of every parameter: gives each a gradient of zeros where a
        call has no token, as data-parallel training expects of every call.
        """
        none = [p.flatten()[:0].to(like.dtype).sum() for p in self.parameters() if p.requires_grad]
        return sum(none, start=like.new_zeros(()))

    def _streams(self, call: _Call) -> bool:
        """Whether a memory of pairs is streamed into, or else read where it lies.

        A call that does not write is read like one under grad, but where the numbers depend on the
        writing: slots chosen by usage, or rounded to a dtype of their own. These write a copy.
        """
        if torch.is_grad_enabled() or _is_forward_mode():
            return False
        if call.update:
            return True
        rounded = call.memory is not None and (
            call.memory["compressed_keys"].dtype != call.memory["window_keys"].dtype
        )
        return self.compressor.by_usage or rounded

    def _auxiliary(self, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        evicted = evictions(
            q, k, v, call.lengths, call.state, self.schedule, self._stored_settings()
        )
        if self.aux_loss == "autoencoding":
            return auto_encoding(evicted, self.compressor, self.decoder)
        project = None
        if self.memory_content == "hidden":
            project = partial(self._constant_pairs, dtype=q.dtype)
        return attention_reconstruction(evicted, self.compressor, project=project)

    def _streaming(
        self, q: Tensor, k: Tensor, v: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor, Memory | None]:
        """A call that writes into the rings and then reads them."""
        memory = self._filled(call.memory, k, copied=not call.update)
        state = [memory[name] for name in STATE]
        slots: Sequence[Tensor] = ()
        block = None
        if not self.compressor.in_engine:
            keys, values, block = torch.ops.ctx.evicted_groups(
                k, v, *call.rows, state, *self._settings()
            )
            slots = self.compressor.slots(keys, values)
        scores = self._scores(call.with_region_weights, q.device)
        out, region_weights = torch.ops.ctx.step_(
            q, k, v, *call.rows, *state, *self._slots_of(slots, block), *scores
        )
        return out, region_weights, memory if call.update else call.memory

    def _differentiable(
        self, q: Tensor, k: Tensor, v: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor, Memory | None]:
        """A call that reads the rings where they lie, and then writes into a copy of them."""
        settings, rows, chooses = self._settings(), call.rows, self.compressor.by_usage
        keys, values, block = torch.ops.ctx.evicted_groups(k, v, *rows, call.state, *settings)
        memory = call.memory
        if call.update or chooses:
            with torch.no_grad():
                memory = self._filled(call.memory, k, copied=True)
        after = [] if memory is None else [memory[name] for name in STATE]
        scores, positions = self._scores(call.with_region_weights, q.device), None
        if chooses:  # what stays is what streaming keeps
            with torch.no_grad():
                tokens, operands = _detached((q, k, v)), _detached(scores[:-1])
                chosen, positions = torch.ops.ctx.choose_(
                    *tokens, *rows, *after, *operands, block, keys.shape[2]
                )
            slots = MostUsed.take(keys, chosen), MostUsed.take(values, chosen)
        else:
            slots = self.compressor.slots(keys, values)
        constants = [slot.detach() for slot in slots]
        if self.compressor_grad == "aux":
            slots = (constants[0], constants[1])
        out, region_weights = torch.ops.ctx.attend_sequence(
            q, k, v, *rows, call.state, *slots, positions, *scores
        )
        if not call.update:
            return out, region_weights, call.memory
        with torch.no_grad():
            if not chooses:  # which has written, too
                made = self._slots_of(constants, block)
                torch.ops.ctx.append_(k.detach(), v.detach(), *rows, *after, *made, *settings)
        if torch.is_grad_enabled() or call.memory is None or memory is None:
            return out, region_weights, memory
        for name, held in call.memory.items():  # forward mode without grad: in place
            held.copy_(memory[name])
        return out, region_weights, call.memory

    def _projecting(
        self,
        q: Tensor,
        hidden: Tensor,  # [B, 1, T, E], as stored
        none: Tensor,  # [B, 1, T, 0]
        call: _Call,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Memory | None]:
        """A call over a memory of inputs, under grad and without."""

        def project(x: Tensor) -> tuple[Tensor, Tensor]:
            return self._pairs(x.to(dtype))

        settings, rows = self._stored_settings(), call.rows
        groups, empty, block = torch.ops.ctx.evicted_groups(
            hidden, none, *rows, call.state, *settings
        )
        slots = self.compressor.slots(groups, empty)
        made = [slot.detach() for slot in slots]
        if self.compressor_grad == "aux":
            slots = (made[0], made[1])
        pairs: list[Tensor] = []
        if call.memory is not None:
            pairs = pairs_of(call.memory, self.schedule, self.distance, self._rotary(), project)
        # A slot is rounded as the memory will, so that it never matters which call made it.
        slots = project(slots[0].to(hidden.dtype))
        out, region_weights = torch.ops.ctx.attend_sequence(
            q,
            *project(hidden),
            *rows,
            pairs,
            *slots,
            None,
            *self._scores(call.with_region_weights, q.device),
        )
        if not call.update:
            return out, region_weights, call.memory
        copied = torch.is_grad_enabled()
        with torch.no_grad():
            memory = self._filled(call.memory, hidden, copied=copied)
            state = [memory[name] for name in STATE]
            compressor = ("custom", [*made, block])
            torch.ops.ctx.append_(
                hidden.detach(), none.detach(), *rows, *state, [], *compressor, *settings
            )
        return out, region_weights, memory

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"{self.schedule}, "
            f"position={self.position!r}, distance={self.distance!r}"
        )


def _refuse_recomputation(x: Tensor) -> None:
    """Raises where reentrant checkpointing runs a call that streams into a memory.

    It runs the call without grad in the forward of an autograd function and again in the backward,
    so that the memory would be streamed into twice. An input that carries a graph while grad is off
    is looked at; elsewhere it is accepted as torch's modules accept it.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.requires_grad:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch.autograd.function.BackwardCFunction):
                raise ValueError(
                    f"{_WHERE}: memory must be None or update=False in the forward of an autograd "
                    f"function, which is recomputed and would stream twice, got a memory in "
                    f"{type(first).__name__}: checkpoint with use_reentrant=False"
                )
        frame = frame.f_back


def bias_start(value: Any, kind: str, where: str) -> float:
    """Where a bias of compressed slots starts, as a float.

    Raises:
        TypeError, ValueError: it is no finite number, or the bias is not learned.
    """
    start = _check.number(value, "compressed_bias_init", where)
    if not math.isfinite(start):
        raise ValueError(f"{where}: compressed_bias_init must be finite, got {start}")
    if kind != "learned":
        raise ValueError(
            f"{where}: compressed_bias_init must be None for compressed_bias {kind!r}, got {start}"
        )
    return start


def _linear_dtype(*projections: nn.Module) -> torch.dtype | None:
    """The dtype that the first of these which is torch's own linear layer takes inputs in; None:
    none is.
    """
    for layer in projections:
        if _is_linear(layer):
            return _check.numbers_of(layer)[0]
    return None


def _is_forward_mode() -> bool:
    """Whether derivatives are computed along with values (torch.autograd.forward_ad,
    torch.func.jvp): operators that write into a memory have none.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch.autograd.forward_ad._current_level >= 0)


def _is_linear(layer: nn.Module) -> bool:
    """Whether calling it is torch's own linear map."""
    own = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return own and "forward" not in layer.__dict__


def _execution_device(*modules: nn.Module) -> torch.device | None:
    """The device that parameters are brought to for each call, where they are on meta between:
    accelerate's hook of the first module that has one says it.
    """
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            found = getattr(part, "execution_device", None)
            if found is not None:
                return torch.device(found)
    return None


def _copied(constant: Tensor | None) -> Tensor | None:
    """A constant that the caller may write to: the one that layers compute with is shared."""
    return None if constant is None else constant.clone()


def _detached(operands: Sequence[Any]) -> list[Any]:
    """The operands of an operator with their tensors detached, those in lists, too: without
    tangents of forward mode, which torch.no_grad leaves.
    """
    return [
        x.detach() if isinstance(x, Tensor) else _detached(x) if isinstance(x, list) else x
        for x in operands
    ]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(f'"{one}"' for one in allowed)
        raise ValueError(f"{_WHERE}: {name} must be one of {choices}, got {value!r}")
