"""Compressors: groups of c pairs become one slot each, per kv head.

``Mean``, ``Max`` and ``Conv`` are compression functions of Rae et al. 2019 (arXiv:1911.05507,
section 3.2). Deviation: the paper compresses hidden states with one network for all heads, here
every kv head compresses its own (un-rotated) keys and values.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ctx import _check

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Conv",
    "Custom",
    "Gated",
    "Max",
    "Mean",
    "make_compressor",
    "register",
]


class Compressor(nn.Module):
    """Maps groups of pairs to slots; the base of all compressors.

    A subclass of your own defines ``name`` and :meth:`forward`, and works in training and in
    streams like the built-in ones; :func:`register` makes it available by its name.

    Args:
        kv_heads: key/value heads Hkv, >= 1.
        ratio: tokens per slot c, >= 1.
        head_dim: key width D, >= 1.
        value_dim: value width Dv; default ``head_dim``. 0 where there are no values (a memory of
            layer inputs): then none of the parameters ``value_*`` is made.

    Raises:
        ValueError: a size is below 1.
    """

    name: ClassVar[str]
    #: Whether the engine computes it by name; otherwise `forward` is called, once for each call.
    native: ClassVar[bool] = False

    def __init__(
        self,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"kv_heads": kv_heads, "ratio": ratio, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            least = 0 if name == "value_dim" else 1
            if _check.integer(size, name, f"ctx.compression.{type(self).__name__}") < least:
                raise ValueError(
                    f"ctx.compression.{type(self).__name__}: {name} must be at least {least}, "
                    f"got {size}"
                )
        self.kv_heads, self.ratio, self.head_dim, self.value_dim = (
            kv_heads,
            ratio,
            head_dim,
            value_dim,
        )
        for name, shape in self.parameter_shapes().items():
            if value_dim == 0 and name.startswith("value_"):
                continue
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )
        self.reset_parameters()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that this class makes, in the engine's order."""
        return {}

    def reset_parameters(self) -> None:
        """Starts as mean pooling (max: has nothing to start)."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def operands(self) -> list[Tensor]:
        """The parameters as the engine takes them; none for a compressor that it does not know."""
        if not self.native:
            return []
        return [self._operand(name, shape) for name, shape in self.parameter_shapes().items()]

    def _operand(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.value_dim > 0 or name.startswith("key_"):
            return cast(Tensor, getattr(self, name))
        # Makes values of width 0: it is only looked at.
        like: Tensor = getattr(self, f"key_{name.removeprefix('value_')}")
        return like if like.shape == shape else like.new_empty(shape)

    @property
    def engine_name(self) -> str:
        """What the engine calls it."""
        return self.name if self.native else "custom"

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses groups. The same tokens must give the same slot, whatever stands beside them.

        Args:
            keys: un-rotated keys [B, Hkv, G, c, D], floating point.
            values: values [B, Hkv, G, c, Dv], dtype and device of ``keys``.

        Returns:
            Key slots [B, Hkv, G, D] and value slots [B, Hkv, G, Dv].

        Raises:
            ValueError: shapes do not belong together.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(keys, values)")

    def slots(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` makes of groups, in their dtype, with its shapes checked.

        Raises:
            ValueError, TypeError: forward did not return two tensors of the documented shapes.
        """
        kept = next((p.dtype for p in self.parameters() if p.is_floating_point()), keys.dtype)
        made: Any = self(keys.to(kept), values.to(kept))
        where = f"ctx.compression.{type(self).__name__}"
        if not (isinstance(made, (tuple, list)) and len(made) == 2):
            raise TypeError(f"{where}: forward must return (key slots, value slots), got {made!r}")
        for name, slot, groups in zip(("key", "value"), made, (keys, values), strict=True):
            shape = (*groups.shape[:3], groups.shape[4])
            if slot.shape != shape:
                raise ValueError(f"{where}: {name} slots must be {shape}, got {tuple(slot.shape)}")
        key_slots: Tensor = made[0].to(keys.dtype)
        value_slots: Tensor = made[1].to(values.dtype)
        return key_slots, value_slots

    def extra_repr(self) -> str:
        sizes = ("kv_heads", "ratio", "head_dim", "value_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in sizes)


class Native(Compressor):
    """A compressor that the engine computes: one operator for training, one kernel for streams."""

    native = True

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses groups; see :meth:`Compressor.forward`."""
        _check.tensors(f"ctx.compression.{type(self).__name__}", keys=keys, values=values)
        slots: tuple[Tensor, Tensor] = torch.ops.ctx.compress(
            keys, values, self.operands(), self.name
        )
        return slots

    def slots(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`: the operator checks."""
        made: tuple[Tensor, Tensor] = self(keys, values)
        return made


class Custom(Compressor):
    """Any module that maps (keys, values) of groups to (key slots, value slots)."""

    name = "custom"

    def __init__(
        self,
        module: nn.Module,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int | None = None,
    ) -> None:
        super().__init__(kv_heads, ratio, head_dim, value_dim)
        self.module = module

    def reset_parameters(self) -> None:
        """Every submodule that knows how to begin does so."""
        for module in self.modules():
            begin = getattr(module, "reset_parameters", None)
            if module is not self and callable(begin):
                begin()

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The module's slots."""
        slots: tuple[Tensor, Tensor] = self.module(keys, values)
        return slots


class Mean(Native):
    """The mean of a group."""

    name = "mean"


class Max(Native):
    """The maximum of a group, channel by channel."""

    name = "max"


class Conv(Native):
    """A strided convolution over tokens, kernel = stride = c: slot = sum_i x_i W_i (+ b).

    Parameters: ``key_weight`` [Hkv, c, D, D] and ``value_weight`` [Hkv, c, Dv, Dv], which start as
    the identity over c, that is as mean pooling; with ``bias`` also ``key_bias`` [Hkv, D] and
    ``value_bias`` [Hkv, Dv].
    """

    name = "conv"

    def __init__(
        self,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.has_bias = bias
        super().__init__(kv_heads, ratio, head_dim, value_dim, device=device, dtype=dtype)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "key_weight": (self.kv_heads, self.ratio, self.head_dim, self.head_dim),
            "value_weight": (self.kv_heads, self.ratio, self.value_dim, self.value_dim),
        }
        if self.has_bias:
            shapes["key_bias"] = (self.kv_heads, self.head_dim)
            shapes["value_bias"] = (self.kv_heads, self.value_dim)
        return shapes

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for name in ("key_weight", "value_weight")[: 2 if self.value_dim else 1]:
                self.get_parameter(name).diagonal(dim1=-2, dim2=-1).fill_(1.0 / self.ratio)


class Gated(Native):
    """Softmax-weighted pooling: slot = sum_i softmax_i(key_i . u + p_i) x_i, one gate for keys and
    one for values.

    Both gates read the keys. Parameters: ``key_gate`` and ``value_gate`` [Hkv, D] (u),
    ``key_position`` and ``value_position`` [Hkv, c] (p); they start at zero, that is as mean
    pooling. Not in the paper.
    """

    name = "gated"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "key_gate": (self.kv_heads, self.head_dim),
            "key_position": (self.kv_heads, self.ratio),
            "value_gate": (self.kv_heads, self.head_dim),
            "value_position": (self.kv_heads, self.ratio),
        }


