"""What a :class:`ctx.KVMemory` holds, and what is done with it between calls: rows and files."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ctx import _C, _check
from ctx.compression import Compressor
from ctx.kv_followed import Followed
from ctx.memory import Memory
from ctx.memory_rows import Rows, as_counts, as_rows
from ctx.positions import Relative
from ctx.schedule import Schedule
from ctx.settings import AttentionSettings
from ctx.spec import Spec, layer_spec
from ctx.state import STATE

if TYPE_CHECKING:
    from ctx.kv_memory import KVMemory

__all__ = ["KVState"]


class KVState:
    """The base of :class:`ctx.KVMemory`, which makes it and computes with it."""

    schedule: Schedule
    compressor: Compressor
    relative: Relative | None
    _native: _C.KVMemory
    _attention: AttentionSettings
    _settings: dict[str, Any]  # the other arguments of ctx.KVMemory
    _followed: Followed

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
            if not isinstance(memory, KVState):
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
        plain = {name: _plain_number(part) for name, part in state.items()}
        for name, part in plain.items():
            if not isinstance(name, str):
                raise TypeError(f"{where}: names in state must be str, got {name!r}")
            if not isinstance(part, (Tensor, int, float, str)):
                raise TypeError(
                    f"{where}: {name} must be a tensor, a number or a name, "
                    f"got {type(part).__name__}"
                )
            if isinstance(part, int):
                _check.integer(int(part), name, where)
        self._native.load_state_dict(plain)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file, whole or not at all.

        It is a safetensors file of the tensors of :meth:`state_dict`; the numbers and names are
        JSON in its metadata, under ``"ctx"``. C++ programs read it with ``ctx::KVMemory::load``.

        Raises:
            OSError: the file cannot be written; an older one is as it was.
        """
        self._native.save(_check.path(path, "ctx.KVMemory.save"))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over the state that :meth:`save` wrote, or ``torch.save`` of :meth:`state_dict`,
        into this memory's dtype and device.

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

    def _with(self, native: _C.KVMemory) -> KVMemory:
        """This memory's settings around another engine object."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._native, other._followed = native, self._followed.copy()
        return cast("KVMemory", other)

    def __repr__(self) -> str:
        keys = self.tensors["window_keys"]
        return (
            f"KVMemory({self.schedule}, batch_size={keys.shape[0]}, kv_heads={keys.shape[1]}, "
            f"head_dim={keys.shape[3]}, compressor={self.compressor.name!r}, dtype={keys.dtype}, "
            f"device={str(keys.device)!r}, nbytes={self.nbytes})"
        )


def _plain_number(value: Any) -> Any:
    """A NumPy scalar as the int or float that it stands for, anything else as it is."""
    if isinstance(value, (Tensor, int, float, str)) or getattr(value, "shape", None) != ():
        return value
    try:
        return operator.index(value)
    except TypeError:
        return float(value)
