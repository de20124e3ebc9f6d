"""How the distance of a key becomes a part of its score, straight from the definitions.

Rotary positions turn queries and keys (rotary.py). The two schemes here leave both as they are:

- relative positions of Transformer-XL (Dai et al. 2019, arXiv:1901.02860, section 3.3), which the
  Compressive Transformer uses (Rae et al. 2019, arXiv:1911.05507); its authors' code has a
  projection and a bias of its own for compressed slots;
- ALiBi (Press et al. 2022, arXiv:2108.12409, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Relative(NamedTuple):
    """The parameters of relative positions: u, v and W, and v and W for compressed slots."""

    key_bias: Tensor  # [H, D]
    position_bias: Tensor  # [H, D]
    position_weight: Tensor  # [H, D, P]
    compressed_position_bias: Tensor  # [H, D]
    compressed_position_weight: Tensor  # [H, D, P]


class Scores:
    """What a position scheme does to scores, but for turning.

    Args:
        name: "rotary", "relative", "alibi" or None.
        slopes: of ALiBi, one per query head.
        relative: of relative positions.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        name: str | None,
        slopes: Sequence[float] | Tensor | None,
        relative: Sequence[Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        for argument, scheme, value in (
            ("alibi_slopes", "alibi", slopes),
            ("relative", "relative", relative),
        ):
            if (value is not None) != (name == scheme):
                raise ValueError(
                    f"ctx.reference: {argument} must come with position={scheme!r} and with no "
                    f"other, got position={name!r}"
                )
        self.slopes = None if slopes is None else torch.as_tensor(slopes, dtype=dtype)
        self.relative = None
        if relative is not None:
            self.relative = Relative(*(part.to(dtype) for part in relative))

    def content_query(self, query: Tensor) -> Tensor:
        """What is multiplied with keys, for queries [B, H, D]: q, or q + u."""
        return query if self.relative is None else query + self.relative.key_bias

    def added(
        self, query: Tensor, distances: Sequence[float], slots: range, scale: float
    ) -> Tensor:
        """What is added to the scaled products of queries [B, H, D] with keys: [B, H, n].

        Args:
            distances: of the n keys.
            slots: which of them are compressed slots.
        """
        here = [delta for i, delta in enumerate(distances) if i not in slots]
        there = [distances[i] for i in slots]
        added = query.new_zeros(*query.shape[:2], len(distances))
        if self.relative is not None:
            r = self.relative
            own = of_distance(query + r.position_bias, r.position_weight, here)
            of_slots = of_distance(
                query + r.compressed_position_bias, r.compressed_position_weight, there
            )
            before, behind = own[..., : slots.start], own[..., slots.start :]
            added = scale * torch.cat([before, of_slots, behind], -1)
        if self.slopes is not None:
            added = added - self.slopes[:, None] * torch.tensor(distances, dtype=query.dtype)
        return added


def added_by_head(
    scheme: Scores, query: Tensor, distances: Any, slots: range, scale: float
) -> Tensor:
    """`Scores.added` where every kv head has its own distances: distances[b][kv], n numbers."""
    rows = []
    for b, heads in enumerate(distances):
        share = query.shape[1] // len(heads)
        each = [scheme.added(query[b : b + 1], own, slots, scale) for own in heads]
        mine = [x[:, kv * share : (kv + 1) * share] for kv, x in enumerate(each)]
        rows.append(torch.cat(mine, 1))
    return torch.cat(rows)


def of_distance(query: Tensor, weight: Tensor, distances: Sequence[float]) -> Tensor:
    """(q + v) . R(distance), R = W sinusoid: query [B, H, D], weight [H, D, P] give [B, H, n]."""
    encoding = sinusoid(distances, weight.shape[-1]).to(query.dtype)  # [n, P]
    projected = torch.einsum("hdp,np->hnd", weight, encoding)
    return torch.einsum("bhd,hnd->bhn", query, projected)


def sinusoid(distances: Sequence[float], width: int) -> Tensor:
    """[sin(d w_i); cos(d w_i)] with w_i = 10000^(-2i / width), in float64: [n, width]."""
    pair = torch.arange(width // 2, dtype=torch.float64)
    where = torch.tensor(list(distances), dtype=torch.float64)
    angle = where[:, None] * 10000.0 ** (-2 * pair / width)
    return torch.cat([angle.sin(), angle.cos()], -1)


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of the paper, in the words of its authors' code."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_two(closest) + alibi_slopes(2 * closest)[0::2][: heads - closest]
