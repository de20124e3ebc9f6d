"""Memory: what the layers of a model hold of B streams, on one clock."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctx import _C, _check, memory_check, memory_files, memory_rows
from ctx.memory_rows import Rows
from ctx.schedule import Schedule
from ctx.spec import LayerSpec, Spec
from ctx.state import CLOCK, PLACE, STATE, StateShape, empty_clock

__all__ = ["Memory"]


class Memory:
    """The memory of one layer or of all layers of a model: one clock, and the rings of each layer.

    Made by ``init_memory`` or by a call, not by hand. Under grad a call leaves the memory that it
    is given as it is and returns a new one; otherwise it writes in place and returns the one given.
    It is a pytree whose leaves are its tensors, and copies, pickles, compiles and exports. Not safe
    to use from two threads at once.

    Source: Rae et al. 2019 (arXiv:1911.05507), section 3; see :class:`ctx.Schedule`.

    Args:
        spec: what it was made with. A layer or a model takes a memory of its own spec only.
        seen: int64 [B], tokens that each row has seen.
        rewindable: int64 [B], how many of them :meth:`rewind` can take back; -1 while a call that
            overwrites what is visible has not ended.
        rings: for each layer the tensors named by :data:`ctx.state.TENSORS`, in their order:
            ``window_keys`` [B, Hkv, capacity, D], ``window_values`` [B, Hkv, capacity, Dv],
            ``compressed_keys`` and ``compressed_values``, ``sink_keys`` and ``sink_values``, and
            ``attention_received``, ``slot_positions`` and ``slot_mass`` [B, Hkv, capacity or 0].
    """

    def __init__(
        self, spec: Spec, seen: Tensor, rewindable: Tensor, rings: list[list[Tensor]]
    ) -> None:
        self.spec = spec
        self.seen = seen
        self.rewindable = rewindable
        self.rings = rings
        self._checked = False

    @staticmethod
    def empty(
        spec: Spec,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        compressed_dtype: torch.dtype | None = None,
    ) -> Memory:
        """A memory of new streams; ``init_memory`` of a layer or a model checks its arguments."""
        shapes = map(StateShape.measured, memory_check.shapes(spec))
        rings = [shape.zeros(batch_size, dtype, device, compressed_dtype) for shape in shapes]
        return Memory(spec, *empty_clock(batch_size, device), rings)

    # ---- what it is

    @property
    def clock(self) -> tuple[Tensor, Tensor]:
        """``seen`` and ``rewindable``, which all layers share."""
        return self.seen, self.rewindable

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.rings)

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.seen.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Constant."""
        return sum(x.nbytes for x in memory_rows.leaves(self))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a one-layer memory by name, clock included; they alias it."""
        self._one_layer("tensors")
        return {name: self[name] for name in STATE}

    # Without __iter__: code that looks for tensors in any iterable would not end at a one-layer
    # memory, whose layer is such a memory. `for layer in memory` works by __getitem__.
    def __len__(self) -> int:
        return len(self.rings)

    def __getitem__(self, key: int | str) -> Any:
        """Layer `key` as a memory on the same clock; by name, a tensor of a one-layer memory.

        Raises:
            IndexError, KeyError, TypeError: there is no such layer or tensor.
        """
        if isinstance(key, str):
            if key in CLOCK:
                return self.seen if key == "seen" else self.rewindable
            self._one_layer(repr(key))
            return self.rings[0][PLACE[key]]
        if not isinstance(key, int):
            key = _check.integer(key, "layer", "ctx.Memory")
        if not -len(self.rings) <= key < len(self.rings):
            raise IndexError(
                f"ctx.Memory: layer must be between 0 and {len(self.rings) - 1}, got {key}"
            )
        part = Memory(self.spec.part(key), self.seen, self.rewindable, [self.rings[key]])
        part._checked = self._checked
        return part

    def _one_layer(self, what: str) -> None:
        if len(self.rings) != 1:
            raise KeyError(
                f"ctx.Memory: {what} must be read from one layer, as memory[0], "
                f"got a memory of {len(self.rings)}"
            )

    # ---- rows

    def reset(self, rows: Rows | None = None) -> None:
        """Begins a new stream in every row, or in these, in place.

        Args:
            rows: an index, several, or bool [B].

        Raises:
            IndexError, TypeError, ValueError: ``rows`` does not fit; nothing has been written then.
        """
        memory_rows.reset(self, rows)

    def rewind(self, tokens: int | Tensor) -> None:
        """Takes back the last tokens of every row, in place, as if they had not come.

        Args:
            tokens: of each row, or int64 [B]; at most ``rewindable``.

        Raises:
            ValueError, TypeError: more than can be taken back, or a compressor is ``"most_used"``,
                whose counts cannot be; nothing has been written then.
        """
        memory_rows.rewind(self, tokens)

    def select(self, rows: Rows) -> Memory:
        """A new memory of these rows, in this order; repeats allowed (beam search).

        Args:
            rows: an index, several, or bool [B].

        Raises:
            IndexError, TypeError, ValueError: ``rows`` does not fit, or is none.
        """
        return memory_rows.select(self, rows)

    @staticmethod
    def merge(memories: Sequence[Memory]) -> Memory:
        """A new memory of the rows of several, one after the other; of one spec, dtype and device.

        Raises:
            ValueError, TypeError: there is none, or two of them differ; the message names the
                setting or the tensor.
        """
        return memory_rows.merge(memories)

    def clone(self) -> Memory:
        """A new memory that holds the same: where two continuations of a stream part."""
        return memory_rows.to(self, None, None, "ctx.Memory.clone")

    def to(
        self,
        *place: torch.device | str | int | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """A new memory that holds the same, in another dtype or on another device.

        Counts stay int64, and attention received stays float32 (float64 beside float64). Slots that
        are stored in another dtype than pairs (``compressed_dtype=``) keep it, but in a float64
        memory, which has one dtype.

        Args:
            place: a device or None, as tools that move all arguments of a call give it
                (accelerate). A memory that is there already is then returned itself.
            dtype: of pairs: float32, float64, bfloat16 or float16; default as it is.
            device: default as it is.

        Raises:
            TypeError, ValueError: there is no such dtype or device for a memory.
        """
        if place:
            if place[0] is None:
                return self
            device = _check.device(place[0], "ctx.Memory.to")
            if self.seen.device == device:
                return self
        return memory_rows.to(self, dtype, device)

    def resized(self, schedule: Schedule | Sequence[Schedule]) -> Memory:
        """A new memory of other sizes that holds the same pairs and the slots made of them.

        What a layer's memory holds is a function of the sizes and of the pairs that it was given,
        so a running one can be carried over exactly where it still has everything: to fewer
        compressed slots always (the newest stay), to more while no slot has been dropped, and to
        another window while that makes nothing due earlier or later than it was. Rows can be
        rewound as far as both windows agree.

        One layer's memory is then as if it had had the new sizes all along. So is the whole model's
        while no query has seen less or more than it would have with the new sizes. Later the pairs
        of deeper layers are those that were made over the old sizes: the memory is that of a model
        whose sizes changed at this token.

        Args:
            schedule: of the result, or one per layer (``model.schedules``); ratio, segment and
                sinks as they are.

        Raises:
            ValueError, TypeError: the memory does not have what ``schedule`` shows; the message
                names the size. Or the compressor is ``"most_used"``.
        """
        return memory_rows.resized(self, schedule)

    # ---- files

    def state_dict(self) -> dict[str, Any]:
        """The spec as plain values and the tensors by name (``"0.window_keys"`` is layer 0's), for
        ``torch.save``. The tensors alias the memory.
        """
        return memory_files.state_of(self)

    @staticmethod
    def from_state_dict(
        state: Mapping[str, Any], where: str = "ctx.Memory.from_state_dict"
    ) -> Memory:
        """The memory that :meth:`state_dict` described; its tensors are those of `state`.

        Raises:
            ValueError, TypeError: the state is of another format version, lacks a tensor, or one
                does not fit; the message names it.
        """
        memory = Memory(*memory_files.parts_of(state, where))
        memory_check.tensors(memory, where)
        return memory

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over, in place, what :meth:`state_dict` of a memory of this spec, batch size and
        dtype gave, from any device.

        Raises:
            ValueError, TypeError: it is of another; nothing has been written then.
        """
        where = "ctx.Memory.load_state_dict"
        other = Memory.from_state_dict(state, where)
        self.spec.check(other.spec, where)
        _C.copy_state(memory_rows.leaves(self), memory_rows.leaves(other), where)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`state_dict` to a safetensors file, whole or not at all; the spec is JSON in
        its metadata, under ``"ctx"``. :meth:`load` reads it.

        Raises:
            OSError: the file cannot be written; an older one is as it was.
        """
        memory_files.save(self.state_dict(), path, "ctx.Memory.save")

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Memory:
        """The memory that :meth:`save` wrote, or ``torch.save`` of :meth:`state_dict`.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: it is damaged, or of another format version.
        """
        where = "ctx.Memory.load"
        return Memory.from_state_dict(memory_files.load(path, device, where), where)

    def __repr__(self) -> str:
        keys = self.rings[0][0]
        return (
            f"Memory(layers={self.layers}, batch_size={self.batch_size}, dtype={keys.dtype}, "
            f"device={str(keys.device)!r}, nbytes={self.nbytes})"
        )


def _flatten(memory: Memory) -> tuple[list[Any], Spec]:
    return [memory.seen, memory.rewindable, memory.rings], memory.spec


def _flatten_with_keys(memory: Memory) -> tuple[list[tuple[Any, Any]], Spec]:
    parts, spec = _flatten(memory)
    return [*zip(map(pytree.GetAttrKey, (*CLOCK, "rings")), parts, strict=True)], spec


def _unflatten(parts: Any, spec: Spec) -> Memory:
    return Memory(spec, *parts)


pytree.register_pytree_node(
    Memory,
    _flatten,
    _unflatten,
    serialized_type_name="ctx.Memory",
    to_dumpable_context=Spec.to_dict,
    from_dumpable_context=Spec.from_dict,
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([Memory, Spec, LayerSpec])
