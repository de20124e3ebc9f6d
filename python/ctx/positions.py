"""Where a key stands, as a part of its score: Transformer-XL's relative positions, and ALiBi.

Rotary positions need nothing but numbers (see :class:`ctx.KVMemory`). The distance that these two
measure is the law's, ``"slot"`` or ``"token"``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _check

__all__ = ["POSITIONS", "Relative", "alibi_slopes"]

#: What ``position=`` may be; None: no positions.
POSITIONS: tuple[str | None, ...] = ("rotary", "relative", "alibi", None)


class Relative(nn.Module):
    """Parameters of relative positions: a score is (q + u) . k + (q + v) . R(distance), scaled.

    R(d) = W [sin(d w); cos(d w)] with w_i = 10000^(-2i / width). A module of nothing but
    parameters, for :class:`ctx.KVMemory` and :class:`ctx.CompressiveAttention`, which call it at
    each of their calls: what its ``forward`` returns is used.

    Source: Dai et al. 2019 (arXiv:1901.02860), section 3.3; v and W of compressed slots are others,
    as in the code of Rae et al. 2019 (arXiv:1911.05507). Deviation: W starts like a linear layer
    of torch, from a uniform distribution.

    Args:
        num_heads: query heads H.
        head_dim: width D of queries and keys.
        width: number P of sines and cosines, even.

    Attributes:
        key_bias: u, [H, D]; starts as zeros, and so do the other biases.
        position_bias: v, [H, D].
        position_weight: W, [H, D, P].
        compressed_position_bias: v of compressed slots, [H, D].
        compressed_position_weight: W of compressed slots, [H, D, P].

    Raises:
        ValueError, TypeError: a size is out of range; the message names it.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "ctx.positions.Relative"
        num_heads, head_dim, width = _check.integers(
            where, 1, num_heads=num_heads, head_dim=head_dim, width=width
        )
        if width % 2:
            raise ValueError(f"{where}: width must be even, got {width}")
        self.num_heads, self.head_dim, self.width = num_heads, head_dim, width
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        bias, weight = (num_heads, head_dim), (num_heads, head_dim, width)
        self.key_bias = nn.Parameter(torch.empty(bias, **made))
        self.position_bias = nn.Parameter(torch.empty(bias, **made))
        self.position_weight = nn.Parameter(torch.empty(weight, **made))
        self.compressed_position_bias = nn.Parameter(torch.empty(bias, **made))
        self.compressed_position_weight = nn.Parameter(torch.empty(weight, **made))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """First values: biases zero, weights normal, or like a linear layer's without ``std``."""
        for bias in (self.key_bias, self.position_bias, self.compressed_position_bias):
            nn.init.zeros_(bias)
        for weight in (self.position_weight, self.compressed_position_weight):
            if std is None:
                bound = self.width**-0.5
                nn.init.uniform_(weight, -bound, bound)
            else:
                nn.init.normal_(weight, std=std)

    def forward(self) -> list[Tensor]:
        """The five tensors in the order in which operators take them, that of the attributes."""
        return self.operands()

    def operands(self) -> list[Tensor]:
        """The parameters themselves, in that order."""
        return [
            self.key_bias,
            self.position_bias,
            self.position_weight,
            self.compressed_position_bias,
            self.compressed_position_weight,
        ]

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, {self.width}"


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes of ALiBi, one per query head, float64 [H]: slope * distance is taken from each score.

    Source: Press et al. 2022 (arXiv:2108.12409), section 3: 2^(-8/H), 2^(-16/H), ... 2^-8. Where H
    is no power of two, as in the authors' code: those of the largest power of two below it, then
    every second one of twice that many heads.

    Raises:
        ValueError, TypeError: ``num_heads`` is no positive integer.
    """
    num_heads = _check.integer(num_heads, "num_heads", "ctx.positions.alibi_slopes", 1)
    return torch.tensor(slopes(num_heads), dtype=torch.float64, device="cpu")


def slopes(num_heads: int) -> list[float]:
    """The numbers of :func:`alibi_slopes`."""
    power = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
    return [*first, *between][:num_heads]
