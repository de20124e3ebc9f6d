"""Session: many independent streams in one set of rings, for servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctx import _C, _check
from ctx.kv_memory import KVMemory

__all__ = ["Session"]


class Session:
    """Room for many streams, each in a row of its own in every layer; any of them bring tokens in
    any call.

    A stream joins, gets an id that no other one ever has, and leaves. What it gets does not depend
    on who else is there: other streams are neither read, copied nor padded. Everything is allocated
    here. The same object as C++'s ``ctx::Session`` (``ctx/session.h``).

    A tick is one pass of a model over some streams: :meth:`step` for layer 0, 1, ... to the last,
    or :meth:`tick`. A stream's clock advances once, when the last layer is done: a tick that is not
    ended has not happened. It is given up by an error in the middle of a layer's work and by every
    other call that changes the session; then its streams can rewind by as many tokens less, and one
    that it brought more than ``max_rewind`` tokens (with ``"most_used"``: any) was interrupted: it
    can only leave, and be taken from a snapshot.

    An error leaves the session as it was, but for one that gives up a tick. Records no gradient.
    Not safe to use from two threads at once; different sessions are independent.

    Args:
        layers: a :class:`ctx.KVMemory` for each layer, or one for a model of one layer. Its
            settings are taken, with the parameters of its compressor, its bias and its relative
            positions; not its rows, nor what it holds. All have one ``max_rewind`` and one device.
        rows: how many streams there may be at once.

    Raises:
        ValueError, TypeError: an argument is out of range, or layers do not belong together.

    Example:
        >>> session = ctx.Session(ctx.KVMemory(ctx.Schedule(8, 4, 2), 1, 2, 16), rows=1000)
        >>> ann, bob = session.join(), session.join()
        >>> q, k, v = torch.randn(3, 2, 2, 5, 16)
        >>> session.step([bob, ann], 0, q, k, v, lengths=[5, 1]).shape
        torch.Size([2, 2, 5, 16])
        >>> session.seen(bob)
        5
    """

    def __init__(self, layers: KVMemory | Sequence[KVMemory], rows: int) -> None:
        where = "ctx.Session"
        given = [layers] if isinstance(layers, KVMemory) else layers
        if not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{where}: layers must be a ctx.KVMemory or a list of them, "
                f"got {type(given).__name__}"
            )
        for layer in given:
            if not isinstance(layer, KVMemory):
                raise TypeError(f"{where}: layers must be ctx.KVMemory, got {type(layer).__name__}")
            if layer.compressor.native and not layer.compressor.in_engine:
                raise ValueError(
                    f"{where}: layers must have compressors that nothing but the engine computes, "
                    f"got one whose call is changed: {layer.compressor.name!r}"
                )
            if layer._followed.any:
                layer._followed.hand_over(layer)
        self._layers = tuple(given)  # keeps what the engine's tensors are views of
        rows = _check.integer(rows, "rows", where)
        self._native = _C.Session([layer._native for layer in given], rows)

    def join(self) -> int:
        """Begins a stream and returns its id.

        Raises:
            ValueError: all rows are taken.
        """
        return self._native.join()

    def leave(self, id: int) -> None:
        """Ends a stream, and erases what it held.

        Raises:
            IndexError: there is no such stream.
        """
        self._native.leave(_id(id, "leave"))

    def step(
        self,
        ids: Iterable[int],
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Iterable[int] | Tensor | None = None,
    ) -> Tensor:
        """One layer of a tick: appends tokens to these streams and returns what their queries
        attend to.

        Args:
            ids: the N streams, all different; as the lengths, the same in every layer of a tick.
            layer: 0 begins a tick; then the next one; the last one ends it.
            q: queries [N, H, T, D], un-rotated; dtype and device of the layer, any strides.
            k: keys [N, Hkv, T, D], un-rotated.
            v: values [N, Hkv, T, Dv].
            lengths: stream i brings its first ``lengths[i]`` tokens, 0 to T, the rest is padding
                that nothing sees; default all.

        Returns:
            [N, H, T, Dv], a fresh tensor; zero at padding.

        Raises:
            IndexError: there is no such stream or layer.
            ValueError, TypeError: an argument does not fit; nothing has been written then.
        """
        where = "ctx.Session.step"
        counts = None if lengths is None else _integers(lengths, "lengths", where)
        layer = _check.integer(layer, "layer", where)
        try:
            return self._native.step(_integers(ids, "ids", where), layer, q, k, v, counts)
        except TypeError:  # where it is about the binding, its words are a C++ signature
            _check.tensors(where, (), q=q, k=k, v=v)
            raise

    def tick(
        self,
        ids: Iterable[int],
        x: Sequence[Tensor],
        layer: Callable[[int, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]], Tensor],
    ) -> list[Tensor]:
        """A whole tick: runs all layers over what each stream brings, of any number of tokens.

        Streams are put together into batches so that none is padded to twice its tokens or more,
        and no clock advances before the last layer of the last batch.

        Args:
            ids: the streams, all different.
            x: for each stream [T, ...]: any T, the rest alike; what layer 0 reads.
            layer: ``layer(number, x, attend)`` with x [N, T, ...] returns the layer's output
                [N, T, ...]; it calls ``attend(q, k, v)`` once, which is :meth:`step` for the batch,
                and must not change the session.

        Returns:
            For each stream [T, ...], what the last layer returned.

        Raises:
            IndexError: there is no such stream.
            ValueError, TypeError: an argument does not fit. What ``layer`` raises gives up the
                tick.
        """
        where = "ctx.Session.tick"
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{where}: x must be a list of tensors, got {type(x).__name__}")
        for part in x:
            if not isinstance(part, Tensor):
                raise TypeError(f"{where}: x must be tensors, got {type(part).__name__}")
        if not callable(layer):
            raise TypeError(f"{where}: layer must be callable, got {type(layer).__name__}")
        with torch.no_grad():
            return self._native.tick(_integers(ids, "ids", where), x, layer)

    def fork(self, id: int) -> int:
        """Begins a stream that holds what this one does, and returns its id.

        Raises:
            IndexError: there is no such stream.
            ValueError: all rows are taken, or the stream was interrupted.
        """
        return self._native.fork(_id(id, "fork"))

    def rewind(self, id: int, tokens: int) -> None:
        """Takes back the last tokens of a stream, exactly, as if they had not come.

        Args:
            id: the stream.
            tokens: at most :meth:`rewindable`.

        Raises:
            IndexError: there is no such stream.
            ValueError: more than can be taken back, the stream was interrupted, or a compressor is
                ``"most_used"``, whose counts cannot be taken back.
        """
        tokens = _check.integer(tokens, "tokens", "ctx.Session.rewind")
        self._native.rewind(_id(id, "rewind"), tokens)

    def snapshot(self, id: int) -> bytes:
        """What a stream holds, as a safetensors file with a checksum (``ctx/session.h``); the size
        does not depend on how long it is.

        Raises:
            IndexError: there is no such stream.
            ValueError: the stream was interrupted.
        """
        return self._native.snapshot(_id(id, "snapshot"))

    def restore(self, snapshot: bytes) -> int:
        """Begins a stream that holds what a snapshot does, and returns its id.

        Args:
            snapshot: of this session or of another one of the same settings, in any dtype.

        Raises:
            ValueError, TypeError: all rows are taken, or the bytes are damaged or of another
                format, version or setting, which is named; nothing has been written.
        """
        if not isinstance(snapshot, (bytes, bytearray, memoryview)):
            raise TypeError(
                f"ctx.Session.restore: snapshot must be bytes, got {type(snapshot).__name__}"
            )
        return self._native.restore(bytes(snapshot))

    def save(self, id: int, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`snapshot` to a file, whole or not at all.

        Raises:
            IndexError, ValueError: as :meth:`snapshot`.
            OSError: the file cannot be written; an older one is as it was.
        """
        self._native.save(_id(id, "save"), _check.path(path, "ctx.Session.save"))

    def load(self, path: str | os.PathLike[str]) -> int:
        """:meth:`restore` of what :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: as :meth:`restore`.
        """
        return self._native.load(_check.path(path, "ctx.Session.load"))

    def seen(self, id: int) -> int:
        """Tokens that a stream has seen."""
        return self._native.seen(_id(id, "seen"))

    def rewindable(self, id: int) -> int:
        """How many of them :meth:`rewind` can take back."""
        return self._native.rewindable(_id(id, "rewindable"))

    @property
    def ids(self) -> list[int]:
        """The streams that are there, in the order in which they came."""
        return self._native.ids

    @property
    def rows(self) -> int:
        """How many streams there may be."""
        return self._native.rows

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self._native.layers

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Constant."""
        return self._native.nbytes

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return (
            f"Session(layers={self.layers}, rows={self.rows}, streams={len(self)}, "
            f"nbytes={self.nbytes})"
        )


def _id(id: Any, method: str) -> int:
    return _check.integer(id, "id", f"ctx.Session.{method}")


def _integers(numbers: Any, name: str, where: str) -> list[int]:
    if isinstance(numbers, Tensor):
        numbers = numbers.tolist()
    if isinstance(numbers, (str, bytes)) or not isinstance(numbers, Iterable):
        raise TypeError(f"{where}: {name} must be integers, got {type(numbers).__name__}")
    # Most are plain integers; every tick of every layer comes through here.
    return [n if type(n) is int else _check.integer(n, name, where) for n in numbers]
