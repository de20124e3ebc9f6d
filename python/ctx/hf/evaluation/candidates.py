"""The caches that an evaluation compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ctx.hf.budgets import schedule_of
from ctx.schedule import SIZES, Schedule

__all__ = ["Candidate", "compressive", "fitted", "full_cache", "window_and_sinks"]


@dataclass(frozen=True)
class Candidate:
    """A cache to stream a text through.

    Args:
        name: in tables; candidates of one evaluation have different ones.
        make: gives a new, empty cache for a model.
        attention: the implementation that reads it; None: transformers' own, "sdpa", or "eager"
            for models whose scores are capped, which their "sdpa" leaves out.
        baseline: name of the candidate whose distance to the full cache it should make smaller.
        limit: tokens of a text that it reads at most; None: all.
    """

    name: str
    make: Callable[[Any], Any]
    attention: str | None = "ctx"
    baseline: str | None = None
    limit: int | None = None

    def attention_for(self, model: Any) -> str:
        """The implementation's name."""
        if self.attention is not None:
            return self.attention
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        return "eager" if capped else "sdpa"


def full_cache(name: str = "full cache", limit: int | None = None) -> Candidate:
    """All tokens exactly: transformers' DynamicCache under their own attention."""

    def make(model: Any) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    return Candidate(name, make, None, limit=limit)


def window_and_sinks(
    slots: int, *, sinks: int = 4, distance: str = "slot", name: str | None = None
) -> Candidate:
    """The first tokens and the newest ones, `slots` in all, nothing compressed.

    Source: StreamingLLM (Xiao et al. 2023, arXiv:2309.17453).

    Raises:
        ValueError: there are not more slots than sinks.
    """
    if name is None:
        name = f"window + sinks, {slots}"
    return compressive(name, schedule_of(slots, sinks=sinks), distance=distance)


def compressive(
    name: str,
    schedule: Schedule,
    compressor: str | nn.Module = "mean",
    *,
    distance: str = "slot",
    baseline: str | None = None,
) -> Candidate:
    """A :class:`ctx.hf.CompressiveCache` of these sizes in every layer."""
    sizes: dict[str, Any] = dict(zip(SIZES, schedule.numbers, strict=True))

    def make(model: Any) -> Any:
        from ctx.hf import CompressiveCache

        return CompressiveCache(model.config, **sizes, compressor=compressor, distance=distance)

    return Candidate(name, make, baseline=baseline)


def fitted(name: str, compressors: Any, *, baseline: str | None = None) -> Candidate:
    """What :func:`ctx.hf.load_compressors` gives, with the sizes and distance that it says."""

    def make(model: Any) -> Any:
        from ctx.hf import CompressiveCache

        make_cache: Any = CompressiveCache
        return make_cache(model.config, compressor=compressors)

    return Candidate(name, make, baseline=baseline)
