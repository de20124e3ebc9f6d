"""What the ablation has measured so far: ablation.json, and the table of it."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctx.recipes.ablation_settings import NOTHING, WINDOW_ONLY, AblationSettings
from ctx.recipes.errors import RecipeError

__all__ = ["Results", "table"]


class Results:
    """The runs in a folder's ablation.json, written whole after each.

    Args:
        folder: made where it is missing; runs in it are kept.
        settings, digest: of the training and of the text; those in the folder must be the same.

    Raises:
        RecipeError: the folder cannot be written, or holds an ablation of other settings or texts.
    """

    def __init__(self, folder: Path, settings: AblationSettings, digest: str) -> None:
        self.path = folder / "ablation.json"
        same = dataclasses.asdict(settings)
        for chosen in ("compressor", "seeds"):  # which models, not how each is trained
            del same[chosen]
        self.head = {"settings": same, "digest": digest}
        self.runs: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text() if self.path.exists() else None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"cannot write {folder}: {reason}") from None
        if text is not None:
            self.runs = self._read(text)

    def _read(self, text: str) -> list[dict[str, Any]]:
        try:
            held = json.loads(text)
            runs: list[dict[str, Any]] = held["runs"]
            head = {name: held[name] for name in self.head}
        except (ValueError, KeyError, TypeError):
            raise RecipeError(f"{self.path} must be written by ctx ablation, got another") from None
        if head != self.head:
            raise RecipeError(
                f"{self.path.parent} already holds an ablation of other settings or texts: name "
                "another with `run`"
            )
        return runs

    def has(self, compressor: str, trained_by: str, seed: int) -> bool:
        """Whether that model has been measured."""
        key = (compressor, trained_by, seed)
        return key in ((r["compressor"], r["trained_by"], r["seed"]) for r in self.runs)

    def add(self, measured: dict[str, Any]) -> None:
        """One more run, on the disk when this returns."""
        self.runs.append(measured)
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            part.write_text(json.dumps({**self.head, "runs": self.runs}, indent=1) + "\n")
            os.replace(part, self.path)
        except OSError as error:
            raise RecipeError(f"cannot write {self.path}: {error.strerror or error}") from None


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The runs as a Markdown table, best first: means over seeds and their standard deviation."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["compressor"], run["trained_by"]), []).append(run)
    rows = []
    for (compressor, trained_by), group in groups.items():
        both = [run["both"] for run in group]
        off = "-" if compressor == WINDOW_ONLY else _spread([run["off"] for run in group])
        trained = "- (no parameters)" if trained_by == NOTHING else trained_by
        trained = "-" if compressor == WINDOW_ONLY else trained
        line = f"| {compressor} | {trained} | {_spread(both)} | {off} | {len(group)} |"
        rows.append((statistics.mean(both), line))
    head = [
        "| compressor | trained by | bits per byte | CMem off | seeds |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(line for _, line in sorted(rows))])


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
