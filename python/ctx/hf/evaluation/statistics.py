"""Means of paired samples with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LEAST_GAP", "Estimate", "block_means", "difference", "mean", "share_closed"]

#: Below this difference, in nats per token, there is no gap to close a share of: it is rounding.
LEAST_GAP = 1e-4


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, None where there is one sample only."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def mean(samples: Tensor) -> Estimate:
    """The mean of independent samples [N], N >= 1."""
    samples = samples.double()
    count = len(samples)
    error = None if count < 2 else float(samples.std() / math.sqrt(count))
    return Estimate(float(samples.mean()), error)


def difference(a: Tensor, b: Tensor) -> Estimate:
    """The mean of a - b over the same samples, [N] each: what they have in common cancels."""
    return mean(a.double() - b.double())


def share_closed(full: Tensor, window: Tensor, candidate: Tensor) -> Estimate | None:
    """(window - candidate) / (window - full) of mean losses over the same samples, [N] each.

    The standard error is the jackknife's: each sample is left out once, in all three.

    Returns:
        None where window and full differ by less than `LEAST_GAP`, with or without some sample.
    """
    full, window, candidate = (x.double() for x in (full, window, candidate))
    whole = _share(full, window, candidate)
    count = len(full)
    if whole is None or count < 2:
        return None if whole is None else Estimate(whole, None)
    shares = []
    for left_out in range(count):
        kept = torch.arange(count) != left_out
        share = _share(full[kept], window[kept], candidate[kept])
        if share is None:
            return None
        shares.append(share)
    spread = torch.tensor(shares, dtype=torch.float64).var(correction=0)
    return Estimate(whole, math.sqrt((count - 1) * float(spread)))


def _share(full: Tensor, window: Tensor, candidate: Tensor) -> float | None:
    gap = float(window.mean() - full.mean())
    return None if abs(gap) < LEAST_GAP else float(window.mean() - candidate.mean()) / gap


def block_means(losses: Tensor, size: int) -> Tensor:
    """Means of neighbouring losses in blocks, which as samples depend little on each other.

    Args:
        losses: [N], N >= 1.
        size: about how many are in a block; blocks differ by one at most.

    Returns:
        float64 [blocks], at least one.
    """
    blocks = max(1, round(len(losses) / size))
    return torch.stack([part.mean() for part in losses.double().tensor_split(blocks)])
