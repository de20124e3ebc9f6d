"""Dilated convolutions over tokens."""

from __future__ import annotations

from ctx.compression.base import Native

__all__ = ["Dilated"]


class Dilated(Native):
    """Dilated convolutions over tokens, then a strided one.

    L = max(1, ceil(log2 c)) layers h_t = ReLU(h_(t - 2^l) W_0 + h_t W_1), l = 0 ... L - 1, and
    slot = sum_i h_i W_i over the group, which so depends on 2^L - 1 tokens left of it, too. There
    are no biases: before the stream all is zero. The paper does not say how deep or wide its
    dilated convolutions are; here h has 2 D channels, so that they can start as mean pooling.

    Parameters: ``key_first`` [Hkv, 2, D, 2 D], ``key_hidden`` [Hkv, L - 1, 2, 2 D, 2 D] unless L
    is 1, ``key_weight`` [Hkv, c, 2 D, D], and ``value_first``, ``value_hidden``, ``value_weight``
    with Dv.
    """

    name = _kind = "dilated"
    operand_names = (
        *("key_first", "key_hidden", "key_weight"),
        *("value_first", "value_hidden", "value_weight"),
    )

    @property
    def layers(self) -> int:
        """L."""
        return max(1, (self.ratio - 1).bit_length())

    @property
    def overlap(self) -> int:
        """2^L - 1."""
        return (1 << self.layers) - 1