COMPRESSORS: dict[str, type[Compressor]] = {kind.name: kind for kind in (Mean, Max, Conv, Gated)}


def register(kind: type[Compressor]) -> type[Compressor]:
    """Makes a subclass of :class:`Compressor` available by its name; a class decorator.

    Its constructor must take what :class:`Compressor`'s takes.

    Raises:
        TypeError: ``kind`` is not such a class.
        ValueError: the name is taken.
    """
    if not (isinstance(kind, type) and issubclass(kind, Compressor)):
        raise TypeError(f"ctx.compression.register: kind must be a Compressor class, got {kind!r}")
    if COMPRESSORS.get(kind.name, kind) is not kind or kind.name == "custom":
        raise ValueError(f"ctx.compression.register: name must be a new one, got {kind.name!r}")
    COMPRESSORS[kind.name] = kind
    return kind


def as_compressor(
    module: nn.Module, kv_heads: int, ratio: int, head_dim: int, value_dim: int
) -> Compressor:
    """A compressor as it is, any other module wrapped."""
    if isinstance(module, Compressor):
        return module
    return Custom(module, kv_heads, ratio, head_dim, value_dim)


def make_compressor(
    name: str,
    kv_heads: int,
    ratio: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Compressor:
    """A compressor by name.

    Raises:
        ValueError: no compressor has that name.
    """
    if name not in COMPRESSORS:
        known = ", ".join(COMPRESSORS)
        raise ValueError(f"ctx.compression: compressor must be one of {known}, got {name!r}")
    return COMPRESSORS[name](kv_heads, ratio, head_dim, value_dim, device=device, dtype=dtype)
