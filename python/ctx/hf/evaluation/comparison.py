"""Candidates against the full cache, and against a window of as many slots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctx.hf.evaluation import statistics
from ctx.hf.evaluation.candidates import Candidate
from ctx.hf.evaluation.statistics import Estimate

__all__ = ["Comparison", "Samples", "compare", "perplexity"]


@dataclass(frozen=True)
class Samples:
    """The same N samples (windows, passages, questions) under K candidates, the first of which is
    the full cache.

    Args:
        candidates: K of them.
        losses: mean loss of each sample, in nats, float64 [K, N].
        kl: mean KL(full || candidate) of each, in nats, float64 [K, N], or None.
        hits: share of its tokens, or whether its answer, was the likeliest, float64 [K, N], or
            None.
        whole: whether losses are sums over answers instead of means over tokens, and have no
            perplexity.
    """

    candidates: tuple[Candidate, ...]
    losses: Tensor
    kl: Tensor | None = None
    hits: Tensor | None = None
    whole: bool = False

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        """Samples of the same candidates, one behind the other."""

        def joined(name: str) -> Tensor | None:
            given = [getattr(part, name) for part in parts]
            return None if any(x is None for x in given) else torch.cat(given, 1)

        losses = torch.cat([part.losses for part in parts], 1)
        first = parts[0]
        return Samples(first.candidates, losses, joined("kl"), joined("hits"), first.whole)


@dataclass(frozen=True)
class Comparison:
    """One candidate's line.

    Args:
        name: the candidate's.
        samples: their number N.
        loss: mean over samples, nats.
        perplexity: exp of it; None for whole answers.
        over_full: paired difference of losses, candidate minus full; None of the full cache.
        share: of the gap between baseline and full that is closed, with a jackknife's error; None
            without a baseline, or where there is no gap.
        kl: mean of KL(full || candidate), nats; None where not measured.
        kl_share: as `share`, of the KL.
        hits: mean of what was the likeliest; None where not measured.
    """

    name: str
    samples: int
    loss: Estimate
    perplexity: float | None
    over_full: Estimate | None
    share: Estimate | None
    kl: Estimate | None
    kl_share: Estimate | None
    hits: Estimate | None


def compare(samples: Samples) -> list[Comparison]:
    """A line for each candidate.

    Raises:
        ValueError: a candidate's baseline is not among them.
    """
    names = [one.name for one in samples.candidates]
    lines = []
    for row, one in enumerate(samples.candidates):
        if one.baseline is not None and one.baseline not in names:
            raise ValueError(
                f"ctx.hf.evaluation.compare: baseline of {one.name!r} must be one of {names}, "
                f"got {one.baseline!r}"
            )
        base = None if one.baseline is None else names.index(one.baseline)
        losses, kl, hits = samples.losses, samples.kl, samples.hits
        loss = statistics.mean(losses[row])
        measured = kl is not None and row > 0
        lines.append(
            Comparison(
                name=one.name,
                samples=losses.shape[1],
                loss=loss,
                perplexity=None if samples.whole else perplexity(loss.value),
                over_full=statistics.difference(losses[row], losses[0]) if row else None,
                share=_share(losses, base, row),
                kl=statistics.mean(kl[row]) if kl is not None and measured else None,
                kl_share=_share(kl, base, row) if kl is not None and measured else None,
                hits=None if hits is None else statistics.mean(hits[row]),
            )
        )
    return lines


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def _share(values: Tensor, base: int | None, row: int) -> Estimate | None:
    if base is None:
        return None
    return statistics.share_closed(values[0], values[base], values[row])
