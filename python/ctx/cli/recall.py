"""`python -m ctx recall`: shows that CMem remembers what a window of as many slots forgets."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ctx.cli.options import add_options, set_threads
from ctx.compression import COMPRESSORS
from ctx.recipes.recall import compete, make_folder, write
from ctx.recipes.recall_results import table
from ctx.recipes.recall_settings import RecallSettings
from ctx.recipes.run_folder import next_run

__all__ = ["add_parser", "run"]

# name in RecallSettings (the option is --name), type, meaning
OPTIONS: list[tuple[str, Any, str]] = [
    ("steps", int, "optimiser steps, at most, of each model"),
    ("seed", int, "of the weights and of the data"),
    ("threads", int, "0: torch's choice"),
    ("compressor", str, f"all, or some, separated by commas, of {', '.join(COMPRESSORS)}"),
    ("pairs", int, "pairs that a sequence begins with"),
    ("length", int, "queries behind them"),
    ("window", int, "exact tokens behind every query"),
    ("slots", int, "of the compressive memory; the model without has as many more exact tokens"),
    ("ratio", int, "tokens per slot"),
    ("batch", int, "sequences per step"),
    ("lr", float, "learning rate"),
]


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
    add_options(parser, OPTIONS, RecallSettings)


def run(args: argparse.Namespace) -> int:
    """Trains and measures every model, prints the table, writes recall.json and recall.png."""
    settings = RecallSettings(**{name: getattr(args, name) for name, _, _ in OPTIONS})
    threads = set_threads(settings.threads)
    folder: Path = args.folder or next_run("recall-")
    make_folder(folder)
    window, _, reach = settings.marks
    print(f"{folder}: {threads} threads; window {window}, reach {reach} tokens", flush=True)
    began = time.perf_counter()
    results = [compete(contestant, settings) for contestant in settings.contestants()]
    took = time.perf_counter() - began
    print(table(results, settings))
    if not write(folder, results, settings):
        print("no recall.png: pip install matplotlib", file=sys.stderr)
    print(f"took {took:.0f} s; written to {folder}")
    return 0
