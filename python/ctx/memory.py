"""KVMemory: a bounded key/value memory for streams that may run for ever."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _C
from ctx.compression import as_compressor, make_compressor
from ctx.rows import Rows, as_counts, as_rows
from ctx.schedule import Schedule
from ctx.state import STATE

__all__ = ["KVMemory"]


def bias_values(name: str | Sequence[float] | Tensor, ratio: int) -> Tensor | None:
    """The bias of compressed slots by name, or as numbers per query head; None for no bias."""
    if isinstance(name, Tensor):
        return name.detach()
    if not isinstance(name, str):
        try:
            values = [float(value) for value in name]
        except (TypeError, ValueError):
            raise TypeError(
                f"ctx.KVMemory: compressed_bias must be numbers per query head, got {name!r}"
            ) from None
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"ctx.KVMemory: compressed_bias must be finite, got {values}")
        return torch.tensor(values, dtype=torch.float64)
    if name == "none":
        return None
    if name == "log_ratio":
        return torch.tensor([math.log(ratio)], dtype=torch.float64)
    raise ValueError(
        'ctx.KVMemory: compressed_bias must be "none", "log_ratio" or numbers per query head, '
        f"got {name!r}"
    )


def rotary_width(position: str | None, rotary_dim: int | None, head_dim: int, where: str) -> int:
    """Channels that are rotated: 0 without positions."""
    if position not in ("rotary", None):
        raise ValueError(f'{where}: position must be "rotary" or None, got {position!r}')
    if position is None:
        return 0
    return head_dim if rotary_dim is None else rotary_dim


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
        schedule: sizes of the memory.
        batch_size: rows B, independent streams.
        kv_heads: key/value heads Hkv.
        head_dim: key width D.
        value_dim: value width Dv; default ``head_dim``.
        compressor: a name of :data:`ctx.compression.COMPRESSORS` (``"mean"``, ``"max"``,
            ``"conv"``, ``"gated"``), a module of :mod:`ctx.compression`, or any module that maps
            groups to slots as one of those does. Parameters are used as they are at the time of
            each call.
        position: ``"rotary"`` or None.
        rotary_base: base of the angles.
        rotary_dim: first channels of each key that are rotated, even; default all.
        rotary_interleaved: pair channels (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ...
        distance: ``"slot"`` (bounded, the paper's) or ``"token"``: how far a slot is from the
            query.
        compressed_bias: added to the scores of compressed slots: ``"none"``, ``"log_ratio"`` (log
            c), or one number per query head.
        scale: factor of the scores; default D^-1/2.
        headroom: tokens that can be written before the first of them attends (longer calls are
            walked in blocks), and that :meth:`rewind` can take back.
        dtype: float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
        device: where the memory lives.

    Raises:
        ValueError, TypeError: a setting is out of range; the message names it.
    """

    def __init__(
        self,
        schedule: Schedule,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        compressor: str | nn.Module = "mean",
        position: str | None = "rotary",
        rotary_base: float = 10000.0,
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        distance: str = "slot",
        compressed_bias: str | Sequence[float] | Tensor = "none",
        scale: float | None = None,
        headroom: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"ctx.KVMemory: schedule must be a ctx.Schedule, got {type(schedule).__name__}"
            )
        if head_dim < 1:
            raise ValueError(f"ctx.KVMemory: head_dim must be at least 1, got {head_dim}")
        value_dim = head_dim if value_dim is None else value_dim
        if value_dim < 1:
            raise ValueError(f"ctx.KVMemory: value_dim must be at least 1, got {value_dim}")
        if scale is not None and not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"ctx.KVMemory: scale must be finite and not zero, got {scale}")
        device = torch.device(device)
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
        bias = bias_values(compressed_bias, schedule.ratio)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.schedule = schedule
        self.compressor = compressor
        self._settings: dict[str, Any] = {
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "position": position,
            "rotary_base": rotary_base,
            "rotary_dim": rotary_dim,
            "rotary_interleaved": rotary_interleaved,
            "distance": distance,
            "compressed_bias": "none" if bias is None else bias,
            "scale": scale,
            "headroom": headroom,
        }
        operands = compressor.operands()
        self._places = [operand.data_ptr() for operand in operands]
        self._native = _C.KVMemory(
            schedule._law,
            batch_size,
            kv_heads,
            head_dim,
            value_dim,
            compressor.engine_name,
            [operand.detach() for operand in operands],
            None if compressor.native else compressor.slots,
            distance,
            rotary_width(position, rotary_dim, head_dim, "ctx.KVMemory"),
            rotary_base,
            rotary_interleaved,
            None if bias is None else bias.to(device, wide),
            0.0 if scale is None else scale,
            headroom,
            dtype,
            device,
        )

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None = None,
        reset_at: Tensor | None = None,
    ) -> Tensor:
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

        Returns:
            [B, H, T, Dv], a fresh tensor; zero at padding.

        Raises:
            ValueError, TypeError: an argument does not fit the memory; nothing has been written
                then.
        """
        self._read_compressor()
        return self._native.step(q, k, v, lengths, reset_at)

    def append(
        self,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None = None,
        reset_at: Tensor | None = None,
    ) -> None:
        """The first half of :meth:`step`: appends, evicts and compresses."""
        self._read_compressor()
        self._native.append(k, v, lengths, reset_at)

    def attend(self, q: Tensor) -> Tensor:
        """The second half of :meth:`step`: queries of the last T tokens appended; writes nothing.

        Args:
            q: [B, H, T, D] with T at most ``rewindable`` of every row.

        Returns:
            [B, H, T, Dv].

        Raises:
            ValueError, TypeError: ``q`` does not fit the memory.
        """
        return self._native.attend(q)

    def reset(self, rows: Rows | None = None) -> None:
        """Every row begins a new stream, or these do: an index, several, or bool [B].

        Raises:
            IndexError, ValueError, TypeError: a row is not there.
        """
        self._native.reset(None if rows is None else as_rows(rows))

    def rewind(self, tokens: int | Tensor) -> None:
        """Takes back the last tokens of every row, exactly, as if they had not come.

        Args:
            tokens: of each row, or int64 [B]; at most ``rewindable``.

        Raises:
            ValueError, TypeError: more than can be taken back; nothing has been changed then.
        """
        self._native.rewind(as_counts(tokens, self.seen, "ctx.KVMemory.rewind"))

    def select(self, rows: Rows) -> KVMemory:
        """A new memory of these rows, in this order; repeats allowed (beam search).

        Args:
            rows: an index, several, or bool [B].

        Raises:
            IndexError, ValueError, TypeError: a row is not there, or none is given.
        """
        return self._with(self._native.select(as_rows(rows)))

    @staticmethod
    def merge(memories: Sequence[KVMemory]) -> KVMemory:
        """A new memory of the rows of several, one after the other.

        The compressor, its bias and the scale are the first one's.

        Raises:
            ValueError, TypeError: none is given, or two differ in a setting; the message names it.
        """
        for memory in memories:
            if not isinstance(memory, KVMemory):
                raise TypeError(
                    "ctx.KVMemory.merge: memories must be ctx.KVMemory, "
                    f"got {type(memory).__name__}"
                )
        merged = _C.KVMemory.merge([memory._native for memory in memories])
        return memories[0]._with(merged)

    def clone(self) -> KVMemory:
        """A new memory that holds the same; the compressor is shared."""
        return self.to()

    fork = clone

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> KVMemory:
        """A new memory that holds the same, in another dtype or on another device.

        The compressor is shared; where it has parameters on another device, move it first.
        """
        keys = self._native.tensors[0]
        dtype, device = dtype or keys.dtype, torch.device(device or keys.device)
        return self._with(self._native.to(dtype, device))

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """What the memory holds, as plain tensors, numbers and names (``ctx/snapshot.h``).

        The tensors alias the memory. The compressor's parameters, the bias and the scale belong to
        the model and are not in it.
        """
        return self._native.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str]) -> None:
        """Takes over what :meth:`state_dict` gave, from any floating dtype and any device.

        Raises:
            ValueError, TypeError: the state is of another geometry, format or version; the message
                names the setting, and nothing has been written.
        """
        self._native.load_state_dict(dict(state))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file, whole or not at all.

        The file is what ``torch.save`` writes of :meth:`state_dict`; C++ programs read it with
        ``ctx::KVMemory::load`` or ``torch::pickle_load``.

        Raises:
            OSError: the file cannot be written; an older one is as it was.
        """
        self._native.save(os.fspath(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over the state that :meth:`save` wrote, into this memory's dtype and device.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: it is damaged, or of another geometry, format or version; nothing
                has been written.
        """
        self._native.load(os.fspath(path))

    @property
    def seen(self) -> Tensor:
        """Tokens that each row has seen, int64 [B]: the whole bookkeeping. Aliases the memory."""
        return self._native.tensors[6]

    @property
    def rewindable(self) -> Tensor:
        """How many of them :meth:`rewind` can take back, int64 [B]. Aliases the memory."""
        return self._native.tensors[7]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are the memory, by name; they alias it."""
        return dict(zip(STATE, self._native.tensors, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Constant."""
        return self._native.nbytes

    def _read_compressor(self) -> None:
        """Hands over parameters that were replaced; those changed in place are seen anyway."""
        operands = self.compressor.operands()
        places = [operand.data_ptr() for operand in operands]
        if places != self._places:
            self._native.set_parameters([operand.detach() for operand in operands])
            self._places = places

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
        keys = self.tensors["window_keys"]
        return {
            "schedule": self.schedule,
            "compressor": self.compressor,
            "settings": self._settings,
            "dtype": keys.dtype,
            "state": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state["state"]
        self.__init__(  # type: ignore[misc]
            state["schedule"],
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
