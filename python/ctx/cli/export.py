"""`python -m ctx export RUN`: a trained model as a package that C++ programs stream with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ctx import export
from ctx.cli.options import set_threads
from ctx.recipes.errors import RecipeError
from ctx.recipes.loading import load_model

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "export", help="compile a trained model for C++ programs", description=__doc__
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.pt2",
                        help="the package, for programs like examples/cpp/stream")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: torch's choice")


def run(args: argparse.Namespace) -> int:
    """Writes the package and says so."""
    set_threads(args.threads)
    model = load_model(args.folder)
    try:
        export.save(model, args.out)
    except ValueError as error:
        message = str(error).partition(": ")[2]
        raise RecipeError(message.replace("path must", "--out must", 1)) from None
    except OSError as error:
        raise RecipeError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"written: {args.out}")
    return 0
