"""curves.png: the loss over the training text, and the final results beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctx.recipes.evaluation import Result

__all__ = ["draw"]

_COLOURS = ("tab:blue", "tab:orange", "tab:red", "tab:purple", "tab:brown")


def draw(path: Path, history: Sequence[dict[str, Any]], results: Sequence[Result]) -> bool:
    """Draws the picture; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [line["step"] for line in history]
    loss = [line["bits_per_byte"] for line in history]
    smooth = _smooth(loss)
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    top.plot(steps, loss, color="0.8", linewidth=0.7, label="training, each step")
    top.plot(steps, smooth, color="black", linewidth=1.5, label="training, smoothed")
    for result, colour in zip(results, _COLOURS, strict=False):
        label = f"held out, {result.name}: {result.bits_per_byte:.3f}"
        top.axhline(result.bits_per_byte, color=colour, linestyle="--", linewidth=1.2, label=label)
    low = min([*loss, *(result.bits_per_byte for result in results)])
    high = max(smooth[len(smooth) // 50 :])
    top.set(ylabel="bits per byte", ylim=(0.9 * low, 1.05 * high))
    top.legend(loc="upper right")
    top.grid(alpha=0.3)
    bottom.plot(steps, [line["lr"] for line in history], color="tab:green")
    bottom.set(xlabel="step", ylabel="learning rate")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of about the last fiftieth of all values, weights falling off, unbiased from the
    start."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out
