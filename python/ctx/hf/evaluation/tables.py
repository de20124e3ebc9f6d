"""Comparisons as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ctx.hf.evaluation.comparison import Comparison
from ctx.hf.evaluation.statistics import Estimate

__all__ = ["aligned", "cells", "markdown", "percent"]


def percent(estimate: Estimate | None) -> str:
    """A share, e.g. "41 ± 6 %"; empty where there is none."""
    if estimate is None:
        return ""
    error = "" if estimate.error is None else f" ± {100 * estimate.error:.0f}"
    return f"{100 * estimate.value:.0f}{error} %"


def cells(line: Comparison) -> dict[str, str]:
    """A comparison's columns, those that it lacks empty."""

    def text(estimate: Estimate | None) -> str:
        return "" if estimate is None else str(estimate)

    return {
        "cache": line.name,
        "perplexity": _number(line.perplexity),
        "loss": text(line.loss),
        "loss over full": text(line.over_full),
        "gap closed": percent(line.share),
        "KL": text(line.kl),
        "KL gap closed": percent(line.kl_share),
        "likeliest": percent(line.hits),
    }


def _number(perplexity: float | None) -> str:
    return "" if perplexity is None else f"{perplexity:,.3f}"


def markdown(lines: Sequence[Comparison]) -> str:
    """A table of all columns that some line has."""
    rows = [cells(line) for line in lines]
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    return aligned([used, *([row[name] for name in used] for row in rows)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the heads, as a Markdown table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
