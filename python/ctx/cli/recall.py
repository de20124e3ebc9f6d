"""`python -m ctx recall`: shows that CMem remembers what a window of as many slots forgets."""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ctx.cli import recall_curves
from ctx.cli.errors import CliError
from ctx.cli.loading import set_threads
from ctx.cli.progress import Progress
from ctx.cli.recall_results import RecallResult, as_json, table
from ctx.cli.recall_settings import OPTIONS, Contestant, RecallSettings
from ctx.cli.recall_training import measure, train
from ctx.cli.run_folder import next_run
from ctx.transformer import CompressiveTransformer

__all__ = ["add_parser", "compete", "run"]

_MEASURED = 1024  # fresh sequences


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "recall",
        help="train small models on associative recall: accuracy against distance",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--run", dest="folder", type=Path, metavar="RUN",
                        help="folder to write (default: runs/recall-1, ...)")  # fmt: skip
    for name, kind, text in OPTIONS:
        default = getattr(RecallSettings, name)
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{text} (default: {default})",
            metavar={int: "N", float: "X", str: "NAMES"}[kind],
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains and measures every model, prints the table, writes recall.json and recall.png."""
    settings = RecallSettings(**{name: getattr(args, name) for name, _, _ in OPTIONS})
    threads = set_threads(settings.threads)
    folder: Path = args.folder or next_run("recall-")
    _make(folder)
    window, _, reach = settings.marks
    print(f"{folder}: {threads} threads; window {window}, reach {reach} tokens", flush=True)
    began = time.perf_counter()
    results = [compete(contestant, settings) for contestant in settings.contestants()]
    took = time.perf_counter() - began
    print(table(results, settings))
    try:
        text = json.dumps(as_json(results, settings), indent=2)
        (folder / "recall.json").write_text(text + "\n")
        drawn = recall_curves.draw(folder / "recall.png", results, settings)
    except OSError as error:
        raise CliError(f"cannot write {folder}: {error.strerror or error}") from None
    if not drawn:
        print("no recall.png: pip install matplotlib", file=sys.stderr)
    print(f"took {took:.0f} s; written to {folder}")
    return 0


def compete(contestant: Contestant, settings: RecallSettings) -> RecallResult:
    """One model from its first weights to its row of the table; all see the same sequences."""
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


def _make(folder: Path) -> None:
    if (folder / "recall.json").exists():
        raise CliError(f"{folder} already holds a run: name another with --run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot write {folder}: {error.strerror or error}") from None
