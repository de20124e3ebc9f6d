"""`python -m ctx eval RUN FILE`: streams a text through a trained model, with and without
memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ctx.cli.options import set_threads, sizes
from ctx.recipes.data import read_text
from ctx.recipes.evaluation import evaluate, table
from ctx.recipes.limits import check_fits
from ctx.recipes.loading import load_model
from ctx.recipes.progress import Progress
from ctx.recipes.region_weights import region_weights, region_weights_table
from ctx.recipes.settings import config_error

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "eval", help="bits per byte of a text under a trained model", description=__doc__
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("file", type=Path, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--window", type=sizes, metavar="N[,N...]",
                        help="other sizes than trained with; or one per layer")  # fmt: skip
    parser.add_argument("--compressed", type=sizes, metavar="N[,N...]")
    parser.add_argument("--segment", type=sizes, metavar="N[,N...]")
    parser.add_argument("--usage", action="store_true",
                        help="also what share of attention each region gets, by layer")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: torch's choice")


def run(args: argparse.Namespace) -> int:
    """Prints the table of `ctx train` for another text, and what is asked for besides."""
    set_threads(args.threads)
    model = load_model(args.folder)
    data = read_text(args.file)
    try:
        model = model.with_memory(
            window=args.window, compressed=args.compressed, segment=args.segment
        )
    except (TypeError, ValueError) as error:
        raise config_error(error) from None
    check_fits(model.config, 1, 1, training=False)
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with Progress("evaluation", (3 + args.usage) * len(text), lines=0) as progress:
        results = evaluate(model, text, progress.advance)
        weights = region_weights(model, text, progress.advance) if args.usage else None
    print(table(results, text))
    if weights is not None:
        print("\n" + region_weights_table(weights))
    return 0
