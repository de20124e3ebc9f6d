"""What arguments must be, in the one grammar of messages: *where: what must be, got what*.

The engine checks what the numbers mean. This is about what has no meaning there at all: something
that is not a number, not a tensor, not a device. Each function returns the value in the form in
which the engine takes it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "device", "dtype", "flag", "integer", "integers", "number", "numbers_of", "one_of", "path",
    "per_head", "tensors",
]  # fmt: skip

INT64 = range(-(2**63), 2**63)


def integer(
    value: Any, name: str, where: str, least: int | None = None, *, kind: str = "an int"
) -> int:
    """An int, or what stands for one (a NumPy integer); a bool does not. `kind` is what it must be.

    Raises:
        TypeError, ValueError: it is none, does not fit into 64 bits, or is below `least`.
    """
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"{where}: {name} must be {kind}, got {value!r}") from None
    if whole not in INT64:
        raise ValueError(f"{where}: {name} must fit into 64 bits, got {whole}")
    if least is not None and whole < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {whole}")
    return whole


def integers(where: str, least: int | None = None, **values: Any) -> list[int]:
    """Each as :func:`integer` takes it, in their order."""
    return [integer(value, name, where, least) for name, value in values.items()]


def number(value: Any, name: str, where: str) -> float:
    """A float, or what stands for one.

    Raises:
        TypeError: it is none.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}") from None


def per_head(values: Sequence[float] | Tensor, name: str, where: str) -> Tensor:
    """One number per query head as the user gives them, as float64 [H].

    Raises:
        TypeError, ValueError: they are no numbers, or not finite.
    """
    if isinstance(values, Tensor) and not values.is_meta and not values.is_complex():
        made = values.detach().to(torch.float64)
    else:
        try:
            if isinstance(values, (Tensor, str, bytes)):
                raise TypeError
            numbers = [float(value) for value in values]
            made = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{where}: {name} must be numbers per query head, got {values!r}"
            ) from None
    if not made.isfinite().all():
        raise ValueError(f"{where}: {name} must be finite, got {made.tolist()}")
    return made


def one_of(value: Any, name: str, allowed: Sequence[str | None], where: str) -> None:
    """Raises unless it is one of the names allowed, or None where that is."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{where}: {name} must be one of {choices}, got {value!r}")


def flag(value: Any, name: str, where: str) -> bool:
    """True or False, and nothing else."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be a bool, got {value!r}")
    return value


def dtype(value: Any, where: str, name: str = "dtype") -> torch.dtype:
    """One of torch's dtypes."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{where}: {name} must be a torch.dtype, got {value!r}")
    return value


def device(value: Any, where: str, name: str = "device") -> torch.device:
    """A device that this torch can put tensors on, as these name it: with the index of the current
    one where none is given.

    Raises:
        TypeError, ValueError: it is none, or there is no such device here.
    """
    if isinstance(value, bool) or not isinstance(value, (torch.device, str, int)):
        raise TypeError(f"{where}: {name} must be a torch.device or its name, got {value!r}")
    try:
        return torch.empty(0, device=torch.device(value)).device
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{where}: {name} must be one that torch has here, got {value!r} ({said})"
        ) from None


def path(value: Any, where: str) -> bytes:
    """A file's name as the system takes it."""
    try:
        return os.fsencode(value)
    except TypeError:
        raise TypeError(
            f"{where}: path must be a str, bytes or os.PathLike, got {type(value).__name__}"
        ) from None


def numbers_of(*modules: nn.Module) -> tuple[torch.dtype | None, torch.device | None]:
    """The dtype and device of the first floating-point parameter or buffer of the first of these
    modules that has one; None, None: none has.

    Nothing is asked of a module but to be one: a quantised layer has no parameters, an adapter has
    those of the layer that it wraps.
    """
    for module in modules:
        own = module._parameters.values()  # most have their own, which is found at once
        for found in (own, module.parameters(), module.buffers()):
            for tensor in found:
                if tensor is not None and tensor.is_floating_point():
                    return tensor.dtype, tensor.device
    return None, None


def tensors(where: str, optional: tuple[str, ...] = (), **values: Any) -> None:
    """Raises unless each is a tensor, or None where it is optional."""
    for name, value in values.items():
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            kind = "a tensor or None" if name in optional else "a tensor"
            raise TypeError(f"{where}: {name} must be {kind}, got {type(value).__name__}")
