"""Rotary positions: Su et al. 2021 (arXiv:2104.09864), section 3.4.2.

The Compressive Transformer uses the relative positions of Transformer-XL (Rae et al. 2019,
arXiv:1911.05507, section 3; see positions.py); rotary positions are a deviation. The product of a
query rotated to p and a key rotated to r depends on p - r alone, so a key is rotated once, when it
is written, and never again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A number, or one for every token.
Position = float | list[float] | Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotates pairs of channels by angles proportional to the position.

    Args:
        base: pair i of `dim` channels rotates by `base ** (-2 i / dim)` radians per position.
        dim: only the first `dim` channels rotate; None means all of them.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, dim/2), (1, dim/2 + 1), ...
        inv_freq: radians per position of every pair, dim / 2 numbers, in place of those of `base`.
            Linear, Llama 3 and YaRN scaling are such numbers.
        attention_factor: cosines and sines are multiplied by it (YaRN, Peng et al. 2023,
            arXiv:2309.00071, section 3.4), in queries and in keys.
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False
    inv_freq: tuple[float, ...] | None = None
    attention_factor: float = 1.0

    def rotate(self, x: Tensor, position: Position) -> Tensor:
        """x [..., D] rotated to one position, or x [..., n, D] rotated to positions [..., n].

        Angles, cosines and sines are computed in float64 and then rounded to the dtype of x.
        """
        where = torch.as_tensor(position, dtype=torch.float64)
        return self._rotate(x, where, self.attention_factor)

    def unrotate(self, x: Tensor, position: Position) -> Tensor:
        """The x that `rotate` rotates to what is given: `attention_factor` is divided out."""
        where = torch.as_tensor(position, dtype=torch.float64)
        return self._rotate(x, -where, 1 / self.attention_factor)

    def frequencies(self, dim: int) -> Tensor:
        """Radians per position of every pair of `dim` channels, float64 [dim / 2]."""
        if self.inv_freq is None:
            pair = torch.arange(dim // 2, dtype=torch.float64)
            return self.base ** (-2 * pair / dim)
        if len(self.inv_freq) != dim // 2:
            raise ValueError(
                f"ctx.reference: inv_freq must be rotary_dim / 2 = {dim // 2} numbers, got "
                f"{len(self.inv_freq)}"
            )
        return torch.tensor(self.inv_freq, dtype=torch.float64)

    def _rotate(self, x: Tensor, position: Tensor, factor: float) -> Tensor:
        dim = x.shape[-1] if self.dim is None else self.dim
        angle = position[..., None] * self.frequencies(dim)
        cos, sin = (factor * angle.cos()).to(x.dtype), (factor * angle.sin()).to(x.dtype)
        pairs, rest = x[..., :dim], x[..., dim:]
        if self.interleaved:
            a, b = pairs[..., 0::2], pairs[..., 1::2]
        else:
            a, b = pairs[..., : dim // 2], pairs[..., dim // 2 :]
        a, b = a * cos - b * sin, b * cos + a * sin
        rotated = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return torch.cat([rotated, rest], -1)


@dataclass(frozen=True)
class NoRotation:
    """What position schemes other than "rotary" do to queries and keys: nothing."""

    def rotate(self, x: Tensor, position: Position) -> Tensor:
        """x itself."""
        return x

    def unrotate(self, x: Tensor, position: Position) -> Tensor:
        """x itself."""
        return x
