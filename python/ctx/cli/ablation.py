"""`python -m ctx ablation`: what each compressor, and what trains it, is worth on real text."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ctx.cli.options import add_options
from ctx.compression import COMPRESSORS
from ctx.recipes.ablation import measure_all
from ctx.recipes.ablation_results import Results, table
from ctx.recipes.ablation_settings import AblationSettings
from ctx.recipes.data import load_corpus
from ctx.recipes.errors import RecipeError
from ctx.recipes.limits import check_fits
from ctx.recipes.trainer import Trainer

__all__ = ["add_parser", "run"]

# name in AblationSettings (the option is --name), type, meaning
OPTIONS: list[tuple[str, Any, str]] = [
    ("compressor", str, f"all, or some, separated by commas, of {', '.join(COMPRESSORS)}"),
    ("seeds", int, "models of each kind, of seeds 0, 1, ..."),
    ("steps", int, "training steps of each model"),
    ("batch", int, "streams side by side"),
    ("length", int, "tokens per stream and step"),
    ("compressed_bias_init", float, "where the learned bias of slots starts"),
    ("held_out", int, "bytes at the end of the text kept for the evaluation"),
]


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "ablation",
        help="bits per byte of every compressor, trained by the task and by the auxiliary loss",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILES",
                        help="UTF-8 texts, in this order; none: the standard library")  # fmt: skip
    parser.add_argument("--run", dest="folder", type=Path, default=Path("runs/ablation"),
                        metavar="RUN", help="folder to write; one with the same settings is "
                        "continued (default: runs/ablation)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, metavar="N",
                        help="models side by side, one thread each (default: 2)")  # fmt: skip
    add_options(parser, OPTIONS, AblationSettings)


def run(args: argparse.Namespace) -> int:
    """Trains what is not yet measured, one JSON write for each; then prints the table."""
    settings = AblationSettings(**{name: getattr(args, name) for name, _, _ in OPTIONS})
    if not 1 <= args.jobs <= 256:
        raise RecipeError(f"--jobs must be at least 1 and at most 256, got {args.jobs}")
    plan = [(v, seed) for seed in range(settings.seeds) for v in settings.variants()]
    for variant, seed in plan:
        run_settings = settings.training(seed)
        check_fits(variant.config, run_settings.batch, run_settings.length, training=True)
    corpus = load_corpus(args.files, settings.held_out)
    Trainer(plan[0][0].config, settings.training(0), corpus)  # the text must be long enough
    results = Results(args.folder, settings, corpus.digest)
    left = [(v, seed) for v, seed in plan if not results.has(v.compressor, v.trained_by, seed)]
    print(f"{args.folder}: {len(left)} of {len(plan)} models to train", flush=True)
    began = time.perf_counter()
    for number, one in enumerate(measure_all(left, settings, args.files, args.jobs), 1):
        results.add(one)
        print(
            f"{number}/{len(left)} {one['compressor']}, {one['trained_by']}, seed {one['seed']}: "
            f"{one['both']:.4f} bits/byte in {one['seconds']:.0f} s",
            file=sys.stderr,
        )
    print(table(results.runs))
    print(f"took {time.perf_counter() - began:.0f} s; written to {results.path}")
    return 0
