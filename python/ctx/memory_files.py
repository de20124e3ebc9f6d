"""A memory as plain values and tensors, and that in files: what the methods of :class:`ctx.Memory`
do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctx import _C, _check
from ctx.spec import Spec
from ctx.state import CLOCK, TENSORS

if TYPE_CHECKING:
    from ctx.memory import Memory

__all__ = ["decoded", "encoded", "load", "parts_of", "replaced", "save", "state_of"]

#: Key of the specification in a state dict.
_SPEC = "ctx.Memory"


def state_of(memory: Memory) -> dict[str, Any]:
    state: dict[str, Any] = {_SPEC: memory.spec.to_dict()}
    state |= {"seen": memory.seen, "rewindable": memory.rewindable}
    for layer, ring in enumerate(memory.rings):
        state |= {f"{layer}.{name}": x for name, x in zip(TENSORS, ring, strict=True)}
    return state


def parts_of(state: Any, where: str) -> tuple[Spec, Tensor, Tensor, list[list[Tensor]]]:
    """What :class:`ctx.Memory` is made of: spec, seen, rewindable, rings."""
    if not isinstance(state, Mapping) or _SPEC not in state:
        got = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{where}: state must be what state_dict returns, got {got}")
    spec = Spec.from_dict(state[_SPEC], where)
    names = [[f"{layer}.{name}" for name in TENSORS] for layer in range(len(spec.layers))]
    wanted = {_SPEC, *CLOCK, *(name for ring in names for name in ring)}
    if state.keys() != wanted:
        differ = ", ".join(sorted(map(str, wanted ^ state.keys())))
        raise ValueError(f"{where}: state must have one entry per tensor, got {differ}")
    _check.tensors(where, **{name: x for name, x in state.items() if name != _SPEC})
    rings = [[state[name] for name in ring] for ring in names]
    return spec, state["seen"], state["rewindable"], rings


def encoded(about: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> bytes:
    """A safetensors file of tensors and plain values, which are JSON in its metadata."""
    said = json.dumps(about, sort_keys=True)
    return _C.tensor_file_bytes({_C.ABOUT: said}, tensors, where)


def decoded(data: bytes, where: str, checked: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """What :func:`encoded` was given.

    Args:
        checked: whether a file without a checksum is refused.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    metadata, tensors = _C.tensor_file_of_bytes(data, where)
    for name in (_C.ABOUT, *([_C.CHECKSUM] if checked else [])):
        if name not in metadata:
            raise ValueError(f"{where}: metadata must have {name}, got none")
    return json.loads(metadata[_C.ABOUT]), tensors


def save(state: dict[str, Any], path: Any, where: str) -> None:
    """Writes tensors and plain values; :func:`load` gives them back."""
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    about = {name: x for name, x in state.items() if name not in tensors}
    replaced(path, encoded(about, tensors, where), where)


def replaced(path: Any, content: Any, where: str) -> None:
    """Puts a file in the place of another, whole or not at all.

    Args:
        content: bytes; anything else is written by torch.save.
    """
    target = Path(os.fsdecode(_check.path(path, where)))
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def load(path: Any, device: Any, where: str) -> Any:
    """What :func:`save` wrote, or torch.save, which wrote files of format 1."""
    name = os.fsdecode(_check.path(path, where))
    device = _check.device(device, where)
    with open(name, "rb") as file:
        data = file.read()
    try:
        if data.startswith(b"PK"):
            return _of_archive(data, device)
        about, tensors = decoded(data, where)
        return {**about, **{key: x.to(device) for key, x in tensors.items()}}
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{where}: path must be a file of ctx.Memory.save, got {name!r} "
            f"({said.removeprefix(f'{where}: ')})"
        ) from None


def _of_archive(data: bytes, device: torch.device) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        damaged = archive.testzip()  # torch does not look at checksums
    if damaged is not None:
        raise ValueError(f"checksums must be right, got another of {damaged}")
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
