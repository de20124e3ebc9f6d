"""How the distance of a key becomes a part of its score, straight from the definitions.

Rotary positions rotate queries and keys (rotary.py). The two schemes here leave both unchanged:

- relative positions of Transformer-XL (Dai et al. 2019, arXiv:1901.02860, section 3.3), which the
  Compressive Transformer uses (Rae et al. 2019, arXiv:1911.05507); its authors' code has a
  projection and a bias of its own for compressed slots;
- ALiBi (Press et al. 2022, arXiv:2108.12409, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Relative(NamedTuple):
    """The parameters of relative positions: u, v and W, and v and W for compressed slots."""

    key_bias: Tensor  # [H, D]
    position_bias: Tensor  # [H, D]
    position_weight: Tensor  # [H, D, P]
    compressed_position_bias: Tensor  # [H, D]
    compressed_position_weight: Tensor  # [H, D, P]

    def term(self, query: Tensor, distances: Tensor, is_slot: Tensor) -> Tensor:
        """(q + v) . R(distance), R = W sinusoid: what is added to products before scaling.

        Args:
            query: [B, H, D].
            distances: [B, H, n], of the n keys.
            is_slot: bool [n], which of them are compressed slots.

        Returns:
            [B, H, n].
        """
        encoding = sinusoid(distances, self.position_weight.shape[-1]).to(query.dtype)

        def of(bias: Tensor, weight: Tensor) -> Tensor:
            return torch.einsum("bhd,hdp,bhnp->bhn", query + bias, weight, encoding)

        of_tokens = of(self.position_bias, self.position_weight)
        of_slots = of(self.compressed_position_bias, self.compressed_position_weight)
        return torch.where(is_slot, of_slots, of_tokens)


def sinusoid(distances: Sequence[float] | Tensor, width: int) -> Tensor:
    """[sin(d w_i); cos(d w_i)] with w_i = 10000^(-2i / width), in float64: [..., width]."""
    pair = torch.arange(width // 2, dtype=torch.float64)
    where = torch.as_tensor(distances, dtype=torch.float64)
    angle = where[..., None] * 10000.0 ** (-2 * pair / width)
    return torch.cat([angle.sin(), angle.cos()], -1)


def alibi_slopes(heads: int) -> list[float]:
    """The paper's slopes, computed as in its authors' code."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_two(closest) + alibi_slopes(2 * closest)[0::2][: heads - closest]
