"""Compressors: groups of c pairs become one slot each, per kv head.

``Mean``, ``Max`` and ``Conv`` are compression functions of Rae et al. 2019 (arXiv:1911.05507,
section 3.2). Deviation: the paper compresses hidden states with one network for all heads, here
every kv head compresses its own (un-rotated) keys and values.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ctx import _check

__all__ = ["COMPRESSORS", "Compressor", "Conv", "Gated", "Max", "Mean", "make_compressor"]


class Compressor(nn.Module):
    """Maps groups of pairs to slots; the base of all compressors.

    Args:
        kv_heads: key/value heads Hkv, >= 1.
        ratio: tokens per slot c, >= 1.
        head_dim: key width D, >= 1.
        value_dim: value width Dv, >= 1; default ``head_dim``.

    Raises:
        ValueError: a size is below 1.
    """

    name: ClassVar[str]

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
            if _check.integer(size, name, f"ctx.compression.{type(self).__name__}") < 1:
                raise ValueError(
                    f"ctx.compression.{type(self).__name__}: {name} must be at least 1, got {size}"
                )
        self.kv_heads, self.ratio, self.head_dim, self.value_dim = (
            kv_heads,
            ratio,
            head_dim,
            value_dim,
        )
        for name, shape in self.parameter_shapes().items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )
        self.reset_parameters()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters in the order in which operators take them."""
        return {}

    def reset_parameters(self) -> None:
        """Starts as mean pooling (max: has nothing to start)."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def operands(self) -> list[Tensor]:
        """The parameters as operators take them."""
        return [getattr(self, name) for name in self.parameter_shapes()]

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses groups.

        Args:
            keys: un-rotated keys [B, Hkv, G, c, D], floating point.
            values: values [B, Hkv, G, c, Dv], dtype and device of ``keys``.

        Returns:
            Key slots [B, Hkv, G, D] and value slots [B, Hkv, G, Dv].

        Raises:
            ValueError: shapes do not belong together.
        """
        _check.tensors(f"ctx.compression.{type(self).__name__}", keys=keys, values=values)
        slots: tuple[Tensor, Tensor] = torch.ops.ctx.compress(
            keys, values, self.operands(), self.name
        )
        return slots

    def extra_repr(self) -> str:
        sizes = ("kv_heads", "ratio", "head_dim", "value_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in sizes)


class Mean(Compressor):
    """The mean of a group."""

    name = "mean"


class Max(Compressor):
    """The maximum of a group, channel by channel."""

    name = "max"


class Conv(Compressor):
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
            for weight in (self.key_weight, self.value_weight):
                weight.diagonal(dim1=-2, dim2=-1).fill_(1.0 / self.ratio)


class Gated(Compressor):
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
