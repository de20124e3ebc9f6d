"""The folder of a run: checkpoint.pt, metrics.jsonl, evaluation.json, curves.png."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctx.recipes import checkpoint
from ctx.recipes.errors import RecipeError
from ctx.recipes.evaluation import Result

__all__ = ["RunFolder", "next_run"]


def next_run(prefix: str = "") -> Path:
    """runs/1, runs/2, ...: the first that is not there; the numbers behind `prefix`."""
    number = 1
    while Path("runs", f"{prefix}{number}").exists():
        number += 1
    return Path("runs", f"{prefix}{number}")


class RunFolder:
    """Paths and the metrics of one run.

    Args:
        path: the folder; made where it is missing.
        resumed: the step to go on from; metrics of later steps belong to work that was lost, and
            are dropped. None: a new run.

    Raises:
        RecipeError: the folder cannot be written, or a new run would overwrite another.
    """

    def __init__(self, path: Path, resumed: int | None = None) -> None:
        self.path = path
        self.checkpoint = path / checkpoint.FILE_NAME
        self.metrics = path / "metrics.jsonl"
        self.evaluation = path / "evaluation.json"
        self.curves = path / "curves.png"
        if resumed is None and self.checkpoint.exists():
            raise RecipeError(f"{path} already holds a run: continue it with `resume` {path}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            kept = [line for line in self.history() if line["step"] <= (resumed or 0)]
            part = self.metrics.with_name(f".{self.metrics.name}.part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(part, self.metrics)
            self._file = open(self.metrics, "a", buffering=1)  # noqa: SIM115  a line is a write
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error.strerror or error}") from None

    def history(self) -> list[dict[str, Any]]:
        """The metrics written so far, without a last line that a crash cut off."""
        if not self.metrics.exists():
            return []
        lines = []
        for line in self.metrics.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def log(self, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl."""
        self._file.write(json.dumps(metrics) + "\n")

    def write_evaluation(self, results: Sequence[Result]) -> None:
        """The final table, for programs."""
        lines = [dataclasses.asdict(result) for result in results]
        self.evaluation.write_text(json.dumps(lines, indent=2) + "\n")

    def close(self) -> None:
        """No more metrics."""
        self._file.close()
