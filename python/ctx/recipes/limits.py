"""Sizes that cannot fit are refused before anything is allocated."""

from __future__ import annotations

import os

from ctx.recipes.errors import RecipeError
from ctx.transformer import CompressiveTransformerConfig

__all__ = ["check_fits"]


def check_fits(
    config: CompressiveTransformerConfig, rows: int, length: int, *, training: bool
) -> None:
    """Raises where a model, its memory and one call of [rows, length] tokens need more than there
    is.

    A lower bound: what passes may still turn out too large, what is refused cannot work.
    """
    width, layers = config.embed_dim, config.num_layers
    kv_heads = config.num_kv_heads or config.num_heads
    weights = config.vocab_size * width + layers * 10 * width * width
    call = rows * length * (config.vocab_size + width * (layers if training else 1))
    # Training keeps a gradient and two moments per weight.
    needed = 4 * (weights * (4 if training else 1) + call)
    present = _physical_memory()
    if present is None:
        return
    if needed <= present:  # then there are not too many layers to look at each
        slots = sum(s.window + s.compressed + s.segment + s.sinks for s in config.schedules())
        pair = 2 * kv_heads * (width // config.num_heads)
        needed += 4 * rows * slots * (width if config.memory_content == "hidden" else pair)
    if needed > present:
        raise RecipeError(
            f"these sizes do not fit: they need at least {needed / 2**30:,.0f} GiB of memory, "
            f"this machine has {present / 2**30:,.0f}"
        )


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return None
