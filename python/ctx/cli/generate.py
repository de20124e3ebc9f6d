"""`python -m ctx generate RUN`: continues a prompt, byte by byte, as the model draws them."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ctx.cli.options import set_threads
from ctx.recipes.errors import RecipeError, setting_error
from ctx.recipes.loading import load_model

__all__ = ["add_parser", "run"]

_SETTINGS = ("num_tokens", "temperature", "top_k", "top_p", "seed")


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "generate", help="continue a prompt with a trained model", description=__doc__
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="(default: an empty line)")
    parser.add_argument("--tokens", type=int, default=400, metavar="N", help="(default: 400)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X",
                        help="0: always the likeliest byte (default: 0.8)")  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest bytes")
    parser.add_argument("--top-p", type=float, metavar="X",
                        help="draw from the likeliest bytes up to this probability")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed, the same text")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: torch's choice")


def run(args: argparse.Namespace) -> int:
    """Writes the prompt and its continuation to stdout as UTF-8."""
    set_threads(args.threads)
    prompt = os.fsencode(args.prompt)
    if not prompt:
        raise RecipeError("--prompt must have at least one byte, got none")
    model = load_model(args.folder)
    tokens = torch.tensor([list(prompt)])
    try:
        drawn = model.stream(
            tokens,
            args.tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
    except (TypeError, ValueError) as error:
        raise setting_error(error, _SETTINGS) from None
    # Bytes arrive one by one; a character is shown when it is whole, junk as U+FFFD.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    out = sys.stdout.buffer
    out.write(decoder.decode(prompt).encode())
    for token in drawn:
        out.write(decoder.decode(bytes([int(token)])).encode())
        out.flush()
    out.write((decoder.decode(b"", final=True) + "\n").encode())
    out.flush()
    return 0
