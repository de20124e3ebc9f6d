"""Softmax-weighted pooling."""

from __future__ import annotations

from ctx.compression.base import Native

__all__ = ["Gated"]


class Gated(Native):
    """Softmax-weighted pooling: slot = sum_i softmax_i(key_i . u + p_i) x_i, one gate for keys and
    one for values.

    Both gates read the keys. Parameters: ``key_gate`` and ``value_gate`` [Hkv, D] (u),
    ``key_position`` and ``value_position`` [Hkv, c] (p); they start at zero, that is as mean
    pooling. Not in the paper.
    """

    name = _kind = "gated"
    operand_names = ("key_gate", "key_position", "value_gate", "value_position")
