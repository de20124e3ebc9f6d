"""What is done with whole rows of a memory: of one layer, or of a model, that is any nesting of
lists and tuples of such memories.

:class:`ctx.KVMemory` has the same operations as methods. They may wait for a device to read an
index; a step never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctx.state import STATE, Memory

__all__ = ["clone", "merge", "reset", "rewind", "select"]

# A layer's memory, or a list or tuple of memories.
Nested = TypeVar("Nested", bound=Any)
Rows = int | Sequence[int] | Tensor


def as_rows(rows: Rows) -> Tensor:
    """Row indices as the tensor that the engine checks: int64 [N], or bool [B]."""
    if isinstance(rows, Tensor):
        return rows
    if isinstance(rows, Sequence) and len(rows) == 0:
        return torch.zeros(0, dtype=torch.int64)
    try:
        return torch.as_tensor([rows] if isinstance(rows, int) else rows)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"ctx: rows must be an index, several, or a bool tensor, got {rows!r}"
        ) from None


def as_counts(tokens: int | Tensor, seen: Tensor, where: str) -> Tensor:
    """Tokens of each row as a tensor; a copy, since it may be a memory's own counter."""
    if isinstance(tokens, Tensor):
        return tokens.clone()
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"{where}: tokens must be an integer or an int64 tensor, got {tokens!r}")
    if abs(tokens) >= 2**63:
        raise ValueError(f"{where}: tokens must be at most what can be taken back, got {tokens}")
    return torch.full_like(seen, tokens)


def reset(memory: Nested, rows: Rows | None = None) -> None:
    """Begins a new stream in every row, or in these, in place.

    Args:
        memory: of a layer or a model.
        rows: an index, several, or a bool tensor [B].

    Raises:
        IndexError, TypeError, ValueError: ``rows`` does not fit; nothing has been written then.
    """
    layers = _layers(memory, "ctx.rows.reset")
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
        ValueError, TypeError: more than can be taken back; nothing has been written then.
    """
    where = "ctx.rows.rewind"
    layers = _layers(memory, where)
    counts = []
    for layer in layers:
        seen = layer["seen"]
        count = as_counts(tokens, seen, where)
        if count.dtype != torch.int64:
            raise TypeError(f"{where}: tokens must be int64, got {count.dtype}")
        if count.shape != seen.shape:
            raise ValueError(f"{where}: tokens must be {list(seen.shape)}, got {list(count.shape)}")
        count = count.to(seen.device)
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

    selected: Nested = _map(chosen, memory)
    return selected


def merge(memories: Sequence[Nested]) -> Nested:
    """A new memory of the rows of several, one after the other; their geometry must be one.

    Raises:
        ValueError: there is none, or two of them differ; the message names the tensor.
    """
    where = "ctx.rows.merge"
    if not memories:
        raise ValueError(f"{where}: memories must be at least one, got none")
    parts = [_layers(memory, where) for memory in memories]
    if len({len(layers) for layers in parts}) > 1:
        counts = [len(layers) for layers in parts]
        raise ValueError(f"{where}: memories must have as many layers as the first, got {counts}")
    merged = []
    for layers in zip(*parts, strict=True):
        for name, first in layers[0].items():
            for layer in layers:
                mine, others = (
                    (first.shape[1:], first.dtype),
                    (layer[name].shape[1:], layer[name].dtype),
                )
                if mine != others:
                    raise ValueError(f"{where}: {name} must be {mine} as the first's, got {others}")
        merged.append({name: torch.cat([layer[name] for layer in layers]) for name in layers[0]})
    rest = iter(merged)
    whole: Nested = _map(lambda layer: next(rest), memories[0])
    return whole


def clone(memory: Nested) -> Nested:
    """A new memory that holds the same: where two continuations of a stream part."""
    _layers(memory, "ctx.rows.clone")
    twin: Nested = _map(lambda layer: {name: x.clone() for name, x in layer.items()}, memory)
    return twin


def _map(function: Any, memory: Any) -> Any:
    if isinstance(memory, dict):
        return function(memory)
    return type(memory)(_map(function, part) for part in memory)


def _layers(memory: Any, where: str) -> list[Memory]:
    """The memories of all layers, or an error before any of them is touched."""
    if isinstance(memory, dict):
        if set(memory) != set(STATE):
            raise ValueError(
                f"{where}: memory must be a dict of {', '.join(STATE)}, got {', '.join(memory)}"
            )
        return [memory]
    if not isinstance(memory, (list, tuple)):
        raise TypeError(
            f"{where}: memory must be a dict of tensors or a list of such, "
            f"got {type(memory).__name__}"
        )
    return [layer for part in memory for layer in _layers(part, where)]


def _index(layer: Memory, rows: Rows | None, where: str) -> Tensor:
    """Row indices, int64 [N] on the layer's device."""
    seen = layer["seen"]
    batch = seen.shape[0]
    if rows is None:
        return torch.arange(batch, device=seen.device)
    chosen = as_rows(rows)
    if chosen.dtype not in (torch.int64, torch.bool):
        raise TypeError(f"{where}: rows must be int64 or bool, got {chosen.dtype}")
    if chosen.dim() != 1:
        raise ValueError(f"{where}: rows must be [N], got {list(chosen.shape)}")
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
