"""KVMemory: a bounded key/value memory for streams that may run for ever."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _C, _check, engine, memory_rows
from ctx.compression import as_compressor, make_compressor
from ctx.layer_options import one_of
from ctx.memory import Memory
from ctx.memory_rows import Rows, as_counts, as_rows
from ctx.positions import Relative, check_position, slope_values
from ctx.schedule import Schedule
from ctx.settings import AttentionSettings
from ctx.spec import Spec, layer_spec
from ctx.state import STATE

__all__ = ["KVMemory"]

#: Options that are fields of AttentionSettings, and their defaults.
_FLAT: dict[str, Any] = {
    "position": "rotary",
    "distance": "slot",
    "rotary_base": 10000.0,
    "rotary_dim": None,
    "rotary_interleaved": False,
    "scale": None,
}


def bias_values(name: str | Sequence[float] | Tensor, ratio: int) -> Tensor | None:
    """The bias of compressed slots by name, or as numbers per query head; None for no bias."""
    if not isinstance(name, str):
        if isinstance(name, Tensor) and not name.is_meta and not name.is_complex():
            values = name.detach().to(torch.float64)
        else:
            try:
                if isinstance(name, Tensor):
                    raise TypeError
                numbers = [float(value) for value in name]
                values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(
                    f"ctx.KVMemory: compressed_bias must be numbers per query head, got {name!r}"
                ) from None
        if not values.isfinite().all():
            raise ValueError(f"ctx.KVMemory: compressed_bias must be finite, got {values.tolist()}")
        return values
    if name == "none":
        return None
    if name == "log_ratio":
        return torch.tensor([math.log(ratio)], dtype=torch.float64, device="cpu")
    raise ValueError(
        'ctx.KVMemory: compressed_bias must be "none", "log_ratio" or numbers per query head, '
        f"got {name!r}"
    )


def settings_of(schedule: Any, flat: dict[str, Any], where: str) -> AttentionSettings:
    """What attention is, of a schedule and options by name; or of AttentionSettings, which the
    options must not repeat.

    Raises:
        TypeError, ValueError: an option is out of range, or given twice.
    """
    if isinstance(schedule, AttentionSettings):
        for name, usual in _FLAT.items():
            if flat[name] != usual:
                got = flat[name]
                raise ValueError(
                    f"{where}: {name} must be given by settings alone, got {got!r}, too"
                )
        return schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"{where}: schedule must be a ctx.Schedule or ctx.AttentionSettings, "
            f"got {type(schedule).__name__}"
        )
    check_position(flat["position"], where)
    if not isinstance(flat["distance"], str):
        got = flat["distance"]
        raise TypeError(f'{where}: distance must be "slot" or "token", got {got!r}')
    one_of("distance", flat["distance"], ("slot", "token"), where)
    flat = {**flat, "rotary_base": _check.number(flat["rotary_base"], "rotary_base", where)}
    if flat["rotary_dim"] is not None:
        flat["rotary_dim"] = _check.integer(flat["rotary_dim"], "rotary_dim", where)
    _check.flag(flat["rotary_interleaved"], "rotary_interleaved", where)
    if flat["scale"] is not None:
        flat["scale"] = scale = _check.number(flat["scale"], "scale", where)
        if not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"{where}: scale must be finite and not zero, got {scale}")
    return AttentionSettings(schedule=schedule, **flat)


def position_operands(
    position: str | None,
    alibi_slopes: Sequence[float] | Tensor | None,
    relative: Relative | None,
    where: str,
) -> tuple[Tensor | None, list[Tensor]]:
    """The slopes and the tensors of relative positions, which must come with their scheme and
    with no other.
    """
    check_position(position, where)
    given = {"alibi_slopes": ("alibi", alibi_slopes), "relative": ("relative", relative)}
    for name, (scheme, value) in given.items():
        if (value is None) == (position == scheme):
            must = "be given with" if value is None else "come with"
            got = "None" if value is None else f"position={position!r}"
            raise ValueError(f'{where}: {name} must {must} position="{scheme}", got {got}')
    if relative is not None and not isinstance(relative, Relative):
        raise TypeError(
            f"{where}: relative must be a ctx.positions.Relative, got {type(relative).__name__}"
        )
    slopes = None if alibi_slopes is None else slope_values(alibi_slopes, where)
    return slopes, [] if relative is None else [*relative()]


def places_of(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What tells whether tensors are still those that were handed to the engine: where their
    numbers are and how they lie there.
    """
    return [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in tensors]


def plain_number(value: Any) -> Any:
    """A NumPy scalar as the int or float that it stands for, anything else as it is."""
    if isinstance(value, (Tensor, int, float, str)) or getattr(value, "shape", None) != ():
        return value
    try:
        return operator.index(value)
    except TypeError:
        return float(value)


