"""What must hold of a model's memory as a whole: the dicts of all its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctx.state import STATE, dtype_of

__all__ = ["check_each_its_own", "keep", "kept"]


def kept(memory: Any) -> Any:
    """A layer's memory, with float32 where that must stay though the whole was cast.

    Mixed precision of FSDP2 casts all floating-point inputs of a module.
    """
    if not isinstance(memory, dict):
        return memory
    usage, keys = memory.get("attention_received"), memory.get("window_keys")
    if not isinstance(usage, Tensor) or not isinstance(keys, Tensor):
        return memory
    wanted = dtype_of("attention_received", keys.dtype, keys.dtype)
    if usage.dtype == wanted or usage.dtype != keys.dtype:
        return memory
    return {**memory, "attention_received": usage.to(wanted)}


def keep(given: Any, held: Any) -> None:
    """Puts what :func:`kept` made of a layer's memory into that, which is about to be written."""
    if held is not given:
        given["attention_received"] = held["attention_received"]


def check_each_its_own(memory: Sequence[Any], where: str) -> None:
    """Raises where two layers hold one dict, or one tensor is held twice: it would be streamed into
    twice.
    """
    for i, layer in enumerate(memory):
        for j in range(i):
            if layer is memory[j]:
                raise ValueError(
                    f"{where}: memory must have a dict of its own for every layer, "
                    f"got one for layers {j} and {i}"
                )
    if torch.compiler.is_compiling():  # addresses are not there yet
        return
    layers = [layer for layer in memory if isinstance(layer, dict)]
    parts = [x for layer in layers for x in map(layer.get, STATE) if isinstance(x, Tensor)]
    try:
        places = [place for part in parts if (place := part.data_ptr())]  # 0: without elements
    except RuntimeError:  # a tensor without storage, inside of a transform
        return
    if len(set(places)) == len(places):
        return
    owners: dict[int, tuple[int, str]] = {}
    for i, layer in enumerate(memory):
        for name in STATE if isinstance(layer, dict) else ():
            tensor = layer.get(name)
            place = tensor.data_ptr() if isinstance(tensor, Tensor) else 0
            if not place:
                continue
            other, other_name = owners.setdefault(place, (i, name))
            if other != i or (other_name != name and name in STATE):
                raise ValueError(
                    f"{where}: memory must have tensors of its own for every layer, got "
                    f"{other_name} of layer {other} as {name} of layer {i}"
                )
