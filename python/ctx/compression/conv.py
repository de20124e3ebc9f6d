"""A strided convolution over tokens."""

from __future__ import annotations

import torch

from ctx import _check
from ctx.compression.base import Native

__all__ = ["Conv"]


class Conv(Native):
    """A strided convolution over tokens, stride c, kernel k >= c: slot = sum_i x_i W_i (+ b).

    The sum goes over the c tokens of the group and the k - c left of it, zeros before the stream.

    Parameters: ``key_weight`` [Hkv, k, D, D] and ``value_weight`` [Hkv, k, Dv, Dv], which start as
    the identity over c for the group's tokens and zero for those left of it, that is as mean
    pooling; with ``bias`` also ``key_bias`` [Hkv, D] and ``value_bias`` [Hkv, Dv].

    Args:
        kernel: k; default ``ratio``.

    Raises:
        ValueError: ``kernel`` is below ``ratio``, or a size below 1.
    """

    name = _kind = "conv"
    operand_names = ("key_weight", "value_weight")

    def __init__(
        self,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        bias: bool = False,
        kernel: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.has_bias = bias
        self._kernel = ratio = _check.integer(ratio, "ratio", "ctx.compression.Conv")
        if kernel is not None:
            self._kernel = _check.integer(kernel, "kernel", "ctx.compression.Conv")
            if self._kernel < ratio:
                raise ValueError(
                    f"ctx.compression.Conv: kernel must be at least ratio = {ratio}, got {kernel}"
                )
        super().__init__(kv_heads, ratio, head_dim, value_dim, device=device, dtype=dtype)

    @property
    def kernel(self) -> int:
        """k."""
        return self._kernel

    @property
    def overlap(self) -> int:
        """k - c."""
        return self._kernel - self.ratio

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes()
        if self.has_bias:
            shapes["key_bias"] = (self.kv_heads, self.head_dim)
            shapes["value_bias"] = (self.kv_heads, self.value_dim)
        return shapes

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"
