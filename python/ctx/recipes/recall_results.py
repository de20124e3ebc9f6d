"""What `ctx recall` found: the table that is printed and the values of recall.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ctx.recipes.recall_settings import RecallSettings
from ctx.recipes.recall_task import CHANCE, Tally, bins

__all__ = ["RecallResult", "as_json", "table"]


@dataclasses.dataclass(frozen=True)
class RecallResult:
    """One row of the table."""

    name: str
    tally: Tally
    steps: int
    seconds: float


def table(results: Sequence[RecallResult], settings: RecallSettings) -> str:
    """Accuracy in percent by distance; bars stand where the window and the memory end."""
    _, _, reach = settings.marks
    pieces = bins(settings.marks, settings.task.farthest, max(1, reach // 8))
    rows = [["right answers, %, at distance", *(["" for _ in piece] for piece in pieces), "steps"]]
    rows[0][1:-1] = [[f"{first}-{last}" for first, last in piece] for piece in pieces]
    for result in results:
        shares = [[_percent(result.tally.accuracy(*span)) for span in piece] for piece in pieces]
        rows.append([result.name, *shares, f"{result.steps:,}"])
    widths = [
        max(len(text) for row in rows for cell in row[1:-1] for text in cell),
        max(len(row[0]) for row in rows),
        max(len(row[-1]) for row in rows),
    ]
    lines = []
    for name, *cells, steps in rows:
        middle = " |".join("".join(f" {text:>{widths[0]}}" for text in cell) for cell in cells)
        lines.append(f"{name:<{widths[1]}} |{middle} | {steps:>{widths[2]}}")
    lines.insert(1, "-" * len(lines[0]))
    lines.append(_legend(settings))
    return "\n".join(lines)


def as_json(results: Sequence[RecallResult], settings: RecallSettings) -> dict[str, Any]:
    """Everything, for programs; accuracies by distance, from 1 on, null where nothing was asked."""
    window, exact, reach = settings.marks
    models = []
    for result in results:
        shares = [result.tally.accuracy(d, d) for d in range(1, settings.task.farthest + 1)]
        models.append(
            {
                "name": result.name,
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "accuracy": [None if math.isnan(share) else round(share, 4) for share in shares],
            }
        )
    return {
        "settings": dataclasses.asdict(settings),
        "window": window,
        "window_at_most": exact,
        "reach": reach,
        "chance": CHANCE,
        "models": models,
    }


def _legend(settings: RecallSettings) -> str:
    window, exact, reach = settings.marks
    return (
        f"bars: a window of {window} tokens ends (between evictions: {exact}); the reach of "
        f"{settings.window} tokens and {settings.slots} slots of {settings.ratio} ends, {reach}; "
        f"chance {100 * CHANCE:.1f}"
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"
