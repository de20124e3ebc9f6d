"""From products of a query with keys to the weights of its softmax, one query at a time.

score = cap(scale (q . k + relative term)) - slope distance + [slot] (bias + mass)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .positions import Relative
from .settings import Settings


class Scores:
    """What the settings make of products.

    Args:
        settings: of the attention.
        ratio: tokens of a slot, c.
        dtype: of the arithmetic.
    """

    def __init__(self, settings: Settings, ratio: int, dtype: torch.dtype) -> None:
        self.settings = settings
        self.ratio = ratio
        self.dtype = dtype
        self.relative = None
        if settings.relative is not None:
            self.relative = Relative(*(part.to(dtype) for part in settings.relative))

    def content_query(self, query: Tensor) -> Tensor:
        """What is multiplied with keys, for queries [B, H, D]: q, or q + u."""
        return query if self.relative is None else query + self.relative.key_bias

    def weights(
        self,
        query: Tensor,
        products: Tensor,
        distances: Tensor,
        slots: range,
        mass: Tensor | None,
    ) -> Tensor:
        """What share of the attention of one query per row each of n keys gets: [B, H, n].

        Args:
            query: [B, H, D], without rotation.
            products: [B, H, n], of the (rotated) content queries with the (rotated) keys.
            distances: [B, Hkv, n].
            slots: which of the n keys are compressed slots.
            mass: [B, Hkv, len(slots)], of these; None where slots have none.
        """
        settings = self.settings
        q_per_kv = query.shape[1] // distances.shape[1]
        distances = distances.repeat_interleave(q_per_kv, 1)
        if self.relative is not None:
            is_slot = torch.tensor([i in slots for i in range(products.shape[2])])
            products = products + self.relative.term(query, distances, is_slot)
        scores = products * (query.shape[2] ** -0.5 if settings.scale is None else settings.scale)
        if settings.logit_softcap:
            scores = settings.logit_softcap * (scores / settings.logit_softcap).tanh()
        if settings.alibi_slopes is not None:
            slopes = torch.as_tensor(settings.alibi_slopes, dtype=self.dtype)
            scores = scores - slopes[:, None] * distances.to(self.dtype)
        of_slots = scores[..., slots.start : slots.stop] + self.bias(query.shape[1])[:, None]
        if mass is not None:
            of_slots = of_slots + mass.repeat_interleave(q_per_kv, 1)
        before, behind = scores[..., : slots.start], scores[..., slots.stop :]
        return torch.cat([before, of_slots, behind], -1).softmax(-1)

    def bias(self, heads: int) -> Tensor:
        """What is added to the score of every compressed slot besides its mass, [H]."""
        bias = self.settings.compressed_bias
        if isinstance(bias, str):
            return torch.full(
                (heads,), math.log(self.ratio) if bias == "log_ratio" else 0.0, dtype=self.dtype
            )
        bias = torch.as_tensor(bias, dtype=self.dtype)
        if bias.shape != (heads,):
            raise ValueError(
                f"ctx.reference: compressed_bias must be [H] = [{heads}], got {list(bias.shape)}"
            )
        return bias


def products_of(query: Tensor, keys: Tensor) -> Tensor:
    """query [B, H, D] with keys [B, Hkv, n, D]: [B, H, n]; each kv head serves H/Hkv heads."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    return (keys @ query[..., None])[..., 0]


def mix(weights: Tensor, values: Tensor) -> Tensor:
    """weights [B, H, n] of values [B, Hkv, n, Dv]: [B, H, Dv]."""
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], 1)
    return (weights[..., None, :] @ values)[..., 0, :]


def region_weights_of(weights: Tensor, slots: range) -> Tensor:
    """The sums of weights [B, H, n] over sinks, slots and window: [B, H, 3], a constant."""
    regions = weights.tensor_split([slots.start, slots.stop], -1)
    return torch.stack([region.sum(-1) for region in regions], -1).detach()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 is computed in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
