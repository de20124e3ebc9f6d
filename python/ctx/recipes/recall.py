"""Associative recall: whether CMem remembers what a window of as many slots forgets."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ctx.recipes import recall_curves
from ctx.recipes.errors import RecipeError
from ctx.recipes.progress import Progress
from ctx.recipes.recall_results import RecallResult, as_json
from ctx.recipes.recall_settings import Contestant, RecallSettings
from ctx.recipes.recall_training import measure, train
from ctx.transformer import CompressiveTransformer

__all__ = ["compete", "make_folder", "write"]

_MEASURED = 1024  # fresh sequences


def compete(contestant: Contestant, settings: RecallSettings) -> RecallResult:
    """Trains and measures one model; all models of the same settings see the same sequences."""
    began = time.perf_counter()
    task = settings.task
    window, _, reach = settings.marks
    ends = [window] if contestant.config.compressed == 0 else sorted({window, reach})
    spans = [(a + 1, b) for a, b in pairwise([0, *ends])]
    torch.manual_seed(settings.seed)
    model = CompressiveTransformer(contestant.config)
    with Progress(contestant.name, settings.steps) as progress:
        steps = train(
            model,
            task,
            spans,
            steps=settings.steps,
            batch=settings.batch,
            lr=settings.lr,
            generator=torch.Generator().manual_seed(2 * settings.seed),
            advance=progress.to,
        )
    fresh = torch.Generator().manual_seed(2 * settings.seed + 1)
    tally = measure(model, task, _MEASURED, fresh)
    return RecallResult(contestant.name, tally, steps, time.perf_counter() - began)


def make_folder(folder: Path) -> None:
    """Makes the folder of a run.

    Raises:
        RecipeError: it holds a run, or cannot be written.
    """
    if (folder / "recall.json").exists():
        raise RecipeError(f"{folder} already holds a run: name another with `run`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"cannot write {folder}: {error.strerror or error}") from None


def write(folder: Path, results: Sequence[RecallResult], settings: RecallSettings) -> bool:
    """Writes recall.json and recall.png; False where the picture needs matplotlib.

    Raises:
        RecipeError: the folder cannot be written.
    """
    try:
        text = json.dumps(as_json(results, settings), indent=2)
        (folder / "recall.json").write_text(text + "\n")
        return recall_curves.draw(folder / "recall.png", results, settings)
    except OSError as error:
        raise RecipeError(f"cannot write {folder}: {error.strerror or error}") from None
