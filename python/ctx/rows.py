"""What is done with whole rows of a memory: of one layer, or of a model, that is any nesting of
lists and tuples of such memories. What is made of a memory says what it was made for, as that does
(:mod:`ctx.identity`).

:class:`ctx.KVMemory` has the same operations as methods. They may wait for a device to read an
index; a step never does.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctx import _check, identity
from ctx.schedule import SIZES, Schedule
from ctx.state import (
    COUNTS,
    RINGS,
    SLOTS,
    STATE,
    Memory,
    StateShape,
    check_names,
    dtype_of,
    ordinary,
    ring_positions,
    slot_dtypes,
    slots_as,
)

__all__ = ["clone", "merge", "reset", "resized", "rewind", "select", "to"]

_SIZES = {
    "seen": "[B]",
    "rewindable": "[B]",
    "attention_received": "[B, Hkv, capacity]",
    "slot_positions": "[B, Hkv, capacity]",
}

# A layer's memory, or a list or tuple of memories.
Nested = TypeVar("Nested", bound=Any)
Rows = int | Sequence[int] | Tensor


def as_rows(rows: Any, where: str) -> Tensor:
    """Row indices as the tensor that the engine checks: int64 [N], or bool [B].

    Raises:
        TypeError, IndexError: they are no integers, or such as no row can have.
    """
    if isinstance(rows, Tensor):
        return rows
    if hasattr(rows, "__array__") and hasattr(rows, "__len__"):  # NumPy's
        rows = rows.tolist()
    values = rows if isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)) else [rows]
    if values is rows and values and all(isinstance(value, bool) for value in values):
        return torch.tensor(values, device="cpu")
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        indices = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(
            f"{where}: rows must be an index, several, or bool [B], got {rows!r}"
        ) from None
    for index in indices:
        if index not in _check.INT64:
            raise IndexError(f"{where}: rows must be between 0 and B - 1, got {index}")
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def as_counts(tokens: Any, seen: Tensor, where: str) -> Tensor:
    """Tokens of each row, int64 [B], of one number or of a tensor that is still to be checked."""
    if isinstance(tokens, Tensor):
        return tokens.clone()  # it may be a memory's own counter
    return torch.full_like(seen, _check.integer(tokens, "tokens", where))


def reset(memory: Nested, rows: Rows | None = None) -> None:
    """Begins a new stream in every row, or in these, in place.

    Args:
        memory: of a layer or a model.
        rows: an index, several, or a bool tensor [B].

    Raises:
        IndexError, TypeError, ValueError: ``rows`` does not fit; nothing has been written then.
    """
    layers = _layers(memory, "ctx.rows.reset")
    if rows is None:
        chosen = [torch.arange(len(layer["seen"]), device=layer["seen"].device) for layer in layers]
    else:
        chosen = [_index(layer, rows, "ctx.rows.reset") for layer in layers]
    with torch.inference_mode():
        for layer, index in zip(layers, chosen, strict=True):
            layer["seen"].index_fill_(0, index, 0)
            layer["rewindable"].index_fill_(0, index, 0)


def rewind(memory: Nested, tokens: int | Tensor) -> None:
    """Takes back the last tokens of every row, in place, as if they had not come.

    Args:
        memory: of a layer or a model.
        tokens: of each row, or int64 [B]; at most the layer's ``rewindable``.

    Raises:
        ValueError, TypeError: more than can be taken back, or a compressor is ``"most_used"``,
            whose counts cannot be; nothing has been written then.
    """
    where = "ctx.rows.rewind"
    layers = _layers(memory, where)
    counts = []
    for layer in layers:
        seen = layer["seen"]
        if layer["attention_received"].shape[2]:
            raise ValueError(
                f"{where}: compressor must be one whose slots follow from the tokens alone, "
                'got "most_used"'
            )
        count = as_counts(tokens, seen, where)
        if count.dtype != torch.int64:
            raise TypeError(f"{where}: tokens must be int64, got {count.dtype}")
        if count.shape != seen.shape:
            raise ValueError(f"{where}: tokens must be {list(seen.shape)}, got {list(count.shape)}")
        count = _readable(count, "tokens", where).to(seen.device)
        for row, (asked, most) in enumerate(
            zip(count.tolist(), layer["rewindable"].tolist(), strict=True)
        ):
            if not 0 <= asked <= most:
                raise ValueError(
                    f"{where}: tokens must be between 0 and what row {row} can take back = {most}, "
                    f"got {asked}"
                )
        counts.append(count)
    with torch.inference_mode():
        for layer, count in zip(layers, counts, strict=True):
            layer["seen"].sub_(count)
            layer["rewindable"].sub_(count)


def select(memory: Nested, rows: Rows) -> Nested:
    """A new memory of these rows, in this order; repeats allowed (beam search).

    Args:
        memory: of a layer or a model; left as it is.
        rows: an index, several, or a bool tensor [B].

    Raises:
        IndexError, TypeError, ValueError: ``rows`` does not fit, or is none.
    """
    where = "ctx.rows.select"
    for layer in _layers(memory, where):
        if len(_index(layer, rows, where)) == 0:
            raise ValueError(f"{where}: rows must be at least one, got none")

    def chosen(layer: Memory) -> Memory:
        index = _index(layer, rows, where)
        return {name: tensor.index_select(0, index) for name, tensor in layer.items()}

    with ordinary():
        selected: Nested = _map(chosen, memory)
    return selected


def merge(memories: Sequence[Nested]) -> Nested:
    """A new memory of the rows of several, one after the other; their geometry must be one, and so
    must be what they were made for.

    Raises:
        ValueError: there is none, or two of them differ; the message names the setting or the
            tensor.
    """
    where = "ctx.rows.merge"
    if not isinstance(memories, (list, tuple)):
        raise TypeError(f"{where}: memories must be a list, got {type(memories).__name__}")
    if not memories:
        raise ValueError(f"{where}: memories must be at least one, got none")
    parts = [_layers(memory, where) for memory in memories]
    if len({len(layers) for layers in parts}) > 1:
        counts = [len(layers) for layers in parts]
        raise ValueError(f"{where}: memories must have as many layers as the first, got {counts}")
    merged = []
    for layers in zip(*parts, strict=True):
        _made_alike(layers, where)
        for name in STATE:
            first, *others = (_kind(layer[name]) for layer in layers)
            for other in others:
                if other != first:
                    raise ValueError(f"{where}: {name} must be {first} as the first's, got {other}")
        with ordinary():
            merged.append({name: torch.cat([part[name] for part in layers]) for name in layers[0]})
    rest = iter(merged)
    whole: Nested = _map(lambda layer: next(rest), memories[0])
    return whole


def clone(memory: Nested) -> Nested:
    """A new memory that holds the same: where two continuations of a stream part."""
    _layers(memory, "ctx.rows.clone")
    with ordinary():
        twin: Nested = _map(lambda layer: {name: x.clone() for name, x in layer.items()}, memory)
    return twin


def to(
    memory: Nested,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Nested:
    """A new memory that holds the same, in another dtype or on another device.

    Counts stay int64, and usage stays float32 (float64 beside float64). Slots that are stored in
    another dtype than pairs (``compressed_dtype=``, int8 among them) keep it, but in a float64
    memory, which has one dtype.

    Args:
        memory: of a layer or a model; left as it is.
        dtype: of pairs: float32, float64, bfloat16 or float16; default as it is.
        device: default as it is.

    Raises:
        TypeError, ValueError: there is no such dtype or device for a memory.
    """
    where = "ctx.rows.to"
    _layers(memory, where)
    if dtype is not None and not _check.dtype(dtype, where).is_floating_point:
        raise TypeError(f"{where}: dtype must be floating point, got {dtype}")
    if device is not None:
        device = _check.device(device, where)

    def moved(layer: Memory) -> Memory:
        was, slots = layer["window_keys"].dtype, layer["compressed_keys"].dtype
        pairs = dtype or was
        stored = slots if slots != was and slots in slot_dtypes(pairs) else pairs
        made = {}
        for name, x in layer.items():
            kind = dtype_of(name, pairs, stored) if name in STATE else x.dtype
            numbers = slots_as(x, kind) if name in SLOTS and kind != x.dtype else x
            made[name] = numbers.to(device or x.device, kind, copy=True)
        return made

    with ordinary():
        twin: Nested = _map(moved, memory)
    return twin


def resized(
    memory: Nested,
    old: Schedule | Sequence[Schedule],
    new: Schedule | Sequence[Schedule],
    *,
    overlap: int | None = None,
) -> Nested:
    """A new memory of other sizes that holds the same pairs and the slots made of them.

    What a layer's memory holds is a function of the sizes and of the pairs that it was given, so a
    running one can be carried over exactly where it still has everything: to fewer compressed slots
    always (the newest stay), to more while no slot has been dropped, and to another window while
    that makes nothing due earlier or later than it was. Rows can be rewound as far as both windows
    agree.

    One layer's memory is then as if it had had the new sizes all along. So is the whole model's
    while no query has seen less or more than it would have with the new sizes: with more slots, as
    long as none has been dropped; with fewer, as long as no more have been made. Later the pairs of
    deeper layers are those that were made over the old sizes, which a model of the new sizes would
    have made otherwise: the memory is that of a model whose sizes changed at this token.

    Args:
        memory: of a layer or a model; left as it is.
        old: the schedule it was made with, or one per layer (``model.schedules``).
        new: the schedule of the result; ratio, segment and sinks as in ``old``.
        overlap: tokens before a group that the compressor reads, too; default what the memory says,
            or 0.

    Raises:
        ValueError, TypeError: ``memory`` is not of ``old``, or does not have what ``new`` shows;
            the message names the size. Or the compressor is ``"most_used"``: what got attention
            depends on the sizes.
    """
    where = "ctx.rows.resized"
    layers = _layers(memory, where)
    if overlap is not None:
        overlap = _check.integer(overlap, "overlap", where)
    pairs = zip(_each(old, "old", layers, where), _each(new, "new", layers, where), strict=True)
    made = [
        resize(layer, before, after, overlap, where)
        for layer, (before, after) in zip(layers, pairs, strict=True)
    ]
    rest = iter(made)
    whole: Nested = _map(lambda layer: next(rest), memory)
    return whole


def resize(layer: Memory, old: Schedule, new: Schedule, overlap: int | None, where: str) -> Memory:
    """:func:`resized` of one layer."""
    said = dict(
        part for name in identity.marks(layer) for part in identity.settings_in(name).items()
    )
    if overlap is None:
        overlap = int(said.get("overlap", 0))
    elif said.get("overlap", str(overlap)) != str(overlap):
        raise ValueError(
            f"{where}: overlap must be {said['overlap']} as the memory was made for, got {overlap}"
        )
    if layer["attention_received"].shape[2]:
        raise ValueError(
            f"{where}: compressor must be one whose slots follow from the tokens alone, "
            'got "most_used"'
        )
    for name in ("ratio", "segment", "sinks"):
        was, asked = getattr(old, name), getattr(new, name)
        if asked != was:
            raise ValueError(f"{where}: {name} must stay as it is = {was}, got {asked}")
    keys, values = layer["window_keys"], layer["window_values"]
    max_rewind = keys.shape[2] - old._law.max_window - overlap
    if max_rewind < 1:
        raise ValueError(
            f"{where}: window_keys must hold more than {old._law.max_window + overlap} tokens for "
            f"{old}, got {keys.shape[2]}"
        )
    widths = (keys.shape[1], keys.shape[3], values.shape[3], max_rewind)
    shapes = [StateShape.of(one, *widths, overlap=overlap) for one in (old, new)]
    shapes[0].check(layer, len(keys), keys.device, where, "memory")
    for name, value in zip(SIZES, old.numbers, strict=True):
        if said.get(name, str(value)) != str(value):
            raise ValueError(
                f"{where}: {name} must be {said[name]} as the memory was made for, got {value}"
            )

    seen = layer["seen"].tolist()
    groups = [old.groups(count - 1) for count in seen]
    for row, (count, made) in enumerate(zip(seen, groups, strict=True)):
        asked = new.groups(count - 1)
        if asked != made:
            raise ValueError(
                f"{where}: window must leave {made} groups compressed, as there are in row {row}, "
                f"got {new.window}, which makes them {asked}"
            )
        if made > old.compressed < new.compressed:
            raise ValueError(
                f"{where}: compressed must be at most {old.compressed} in row {row}, which has "
                f"dropped all but that many of {made} slots, got {new.compressed}"
            )
    rewindable = [
        _agreeing(old, new, count, most)
        for count, most in zip(seen, layer["rewindable"].tolist(), strict=True)
    ]
    slots = layer["compressed_keys"].dtype
    result = shapes[1].zeros(len(keys), keys.dtype, keys.device, slots)
    with ordinary():
        for name in identity.marks(layer):
            result |= identity.entry(identity.rescheduled(name, new), len(keys), keys.device)
        for name in ("sink_keys", "sink_values", "seen"):
            result[name].copy_(layer[name])
        result["rewindable"].copy_(torch.tensor(rewindable, device="cpu"))
        slots_made = torch.tensor(groups, device="cpu").to(keys.device)
        newest = {"window": layer["seen"] - 1, "compressed": slots_made - 1}
        oldest = {"window": old.sinks, "compressed": 0}
        for region, names in RINGS.items():
            for name in names:
                _refill(result[name], layer[name], newest[region], oldest[region])
    return result


def _agreeing(old: Schedule, new: Schedule, seen: int, most: int) -> int:
    """How many tokens can be taken back so that both schedules have the same groups throughout."""
    for count in range(1, most + 1):
        if old.groups(seen - 1 - count) != new.groups(seen - 1 - count):
            return count - 1
    return most


def _refill(ring: Tensor, source: Tensor, newest: Tensor, oldest: int) -> None:
    """Fills a ring with what another ring of other capacity holds of the same positions."""
    capacity = source.shape[2]
    if ring.shape[2] == 0 or capacity == 0:
        return
    positions = ring_positions(newest, ring.shape[2])
    held = (positions >= oldest) & (positions > newest[:, None] - capacity)
    wide = (len(ring), 1, ring.shape[2], *[1] * (ring.dim() - 3))
    index = positions.remainder(capacity).reshape(wide).expand_as(ring)
    ring.copy_(source.gather(2, index).masked_fill(held.logical_not().reshape(wide), 0))


def _each(schedules: Any, name: str, layers: Sequence[Memory], where: str) -> list[Schedule]:
    """One schedule per layer, of one or of several."""
    several = isinstance(schedules, (list, tuple))
    found = list(schedules) if several else [schedules] * len(layers)
    for schedule in found:
        if not isinstance(schedule, Schedule):
            got = type(schedule).__name__
            raise TypeError(f"{where}: {name} must be a ctx.Schedule or one per layer, got {got}")
    if len(found) != len(layers):
        raise ValueError(
            f"{where}: {name} must be one schedule or {len(layers)}, one per layer, "
            f"got {len(found)}"
        )
    return found


def _made_alike(layers: Sequence[Memory], where: str) -> None:
    """Raises unless all were made for the same, or none says for what."""
    first, *others = (identity.marks(layer) for layer in layers)
    for other in others:
        if bool(other) != bool(first):
            got = "one that does not say it" if first else "one that says it"
            raise ValueError(
                f"{where}: memories must all say what they were made for, or none, got {got} "
                "beside the first"
            )
        if other != first:
            identity.check(dict.fromkeys(other), first[0], where)


def _kind(tensor: Tensor) -> str:
    return f"[B, {', '.join(map(str, tensor.shape[1:]))}] {tensor.dtype} on {tensor.device}"


def _readable(tensor: Tensor, name: str, where: str) -> Tensor:
    if tensor.is_meta or tensor.layout != torch.strided:
        got = "a tensor on meta" if tensor.is_meta else tensor.layout
        raise ValueError(f"{where}: {name} must be a dense tensor of numbers, got {got}")
    return tensor


def _map(function: Any, memory: Any) -> Any:
    if isinstance(memory, dict):
        return function(memory)
    return type(memory)(_map(function, part) for part in memory)


def _layers(memory: Any, where: str) -> list[Memory]:
    """The memories of all layers, or an error before any of them is touched."""
    if isinstance(memory, dict):
        found = check_names(memory, where)
        rows = memory["seen"].shape[:1]
        for name in (*COUNTS, *STATE):
            tensor = memory[name]
            sizes = _SIZES.get(name, "[B, Hkv, capacity, width]")
            rank = 1 + sizes.count(",")
            if tensor.dim() != rank or tensor.shape[:1] != rows:
                got = f"{list(tensor.shape)} beside seen {list(memory['seen'].shape)}"
                raise ValueError(f"{where}: {name} must be {sizes}, got {got}")
            packed = name in SLOTS and tensor.dtype == torch.int8
            if (tensor.dtype == torch.int64) != (name in COUNTS) and not packed:
                kind = "int64" if name in COUNTS else "floating point"
                raise TypeError(f"{where}: {name} must be {kind}, got {tensor.dtype}")
        identity.check_entry(memory, found, rows[0], where)
        return [memory]
    if not isinstance(memory, (list, tuple)):
        raise TypeError(
            f"{where}: memory must be a dict of tensors or a list of such, "
            f"got {type(memory).__name__}"
        )
    return [layer for part in memory for layer in _layers(part, where)]


def _index(layer: Memory, rows: Rows, where: str) -> Tensor:
    """Row indices, int64 [N] on the layer's device."""
    seen = layer["seen"]
    batch = seen.shape[0]
    chosen = as_rows(rows, where)
    if chosen.dtype not in (torch.int64, torch.bool):
        raise TypeError(f"{where}: rows must be int64 or bool, got {chosen.dtype}")
    if chosen.dim() != 1:
        raise ValueError(f"{where}: rows must be [N], got {list(chosen.shape)}")
    _readable(chosen, "rows", where)
    if chosen.dtype == torch.bool:
        if len(chosen) != batch:
            raise ValueError(
                f"{where}: rows must be bool [B] = [{batch}], got {list(chosen.shape)}"
            )
        chosen = chosen.nonzero()[:, 0]
    elif chosen.numel():
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= batch:
            got = low if low < 0 else high
            raise IndexError(f"{where}: rows must be between 0 and B - 1 = {batch - 1}, got {got}")
    return chosen.to(seen.device)