class KVMemory:
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
        batch_size = _check.integer(batch_size, "batch_size", where)
        kv_heads = _check.integer(kv_heads, "kv_heads", where)
        head_dim = _check.integer(head_dim, "head_dim", where)
        if head_dim < 1:
            raise ValueError(f"{where}: head_dim must be at least 1, got {head_dim}")
        value_dim = head_dim if value_dim is None else value_dim
        value_dim = _check.integer(value_dim, "value_dim", where)
        if value_dim < 1:
            raise ValueError(f"{where}: value_dim must be at least 1, got {value_dim}")
        flat = {
            "position": position,
            "distance": distance,
            "rotary_base": rotary_base,
            "rotary_dim": rotary_dim,
            "rotary_interleaved": rotary_interleaved,
            "scale": scale,
        }
        settings = settings_of(schedule, flat, where)
        given, schedule = settings is schedule, settings.schedule
        max_rewind = _check.integer(max_rewind, "max_rewind", where)
        dtype, device = _check.dtype(dtype, where), _check.device(device, where)
        if compressed_dtype is not None:
            compressed_dtype = _check.dtype(compressed_dtype, where, "compressed_dtype")
        if isinstance(compressor, str):
            compressor = make_compressor(
                compressor,
                kv_heads,
                schedule.ratio,
                head_dim,
                value_dim,
                device=device,
                dtype=torch.float32,
            )
        if not isinstance(compressor, nn.Module):
            raise TypeError(
                f"ctx.KVMemory: compressor must be a name or a module, got {compressor!r}"
            )
        compressor = as_compressor(compressor, kv_heads, schedule.ratio, head_dim, value_dim)
        if given and settings.compressed_bias != "learned":
            if compressed_bias != "none":
                raise ValueError(
                    f"{where}: compressed_bias must be given by settings alone, "
                    f"got {compressed_bias!r}, too"
                )
            compressed_bias = settings.compressed_bias
        bias = bias_values(compressed_bias, schedule.ratio)
        settings = dataclasses.replace(
            settings, compressed_bias="none" if bias is None else "learned"
        ).resolved(head_dim)
        slopes, operands_of_positions = position_operands(
            settings.position, alibi_slopes, relative, where
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.schedule = schedule
        self.compressor = compressor
        self.relative = relative
        self._attention = settings
        self._settings: dict[str, Any] = {
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "alibi_slopes": slopes,
            "relative": relative,
            "compressed_bias": "none" if bias is None else bias.to(device, wide),
            "max_rewind": max_rewind,
            "compressed_dtype": compressed_dtype,
        }
        operands = compressor.operands() if compressor.native else []
        self._places = places_of(operands)
        self._relative_places = places_of(operands_of_positions)
        # A tensor is followed: what is written into it counts from the next call on.
        self._bias = compressed_bias if isinstance(compressed_bias, Tensor) else None
        self._bias_place: Any = None
        #: Whether anything is used as it is at the time of a call, and must be looked at.
        self._watched = bool(operands or operands_of_positions) or self._bias is not None
        function = None
        if not compressor.native:
            function = functools.partial(compressor.slots, mass=settings.slot_mass)
        self._native = _C.KVMemory(
            engine.native_settings(
                settings,
                None if slopes is None else slopes.to(device, wide),
                [operand.detach() for operand in operands_of_positions],
            ),
            batch_size,
            kv_heads,
            head_dim,
            value_dim,
            _C.Compressor(
                compressor.engine_name,
                [operand.detach() for operand in operands],
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
        _check.flag(return_region_weights, "return_region_weights", "ctx.KVMemory.step")
        if self._watched:
            self._read_parameters()
        step = self._native.step_with_region_weights if return_region_weights else self._native.step
        try:
            if self.compressor.native and not self.compressor.in_engine:
                out, region_weights = self._written(
                    "ctx.KVMemory.step", q, k, v, lengths, reset_at, return_region_weights
                )
                return (out, region_weights) if return_region_weights else out
            return step(q, k, v, lengths, reset_at)
        except TypeError:  # where it is about the binding, its words are a C++ signature
            given = {"q": q, "k": k, "v": v, "lengths": lengths, "reset_at": reset_at}
            _check.tensors("ctx.KVMemory.step", ("lengths", "reset_at"), **given)
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
        if self._watched:
            self._read_parameters()
        try:
            if self.compressor.native and not self.compressor.in_engine:
                self._written("ctx.KVMemory.append", None, k, v, lengths, reset_at)
                return
            self._native.append(k, v, lengths, reset_at)
        except TypeError:
            given = {"k": k, "v": v, "lengths": lengths, "reset_at": reset_at}
            _check.tensors("ctx.KVMemory.append", ("lengths", "reset_at"), **given)
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
        if self._watched:
            self._read_parameters()
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

    def reset(self, rows: Rows | None = None) -> None:
        """Every row begins a new stream, or these do: an index, several, or bool [B].

        Raises:
            IndexError, ValueError, TypeError: a row is not there.
        """
        self._native.reset(None if rows is None else as_rows(rows, "ctx.KVMemory.reset"))

    def rewind(self, tokens: int | Tensor) -> None:
        """Takes back the last tokens of every row, exactly, as if they had not come.

        Args:
            tokens: of each row, or int64 [B]; at most ``rewindable``.

        Raises:
            ValueError, TypeError: more than can be taken back, or the compressor is
                ``"most_used"``, whose counts cannot be; nothing has been changed then.
        """
        self._native.rewind(as_counts(tokens, self.seen, "ctx.KVMemory.rewind"))

    def select(self, rows: Rows) -> KVMemory:
        """A new memory of these rows, in this order; repeats allowed (beam search).

        Args:
            rows: an index, several, or bool [B].

        Raises:
            IndexError, ValueError, TypeError: a row is not there, or none is given.
        """
        return self._with(self._native.select(as_rows(rows, "ctx.KVMemory.select")))

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
        followed = {} if self._bias is None else {"compressed_bias": self._bias}
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

    @staticmethod
    def merge(memories: Sequence[KVMemory]) -> KVMemory:
        """A new memory of the rows of several, one after the other.

        The compressor, its bias, the scale and what positions are made of are the first one's.

        Args:
            memories: a list or tuple.

        Raises:
            ValueError, TypeError: none is given, or two differ in a setting; the message names it.
        """
        if not isinstance(memories, (list, tuple)):
            raise TypeError(
                "ctx.KVMemory.merge: memories must be a list of ctx.KVMemory, "
                f"got {type(memories).__name__}"
            )
        for memory in memories:
            if not isinstance(memory, KVMemory):
                raise TypeError(
                    "ctx.KVMemory.merge: memories must be ctx.KVMemory, "
                    f"got {type(memory).__name__}"
                )
        merged = _C.KVMemory.merge([memory._native for memory in memories])  # refuses none at all
        first: KVMemory = memories[0]
        return first._with(merged)

    def clone(self) -> KVMemory:
        """A new memory that holds the same; the compressor is shared."""
        return self.to()

    fork = clone

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> KVMemory:
        """A new memory that holds the same, in another dtype or on another device.

        Slots whose ``compressed_dtype`` was given keep it, but in a float64 memory. The compressor
        and ``relative`` are shared; where they have parameters on another device, move them first.
        """
        keys = self._native.tensors[0]
        dtype = keys.dtype if dtype is None else _check.dtype(dtype, "ctx.KVMemory.to")
        device = keys.device if device is None else _check.device(device, "ctx.KVMemory.to")
        other = self._with(self._native.to(dtype, device))
        if dtype == torch.float64:
            other._settings = {**self._settings, "compressed_dtype": None}
        return other

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """What the memory holds, as plain tensors, numbers and names (``ctx/snapshot.h``).

        The tensors alias the memory. The compressor's parameters, the bias, the scale, slopes and
        the tensors of relative positions belong to the model and are not in it.
        """
        return self._native.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str]) -> None:
        """Takes over what :meth:`state_dict` gave, from any floating dtype and any device.

        Raises:
            ValueError, TypeError: the state is of another geometry, format or version; the message
                names the setting, and nothing has been written.
        """
        where = "ctx.KVMemory.load_state_dict"
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{where}: state must be what state_dict returns, got {type(state).__name__}"
            )
        state = {name: plain_number(part) for name, part in state.items()}
        for name, part in state.items():
            if not isinstance(name, str):
                raise TypeError(f"{where}: names in state must be str, got {name!r}")
            if not isinstance(part, (Tensor, int, float, str)):
                raise TypeError(
                    f"{where}: {name} must be a tensor, a number or a name, "
                    f"got {type(part).__name__}"
                )
            if isinstance(part, int):
                _check.integer(int(part), name, where)
        self._native.load_state_dict(dict(state))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file, whole or not at all.

        The file is what ``torch.save`` writes of :meth:`state_dict`; C++ programs read it with
        ``ctx::KVMemory::load`` or ``torch::pickle_load``.

        Raises:
            OSError: the file cannot be written; an older one is as it was.
        """
        self._native.save(_check.path(path, "ctx.KVMemory.save"))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over the state that :meth:`save` wrote, into this memory's dtype and device.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: it is damaged, or of another geometry, format or version; nothing
                has been written.
        """
        self._native.load(_check.path(path, "ctx.KVMemory.load"))

    @property
    def seen(self) -> Tensor:
        """Tokens that each row has seen, int64 [B]: the whole bookkeeping. Aliases the memory."""
        return self._native.seen

    @property
    def rewindable(self) -> Tensor:
        """How many of them :meth:`rewind` can take back, int64 [B]. Aliases the memory."""
        return self._native.rewindable

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are the memory, by name; they alias it."""
        return dict(zip(STATE, self._native.tensors, strict=True))

    @property
    def memory(self) -> Memory:
        """The same tensors as a :class:`ctx.Memory` of one layer."""
        settings, tensors = self._settings, self.tensors
        spec = layer_spec(
            self._attention,
            self.compressor,
            (settings["kv_heads"], settings["head_dim"], settings["value_dim"]),
            settings["max_rewind"],
            content="kv",
        )
        clock = tensors.pop("seen"), tensors.pop("rewindable")
        return Memory(Spec((spec,)), *clock, [[*tensors.values()]])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Constant."""
        return self._native.nbytes

    def _read_parameters(self) -> None:
        """Hands over parameters that were replaced; those changed in place are seen anyway."""
        if self.relative is not None:
            relative = [*self.relative()]
            places = places_of(relative)
            if places != self._relative_places:
                self._native.set_relative([operand.detach() for operand in relative])
                self._relative_places = places
        operands = self.compressor.operands() if self.compressor.native else []
        places = places_of(operands)
        if places != self._places:
            self._native.set_parameters([operand.detach() for operand in operands])
            self._places = places

        if self._bias is not None:
            # A copy is made anew when the tensor is written to, an alias sees it.
            device = self.seen.device
            copied = self._bias._version if self._bias.device != device else None
            place = (*places_of([self._bias]), copied)
            if place != self._bias_place:
                self._native.set_compressed_bias(self._bias_on(device))
                self._bias_place = place

    def _bias_on(self, device: torch.device) -> Tensor | None:
        """The bias of compressed slots as operators take it: the user's tensor where it is one."""
        if self._bias is not None:
            return self._bias.detach().to(device)
        named = self._settings["compressed_bias"]
        return None if isinstance(named, str) else named.to(device)

    @torch.no_grad()
    def _written(
        self,
        where: str,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        reset_at: Tensor | None,
        with_region_weights: bool = False,
    ) -> Any:
        """A step, or an append without ``q``, with slots that the compressor's call made; it writes
        to the same tensors as the engine's own.
        """
        settings, memory = self._settings, self.memory
        rings, device = memory.rings[0], k.device
        widths = (settings["head_dim"], self.compressor.overlap)
        law = engine.law_of(self._attention, "custom", *widths)
        tokens = k.shape[2] if k.dim() == 4 else 0
        most = settings["max_rewind"]
        try:
            plan = engine.Plan(
                *memory.clock, tokens, lengths, reset_at, most, False, True, True, law
            )
            groups = engine.evicted_groups(k, v, plan, rings, law)
            slots = self.compressor.slots(*groups, mass=self._attention.slot_mass)
            if q is None:
                engine.append(k, v, plan, rings, law, slots)
                out = None
            else:
                wide = torch.float64 if rings[0].dtype == torch.float64 else torch.float32
                bias, slopes = self._bias_on(device), settings["alibi_slopes"]
                slopes = None if slopes is None else slopes.to(device, wide)
                relative = [] if self.relative is None else [*self.relative()]
                scores = engine.Scores(bias, slopes, relative)
                out = engine.step(q, k, v, plan, rings, law, slots, scores, with_region_weights)[:2]
        except (ValueError, TypeError) as error:
            operator, _, rest = str(error).partition(": ")
            if operator not in ("ctx.plan", "ctx.evicted_groups", "ctx.step_", "ctx.append_"):
                raise
            raise type(error)(f"{where}: {rest}") from None
        engine.begin(plan)
        engine.advance(plan)
        return out

    def _settings_now(self) -> dict[str, Any]:
        """What another memory like this one is made with; a bias that is followed as it is now."""
        if self._bias is None:
            return self._settings
        return {**self._settings, "compressed_bias": self._bias.detach().clone()}

    def _with(self, native: _C.KVMemory) -> KVMemory:
        """This memory's settings around another engine object."""
        other = object.__new__(KVMemory)
        other.__dict__.update(self.__dict__)
        other._native = native
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> KVMemory:
        other = object.__new__(KVMemory)
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        pairs, slots = (self.tensors[f"{part}_keys"].dtype for part in ("window", "compressed"))
        return {
            "attention": self._attention,
            "compressor": self.compressor,
            "settings": {
                **self._settings_now(),
                "compressed_dtype": None if slots == pairs else slots,
            },
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

    def __repr__(self) -> str:
        keys = self.tensors["window_keys"]
        return (
            f"KVMemory({self.schedule}, batch_size={keys.shape[0]}, kv_heads={keys.shape[1]}, "
            f"head_dim={keys.shape[3]}, compressor={self.compressor.name!r}, dtype={keys.dtype}, "
            f"device={str(keys.device)!r}, nbytes={self.nbytes})"
        )
