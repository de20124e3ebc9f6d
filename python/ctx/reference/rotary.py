"""Rotary positions: Su et al. 2021 (arXiv:2104.09864), section 3.4.2.

The Compressive Transformer uses the relative positions of Transformer-XL (Rae et al. 2019,
arXiv:1911.05507, section 3; see positions.py); rotary positions are a deviation. Since the product
of a query turned to p and a key turned to r depends on p - r alone, a key is turned once, when it
is written, and never again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Turns pairs of channels by angles proportional to the position.

    Args:
        base: pair i of `dim` channels turns by `base ** (-2 i / dim)` radians per position.
        dim: only the first `dim` channels turn; None means all of them.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, dim/2), (1, dim/2 + 1), ...
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False

    def rotate(self, x: Tensor, position: float | list[float]) -> Tensor:
        """x [..., D] turned to one position, or x [..., n, D] turned to n positions.

        Angles, cosines and sines are computed in float64 and then rounded to the dtype of x.
        """
        dim = x.shape[-1] if self.dim is None else self.dim
        pair = torch.arange(dim // 2, dtype=torch.float64)
        where = torch.tensor(position, dtype=torch.float64)
        angle = where[..., None] * self.base ** (-2 * pair / dim)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turning, still = x[..., :dim], x[..., dim:]
        if self.interleaved:
            a, b = turning[..., 0::2], turning[..., 1::2]
        else:
            a, b = turning[..., : dim // 2], turning[..., dim // 2 :]
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return torch.cat([turned, still], -1)


@dataclass(frozen=True)
class Nowhere:
    """Nothing turns."""

    def rotate(self, x: Tensor, position: float | list[float]) -> Tensor:
        """x itself."""
        return x


def make_position(
    name: str | None, base: float, dim: int | None, interleaved: bool
) -> Rotary | Nowhere:
    """What the position scheme called `name` turns; schemes other than "rotary" turn nothing
    (positions.py).
    """
    if name in ("relative", "alibi", None):
        return Nowhere()
    if name == "rotary":
        return Rotary(base, dim, interleaved)
    raise ValueError(
        f"ctx.reference: position must be 'rotary', 'relative', 'alibi' or None, got {name!r}"
    )
