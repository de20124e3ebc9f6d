"""KVMemory: a bounded key/value memory for streams that may run for ever."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _C, _check, engine, memory_rows
from ctx.compression.registry import compressor_of
from ctx.kv_called import written
from ctx.kv_followed import Followed, parameters_of
from ctx.kv_options import position_operands, settings_of
from ctx.kv_state import KVState
from ctx.positions import Relative
from ctx.schedule import Schedule
from ctx.settings import AttentionSettings
from ctx.state import arithmetic

__all__ = ["KVMemory"]

_OPTIONAL = ("lengths", "reset_at")


class KVMemory(KVState):
    """Keys and values of B streams: a ring of exact recent pairs, a ring of compressed slots, and
    sinks.

    Keys and values are given un-rotated; keys are rotated once, when written. Everything is
    allocated here; a step allocates its output only, and costs the same at token 10^3 and at token
    10^9. Streaming only: no gradient is recorded (training goes through
    :class:`ctx.CompressiveAttention`). Not safe to call from two threads at once.

    Source: Rae et al. 2019 (arXiv:1911.05507), section 3; see :class:`ctx.Schedule` for where this
    deviates.

    Args:
        schedule: sizes of the memory; or a :class:`ctx.AttentionSettings` in place of it and of the
            options that are fields of it, which must not be given then. Its ``compressed_bias``
            ``"learned"`` goes with numbers in ``compressed_bias``.
        batch_size: rows B, independent streams.
        kv_heads: key/value heads Hkv.
        head_dim: key width D.
        value_dim: value width Dv; default ``head_dim``.
        compressor: a name of :data:`ctx.compression.COMPRESSORS` (``"mean"``, ``"max"``,
            ``"conv"``, ``"dilated"``, ``"gated"``, ``"most_used"``), a module of
            :mod:`ctx.compression`, or any module that maps groups to slots as one of those does.
            Parameters are used as they are at the time of each call.
        position: ``"rotary"``, ``"relative"`` (Transformer-XL's), ``"alibi"`` or None. Keys are
            stored as the scheme wants them, so a stored state belongs to it.
        alibi_slopes: one number per query head, for ``"alibi"`` and required there;
            :func:`ctx.positions.alibi_slopes` gives those of the paper.
        relative: a :class:`ctx.positions.Relative`, for ``"relative"`` and required there. Its
            parameters are used as they are at the time of each call. Slower than the other schemes.
        rotary_base: base of the angles.
        rotary_dim: first channels of each key that are rotated, even; default all.
        rotary_interleaved: pair channels (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ...
        distance: ``"slot"`` (bounded, the paper's) or ``"token"``: how far a slot is from the
            query.
        compressed_bias: added to the scores of compressed slots: ``"none"``, ``"log_ratio"`` (log
            c), or one number per query head. A tensor is used as it is at the time of each call.
        scale: factor of the scores; default D^-1/2.
        max_rewind: tokens that can be written before the first of them attends (longer calls are
            walked in blocks), and that :meth:`rewind` can take back.
        dtype: float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
        compressed_dtype: what compressed slots are stored as: float32, bfloat16, float16, or int8
            (each slot's key and value as multiples of a 127th of its largest number, with that
            scale, float32, behind it); default ``dtype``, and nothing else with float64.
        device: where the memory lives.

    Raises:
        ValueError, TypeError: a setting is out of range; the message names it.
    """

    def __init__(
        self,
        schedule: Schedule | AttentionSettings,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        compressor: str | nn.Module = "mean",
        position: str | None = "rotary",
        alibi_slopes: Sequence[float] | Tensor | None = None,
        relative: Relative | None = None,
        rotary_base: float = 10000.0,
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        distance: str = "slot",
        compressed_bias: str | Sequence[float] | Tensor = "none",
        scale: float | None = None,
        max_rewind: int = 64,
        dtype: torch.dtype = torch.float32,
        compressed_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        where = "ctx.KVMemory"
        value_dim = head_dim if value_dim is None else value_dim
        batch_size, kv_heads, max_rewind = _check.integers(
            where, batch_size=batch_size, kv_heads=kv_heads, max_rewind=max_rewind
        )
        head_dim, value_dim = _check.integers(where, 1, head_dim=head_dim, value_dim=value_dim)
        options = {
            "position": position,
            "distance": distance,
            "rotary_base": rotary_base,
            "rotary_dim": rotary_dim,
            "rotary_interleaved": rotary_interleaved,
            "scale": scale,
            "compressed_bias": compressed_bias,
        }
        settings, bias = settings_of(schedule, options, where)
        self.schedule = schedule = settings.schedule
        self._attention = settings = settings.resolved(head_dim)
        dtype, device = _check.dtype(dtype, where), _check.device(device, where)
        if compressed_dtype is not None:
            compressed_dtype = _check.dtype(compressed_dtype, where, "compressed_dtype")
        sizes = (kv_heads, schedule.ratio, head_dim, value_dim)
        self.compressor = compressor = compressor_of(
            compressor, where, *sizes, device=device, dtype=torch.float32
        )
        slopes, operands = position_operands(settings.position, alibi_slopes, relative, where)
        self.relative = relative
        self._settings = {
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "alibi_slopes": slopes,
            "relative": relative,
            "compressed_bias": "none" if bias is None else bias.to(device, arithmetic(dtype)),
            "max_rewind": max_rewind,
            "compressed_dtype": compressed_dtype,
        }
        # A tensor is followed: what is written into it counts from the next call on.
        parameters = parameters_of(compressor)
        followed = compressed_bias if isinstance(compressed_bias, Tensor) else None
        self._followed = Followed(followed, bool(parameters or operands))
        function = None
        if not compressor.native:
            function = functools.partial(compressor.slots, mass=settings.slot_mass)
        self._native = _C.KVMemory(
            engine.native_settings(
                settings,
                None if slopes is None else slopes.to(device, arithmetic(dtype)),
                [operand.detach() for operand in operands],
            ),
            batch_size,
            kv_heads,
            head_dim,
            value_dim,
            _C.Compressor(
                compressor.engine_name,
                [parameter.detach() for parameter in parameters],
                function,
                compressor.overlap,
            ),
            self._bias_on(device),
            max_rewind,
            dtype,
            compressed_dtype,
            device,
        )

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None = None,
        reset_at: Tensor | None = None,
        *,
        return_region_weights: bool = False,
    ) -> Any:
        """Appends T tokens to every row and returns what each query attends to. One operator call.

        Args:
            q: queries [B, H, T, D], un-rotated; H a multiple of Hkv; dtype and device of the
                memory, any strides.
            k: keys [B, Hkv, T, D], un-rotated.
            v: values [B, Hkv, T, Dv].
            lengths: int64 [B], 0 <= length <= T: row b brings its first ``lengths[b]`` tokens, the
                rest is padding that nothing sees or counts (:mod:`ctx.padding` moves padding to the
                right); default all.
            reset_at: bool [B, T], true where a token is the first of a new stream, which sees
                nothing of what its row held before; default nowhere.
            return_region_weights: also return the share of its attention that each query gives to
                sinks, compressed slots and window.

        Returns:
            [B, H, T, Dv], a fresh tensor; zero at padding. With ``return_region_weights`` also
            the shares: [B, H, T, 3] in float32 (float64 for float64), which add up to one; zero at
            padding.

        Raises:
            ValueError, TypeError: an argument does not fit the memory; nothing has been written
                then.
        """
        where = "ctx.KVMemory.step"
        _check.flag(return_region_weights, "return_region_weights", where)
        if self._followed.any:
            self._followed.hand_over(self)
        step = self._native.step_with_region_weights if return_region_weights else self._native.step
        try:
            if self.compressor.native and not self.compressor.in_engine:
                out, region_weights = written(
                    self, where, q, k, v, lengths, reset_at, return_region_weights
                )
                return (out, region_weights) if return_region_weights else out
            return step(q, k, v, lengths, reset_at)
        except TypeError:  # where it is about the binding, its words are a C++ signature
            _check.tensors(where, _OPTIONAL, q=q, k=k, v=v, lengths=lengths, reset_at=reset_at)
            raise

    def append(
        self,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None = None,
        reset_at: Tensor | None = None,
    ) -> None:
        """The first half of :meth:`step`: appends, evicts and compresses.

        Raises:
            ValueError, TypeError: an argument does not fit the memory, or the compressor is
                ``"most_used"``, which needs the queries; nothing has been written then.
        """
        where = "ctx.KVMemory.append"
        if self._followed.any:
            self._followed.hand_over(self)
        try:
            if self.compressor.native and not self.compressor.in_engine:
                written(self, where, None, k, v, lengths, reset_at)
                return
            self._native.append(k, v, lengths, reset_at)
        except TypeError:
            _check.tensors(where, _OPTIONAL, k=k, v=v, lengths=lengths, reset_at=reset_at)
            raise

    def attend(self, q: Tensor, *, return_region_weights: bool = False) -> Any:
        """The second half of :meth:`step`: queries of the last T tokens appended; writes nothing,
        and does not count as usage.

        Args:
            q: [B, H, T, D] with T at most ``rewindable`` of every row.
            return_region_weights: as in :meth:`step`.

        Returns:
            [B, H, T, Dv]; with ``return_region_weights`` the shares [B, H, T, 3], too.

        Raises:
            ValueError, TypeError: ``q`` does not fit the memory.
        """
        _check.flag(return_region_weights, "return_region_weights", "ctx.KVMemory.attend")
        if self._followed.any:
            self._followed.hand_over(self)
        attend = (
            self._native.attend_with_region_weights
            if return_region_weights
            else self._native.attend
        )
        try:
            return attend(q)
        except TypeError:
            _check.tensors("ctx.KVMemory.attend", q=q)
            raise

    def resized(self, *, compressed: int | None = None, window: int | None = None) -> KVMemory:
        """A new memory of other sizes that holds the same streams, as if it had had them all along;
        see :func:`ctx.rows.resized`.

        Args:
            compressed: slots of the compressive memory: fewer (the newest stay), or more while none
                has been dropped; default as it is.
            window: exact tokens, while that makes no group due earlier or later; default as it is.

        Raises:
            ValueError, TypeError: the streams do not have what such a memory shows; the message
                names the size.
        """
        where = "ctx.KVMemory.resized"
        asked = {"compressed": compressed, "window": window}
        sizes = {name: _check.integer(n, name, where) for name, n in asked.items() if n is not None}
        schedule = self.schedule.resized(**sizes)
        held = memory_rows.resized(self.memory, schedule, where).tensors
        keys = held["window_keys"]
        bias = self._followed.bias
        followed = {} if bias is None else {"compressed_bias": bias}
        other = KVMemory(
            dataclasses.replace(self._attention, schedule=schedule),
            keys.shape[0],
            **self._settings | followed,
            compressor=self.compressor,
            dtype=keys.dtype,
            device=keys.device,
        )
        other.load_state_dict({**other.state_dict(), **held})
        return other

    def _bias_on(self, device: torch.device) -> Tensor | None:
        """The bias of compressed slots as operators take it: the user's tensor where it is one."""
        if self._followed.bias is not None:
            return self._followed.bias.detach().to(device)
        named = self._settings["compressed_bias"]
        return None if isinstance(named, str) else named.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVMemory:
        other = object.__new__(KVMemory)
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        pairs, slots = (self.tensors[f"{part}_keys"].dtype for part in ("window", "compressed"))
        settings = {**self._settings, "compressed_dtype": None if slots == pairs else slots}
        if self._followed.bias is not None:  # as it is now
            settings["compressed_bias"] = self._followed.bias.detach().clone()
        return {
            "attention": self._attention,
            "compressor": self.compressor,
            "settings": settings,
            "dtype": pairs,
            "state": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state["state"]
        self.__init__(  # type: ignore[misc]
            state["attention"],
            held["batch_size"],
            **state["settings"],
            compressor=state["compressor"],
            dtype=state["dtype"],
            device=held["window_keys"].device,
        )
        self.load_state_dict(held)
