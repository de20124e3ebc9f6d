"""recall.png: accuracy against distance, one line per model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctx.recipes.recall_results import RecallResult
from ctx.recipes.recall_settings import RecallSettings
from ctx.recipes.recall_task import CHANCE, bins

__all__ = ["draw"]


def draw(path: Path, results: Sequence[RecallResult], settings: RecallSettings) -> bool:
    """Draws the picture; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    window, _, reach = settings.marks
    farthest = settings.task.farthest
    spans = [span for piece in bins(settings.marks, farthest, farthest // 40) for span in piece]
    middles = [(first + last) / 2 for first, last in spans]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for index, result in enumerate(results):
        shares = [100 * result.tally.accuracy(*span) for span in spans]
        colour = "black" if index == 0 else f"C{index - 1}"
        axes.plot(middles, shares, color=colour, marker=".", label=result.name)
    axes.axvline(window + 0.5, color="0.5", linestyle="--", label=f"the window ends: {window}")
    axes.axvline(reach + 0.5, color="0.5", label=f"the reach with CMem ends: {reach}")
    axes.axhline(100 * CHANCE, color="0.5", linestyle=":", label=f"chance: {CHANCE:.1%}")
    axes.set(xlabel="tokens from the pair to the query", ylabel="right answers, %")
    axes.set(xlim=(0, farthest), ylim=(0, 102))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    return True
