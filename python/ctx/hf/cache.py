"""CompressiveCache: a bounded cache for a Hugging Face decoder."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctx import _check, memory_files
from ctx.hf._transformers import cache_classes
from ctx.hf.compressors import FittedCompressors
from ctx.hf.layer import CompressiveLayer
from ctx.hf.layer_law import laws_of
from ctx.hf.model import layers_of
from ctx.hf.stream import Stream
from ctx.memory import Memory
from ctx.schedule import SIZES, Schedule, Sizes, as_sizes, schedules_of

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
else:
    Cache = cache_classes()[0]

__all__ = ["CompressiveCache"]

_WHERE = "ctx.hf.CompressiveCache"
#: Key of what a state dict holds besides the memory's own.
_STATE = "ctx.hf.CompressiveCache"
#: Tokens that growing rings are made for at first.
_FIRST = 256


class CompressiveCache(Cache):
    """Keys and values of a rotary decoder at constant size, to pass as ``past_key_values``.

    Full-attention layers share one :class:`ctx.Memory` on one clock: the newest pairs exactly, a
    slot for every ``ratio`` older ones, and the first tokens. Sliding-window and linear-attention
    layers keep transformers' own cache layers. Any cutting of a text into calls gives the same
    numbers. With ``compressed=0`` and a window as large as the context it is exact attention,
    whose rings grow by doubling, up to that window.

    With ``ctx.hf.register(); model.set_attn_implementation("ctx")`` attention runs over the rings,
    whatever the calls, padding (any; left is usual) and sizes are. Under "sdpa" and "eager" the
    cache is the same function where every query of a call sees all that is stored, and refuses the
    rest by name: calls that reach over an eviction, padded rows (several rows, once a token leaves
    the window; a single row must not be padded), ``slot_mass`` once there are slots,
    ``"most_used"``, and sizes per layer.

    One cache for one conversation (or batch) and not safe in two threads at once; separate caches
    are. The model must run under ``torch.no_grad()`` or ``torch.inference_mode()``, as ``generate``
    does. Models compute angles in float32, so their own positions get coarse beyond some million
    tokens.

    Source: Rae et al. 2019 (arXiv:1911.05507), section 3; see :class:`ctx.Schedule`.

    Args:
        config: the model's own (``model.config``), of rotary positions: ``rope_type`` "default",
            "linear", "llama3" or "yarn". Its attention implementation is read in each call.
        window: exact tokens that every query is guaranteed to see behind it. This and
            ``compressed`` must be given unless compressors were fitted.
        compressed: slots for older tokens; 0: a sliding window.
        ratio: tokens per slot; default 4.
        segment: tokens leave the window only at multiples of it; default ``ratio``. These five
            sizes are one int, or one per full-attention layer.
        sinks: first tokens that are kept exactly for ever; default 4.
        compressor: a name of :data:`ctx.compression.COMPRESSORS` or a module, or one of these per
            full-attention layer. Modules are shared by all caches that are given them.
            A :class:`ctx.hf.FittedCompressors` says the five sizes, the distance and the mass
            itself; they are left out then.
        distance: ``"slot"`` (the default) counts what stands between query and key: bounded, for
            streams far beyond the trained length. ``"token"`` counts tokens, as the model was
            trained to.
        slot_mass: whether the scores of a slot get the mass that its compressor gives it, as it
            stands for several tokens (:class:`ctx.AttentionSettings`); default True.
        max_rewind: tokens that :meth:`crop` can take back. Assisted decoding and prompt look-up
            need as many as they draft.
        rotary_interleaved: whether channels (0, 1), (2, 3), … of a key are rotated together; None:
            as the model's ``rotate_half`` does it.
        dtype: of stored pairs; default that of the model's keys.
        compressed_dtype: of stored slots, as in :class:`ctx.KVMemory`; default ``dtype``.

    Raises:
        ValueError, TypeError: a setting is out of range, or the model is one that cannot be; the
            message names it.
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any,
        *,
        window: Sizes | None = None,
        compressed: Sizes | None = None,
        ratio: Sizes | None = None,
        segment: Sizes | None = None,
        sinks: Sizes | None = None,
        compressor: str | nn.Module | Sequence[str | nn.Module] = "mean",
        distance: str | None = None,
        slot_mass: bool | None = None,
        max_rewind: int = 64,
        rotary_interleaved: bool | None = None,
        dtype: torch.dtype | None = None,
        compressed_dtype: torch.dtype | None = None,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(
                f"{_WHERE}: config must be the model's (model.config), got {type(config).__name__}"
            )
        config = config.get_text_config(decoder=True)
        layers = layers_of(config, _WHERE)
        own = layers.count(None)
        given = dict(zip(SIZES, (window, compressed, ratio, segment, sinks), strict=True))
        biases = None
        if isinstance(compressor, FittedCompressors):
            _check_fitted(compressor, config, own, {**given, "distance": distance,
                                                    "slot_mass": slot_mass})  # fmt: skip
            schedules, compressors = compressor.schedules, [*compressor.compressors]
            biases = list(compressor.bias.detach())
            distance, slot_mass = compressor.distance, True
        else:
            schedules, compressors = _schedules(given, own), _each(compressor, own)
        max_rewind = _check.integer(max_rewind, "max_rewind", _WHERE, 1)
        if dtype is not None:
            dtype = _check.dtype(dtype, _WHERE)
        if compressed_dtype is not None:
            compressed_dtype = _check.dtype(compressed_dtype, _WHERE, "compressed_dtype")
        laws = laws_of(
            config,
            schedules,
            compressors,
            _WHERE,
            distance="slot" if distance is None else distance,
            slot_mass=True if slot_mass is None else slot_mass,
            max_rewind=max_rewind,
            rotary_interleaved=rotary_interleaved,
            biases=biases,
        )
        if all(law.grows for law in laws):
            laws = [law.sized(_FIRST) for law in laws]
        self._set(config, Stream(laws, dtype, compressed_dtype), layers)

    def _set(self, config: Any, stream: Stream, layers: list[Any]) -> None:
        """The layers: transformers' own, and those of the stream where there is None."""
        self.config, self._stream = config, stream
        numbers = itertools.count()
        super().__init__(
            layers=[
                CompressiveLayer(stream, next(numbers), config) if layer is None else layer
                for layer in layers
            ]
        )

    @property
    def memory(self) -> Memory | None:
        """The memory of the full-attention layers; None before the first call. Take tokens back
        with :meth:`crop`, which also counts what the model counts.
        """
        return self._stream.memory

    @property
    def nbytes(self) -> int:
        """Bytes of the memory; constant from the first call on, where there are slots."""
        return 0 if self.memory is None else self.memory.nbytes

    def _others(self) -> list[Any]:
        """transformers' own layers."""
        return [layer for layer in self.layers if not isinstance(layer, CompressiveLayer)]

    # ---- rows, as generation asks for them

    def reset(self) -> None:
        """Begins new conversations, of as many rows as come."""
        self._stream.reset()
        new = layers_of(self.config, _WHERE)  # transformers 5.17 keeps the length of its own
        pairs = zip(self.layers, new, strict=True)
        self.layers = [mine if other is None else other for mine, other in pairs]

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the last tokens, exactly, as if they had not come.

        Args:
            tokens_to_remove: minus their number.

        Raises:
            ValueError: it is positive, or more than ``max_rewind`` and the rings allow
                (``cache.memory.rewindable``), or reaches back to padding; or the compressor is
                ``"most_used"``. Nothing has been changed then.
        """
        where = f"{_WHERE}.crop"
        if isinstance(tokens_to_remove, Tensor):  # as transformers 5.17 gives it
            tokens_to_remove = int(tokens_to_remove)
        tokens = -_check.integer(tokens_to_remove, "tokens_to_remove", where)
        if tokens < 0:
            raise ValueError(
                f"{where}: tokens_to_remove must be minus the number of tokens to take back, "
                f"got {tokens_to_remove}"
            )
        with self._stream.undone():
            self._stream.rewind(tokens)
            for layer in self._others():
                layer.crop(-tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Goes on with these rows (beam search)."""
        self._stream.select(beam_idx)
        for layer in self._others():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, one after the other."""
        memory = self.memory
        if memory is not None:
            rows = torch.arange(memory.batch_size, device=memory.seen.device)
            self._stream.select(rows.repeat_interleave(repeats))
        for layer in self._others():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Goes on with these rows."""
        self._stream.select(indices)
        for layer in self._others():
            layer.batch_select_indices(indices)

    # ---- copies and files

    def fork(self) -> CompressiveCache:
        """Another cache that holds the same: where two continuations of a conversation part.
        Compressors are shared.
        """
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressiveCache:
        other = object.__new__(type(self))
        layers = [
            None if isinstance(layer, CompressiveLayer) else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        other._set(self.config, self._stream.clone(), layers)
        return other

    def state_dict(self) -> dict[str, Any]:
        """What the cache holds as plain values and tensors, for ``torch.save``; tensors alias it.

        Raises:
            ValueError: nothing has come yet, or there are layers of transformers' own, whose state
                is not known here; ``fork`` copies these.
        """
        where = f"{_WHERE}.state_dict"
        others = [type(layer).__name__ for layer in self._others()]
        if others:
            raise ValueError(f"{where}: layers must all be of full attention, got {others[0]}")
        if self.memory is None:
            raise ValueError(f"{where}: cache must have seen a token, got an empty one")
        stream = self._stream
        counts = {"columns": stream.columns, "unpadded": stream.unpadded}
        return {_STATE: counts, **self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` of a cache of the same settings gave; copies it.

        Raises:
            ValueError, TypeError: it is of another; nothing has been written then.
        """
        where = f"{_WHERE}.load_state_dict"
        counts = state.get(_STATE) if isinstance(state, Mapping) else None
        if not isinstance(counts, Mapping) or set(counts) != {"columns", "unpadded"}:
            raise ValueError(f"{where}: state must be what state_dict returns, got {type(state)}")
        held = Memory.from_state_dict({k: x for k, x in state.items() if k != _STATE}, where)
        first = held.spec.layers[0]
        geometry = (first.kv_heads, first.head_dim, first.value_dim)
        columns, unpadded = (
            _check.integer(counts[name], name, where, 0) for name in ("columns", "unpadded")
        )
        like = self._stream.like(held.spec, columns)
        like.spec(geometry, held.seen.device).check(held.spec, where)
        stream, held = self._stream, held.clone()  # before the reset: it may be this one's own
        stream.reset()
        stream.use(like.laws)
        stream.memory = held
        stream.columns, stream.unpadded = columns, unpadded

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`state_dict` as a safetensors file, whole or not at all, for ``load``."""
        memory_files.save(self.state_dict(), path, f"{_WHERE}.save")

    def load(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        """Takes over what :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: it is damaged, or of a cache of other settings.
        """
        self.load_state_dict(memory_files.load(path, device, f"{_WHERE}.load"))

    def __repr__(self) -> str:
        return f"CompressiveCache(layers={self.layers}, nbytes={self.nbytes})"


def _schedules(given: dict[str, Any], layers: int) -> tuple[Schedule, ...]:
    """The schedule of every layer, of sizes by name."""
    for name in ("window", "compressed"):
        if given[name] is None:
            raise TypeError(
                f"{_WHERE}: {name} must be given unless compressor is a "
                "ctx.hf.FittedCompressors, got None"
            )
    given = {**given, "ratio": 4 if given["ratio"] is None else given["ratio"]}
    given["sinks"] = 4 if given["sinks"] is None else given["sinks"]
    sizes = {name: as_sizes(size, name, layers, _WHERE) for name, size in given.items()}
    return schedules_of(layers, sizes)


def _check_fitted(
    fitted: FittedCompressors, config: Any, layers: int, given: dict[str, Any]
) -> None:
    """Raises unless compressors were fitted to such a model, and say alone what they say."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{_WHERE}: {name} must be left out where compressor is fitted, as it says it, "
                f"got {value!r}"
            )
    fitted.check_config(config, _WHERE)
    if len(fitted.schedules) != layers:
        raise ValueError(
            f"{_WHERE}: compressor must be fitted for {layers} full-attention layers, "
            f"got {len(fitted.schedules)}"
        )


def _each(compressor: Any, layers: int) -> list[Any]:
    """A compressor for each layer, of one or of several."""
    if isinstance(compressor, (list, tuple, nn.ModuleList)):
        if len(compressor) != layers:
            raise ValueError(
                f"{_WHERE}: compressor must be one or {layers}, one per full-attention layer, "
                f"got {len(compressor)}"
            )
        return list(compressor)
    if not isinstance(compressor, (str, nn.Module)):
        raise TypeError(f"{_WHERE}: compressor must be a name or a module, got {compressor!r}")
    return [compressor] * layers
