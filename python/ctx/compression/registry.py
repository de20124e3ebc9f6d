"""Compressors by name, and modules as compressors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ctx import _check
from ctx.compression.base import Compressor
from ctx.compression.conv import Conv
from ctx.compression.custom import Custom
from ctx.compression.dilated import Dilated
from ctx.compression.gated import Gated
from ctx.compression.max import Max
from ctx.compression.mean import Mean
from ctx.compression.most_used import MostUsed

__all__ = [
    "COMPRESSORS",
    "as_compressor",
    "check_kernel",
    "compressor_of",
    "make_compressor",
    "register",
]


COMPRESSORS: dict[str, type[Compressor]] = {
    kind.name: kind for kind in (Mean, Max, Conv, Dilated, Gated, MostUsed)
}


def register(kind: type[Compressor]) -> type[Compressor]:
    """Makes a subclass of :class:`Compressor` available by its name; a class decorator.

    Its constructor must take what :class:`Compressor`'s takes. A class of the same module and
    qualified name (a notebook's cell that runs again) takes the earlier one's place.

    Raises:
        TypeError: ``kind`` is not such a class.
        ValueError: the name is taken.
    """
    if not (isinstance(kind, type) and issubclass(kind, Compressor)):
        raise TypeError(f"ctx.compression.register: kind must be a Compressor class, got {kind!r}")
    held = COMPRESSORS.get(kind.name, kind)
    again = (held.__module__, held.__qualname__) == (kind.__module__, kind.__qualname__)
    if not again or kind.name == "custom":
        raise ValueError(f"ctx.compression.register: name must be a new one, got {kind.name!r}")
    COMPRESSORS[kind.name] = kind
    return kind


def as_compressor(
    module: nn.Module, kv_heads: int, ratio: int, head_dim: int, value_dim: int
) -> Compressor:
    """A compressor as it is, any other module wrapped.

    Raises:
        ValueError, TypeError: it has another ratio, or is one that cannot be called; see also
            :class:`Custom`.
    """
    if isinstance(module, Compressor):
        if module.by_usage and not module.native:
            raise ValueError(
                f"ctx.compression.{type(module).__name__}: forward must not be overridden where "
                f"slots are chosen by usage, got a subclass of {module.name!r} that does"
            )
        if module.ratio != ratio:  # a longer kernel of conv would pass for one with an overlap
            raise ValueError(
                f"ctx.compression.{type(module).__name__}: ratio must be {ratio} as the "
                f"schedule's, got {module.ratio}"
            )
        return module
    return Custom(module, kv_heads, ratio, head_dim, value_dim)


def compressor_of(
    given: Any,
    where: str,
    kv_heads: int,
    ratio: int,
    head_dim: int,
    value_dim: int,
    **made: Any,
) -> Compressor:
    """A compressor by name, as :func:`make_compressor` makes it, or as :func:`as_compressor` takes
    it.
    """
    if isinstance(given, str):
        return make_compressor(given, kv_heads, ratio, head_dim, value_dim, **made)
    if not isinstance(given, nn.Module):
        raise TypeError(f"{where}: compressor must be a name or a module, got {given!r}")
    return as_compressor(given, kv_heads, ratio, head_dim, value_dim)


def make_compressor(
    name: str,
    kv_heads: int,
    ratio: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    kernel: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Compressor:
    """A compressor by name.

    Args:
        kernel: of "conv", which alone has one; default ``ratio``.

    Raises:
        ValueError: no compressor has that name, or it cannot have that kernel.
    """
    if name not in COMPRESSORS:
        known = ", ".join(COMPRESSORS)
        raise ValueError(f"ctx.compression: compressor must be one of {known}, got {name!r}")
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    if kernel is not None:
        made["kernel"] = check_kernel(name, ratio, kernel, "ctx.compression", "kernel")
    return COMPRESSORS[name](kv_heads, ratio, head_dim, value_dim, **made)


def check_kernel(name: str, ratio: int, kernel: int | None, where: str, called: str) -> int | None:
    """The kernel as an int, which the compressor must be able to have; None: its own.

    Raises:
        ValueError, TypeError: it cannot.
    """
    if kernel is None:
        return None
    if name != Conv.name:
        raise ValueError(f'{where}: {called} must be None unless "conv" compresses, got {kernel}')
    whole = _check.integer(kernel, called, where)
    if whole < ratio:
        raise ValueError(f"{where}: {called} must be at least ratio = {ratio}, got {kernel}")
    return whole
