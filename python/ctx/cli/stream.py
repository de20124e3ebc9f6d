"""`python -m ctx stream`: any text through an existing model, with a bounded memory and without."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctx.cli.options import DTYPES, add_existing_model, library_error, set_threads
from ctx.hf.budgets import schedule_of
from ctx.hf.evaluation import candidates, picture, statistics
from ctx.hf.evaluation.candidates import Candidate
from ctx.hf.evaluation.comparison import perplexity
from ctx.hf.evaluation.streaming import Scores, stream
from ctx.hf.loading import load_model
from ctx.recipes.data import read_text
from ctx.recipes.errors import RecipeError
from ctx.recipes.progress import Progress

__all__ = ["add_parser", "run"]

PICTURES = (".png", ".pdf", ".svg")
#: Neighbouring tokens whose mean loss is one sample of an error bar.
BLOCK = 512
_SETTINGS = ("slots", "compressed", "ratio", "chunk")
_OF_THE_FILE = ("slots", "distance", "compressed", "ratio")


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "stream",
        help="perplexity, speed and bytes of a long text under an existing model",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    add_existing_model(parser)
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text")
    add("--compressor", type=Path, metavar="FILE", help="what `ctx fit` wrote, with its sizes")
    add("--slots", type=int, metavar="N",
        help="the most a query attends to (default: 512; a compressor has its own)")  # fmt: skip
    add("--compressed", type=int, metavar="N", help="also a memory with so many mean slots")
    add("--ratio", type=int, metavar="N", help="tokens per mean slot (default: 4)")
    add("--distance", choices=("slot", "token"), help="slot or token (default: slot)")
    add("--tokens", type=int, metavar="N", help="of the text (default: all)")
    add("--full", type=int, metavar="N",
        help="tokens for the full cache; 0: none (default: the model's positions)")  # fmt: skip
    add("--chunk", type=int, default=512, metavar="N", help="tokens per call (default: 512)")
    add("--plot", type=Path, metavar="FILE.png", help="draws the loss against the position")


def run(args: argparse.Namespace) -> int:
    """Prints a table, a line for each cache."""
    _check(args)
    set_threads(args.threads)
    text = read_text(args.text).decode()
    try:
        model, tokenizer = load_model(args.model, DTYPES[args.dtype])
        ids = tokens_of(tokenizer, text, args.tokens)
        compared = _candidates(args, model)
    except (ImportError, ValueError) as error:
        raise library_error(error, _SETTINGS) from error
    if len(ids) < 2:
        raise RecipeError(f"{args.text} must have at least 2 tokens, got {len(ids)}")
    known = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= known:
        raise RecipeError(
            f"--model must have a tokenizer of the model's {known:,} tokens, got token {ids.max()}"
        )
    full = _full_limit(args, model, len(ids))
    if full:
        name = "full cache" if full == len(ids) else f"full cache, first {full:,} tokens"
        compared = [candidates.full_cache(name, full), *compared]
    total = len(ids) * len(compared) - (len(ids) - full if full else 0)
    with Progress("stream", total) as progress:
        try:
            scores = stream(model, ids, compared, chunk=args.chunk, advance=progress.advance)
        except ValueError as error:
            raise library_error(error, _SETTINGS) from error
    print(table(scores, baseline=1 if full else 0))
    print(
        f"{len(ids):,} tokens, {args.chunk} per call, {args.dtype}, {torch.get_num_threads()} "
        f"threads; differences: nats per token, ± the standard error over blocks of {BLOCK}"
    )
    if args.plot is not None:
        _draw(args.plot, scores)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses what can be told before a model is read."""
    for name, least in (("slots", 1), ("tokens", 2), ("full", 0), ("chunk", 1), ("ratio", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise RecipeError(f"--{name} must be at least {least}, got {value}")
    if args.compressor is not None:
        given = [f"--{name}" for name in _OF_THE_FILE if getattr(args, name) is not None]
        if given:
            raise RecipeError(
                f"--compressor takes all sizes from its file: drop {', '.join(given)}"
            )
        if not args.compressor.is_file():  # before a model is read
            raise RecipeError(f"cannot read {args.compressor}: no such file")
    if args.ratio is not None and args.compressed is None:
        raise RecipeError("--ratio must come with --compressed, which says how many slots")
    if args.full is not None and args.full == 1:
        raise RecipeError("--full must be 0 or at least 2, got 1")
    if args.plot is not None:
        if args.plot.suffix not in PICTURES:
            raise RecipeError(f"--plot must end with {', '.join(PICTURES)}, got {args.plot}")
        if not args.plot.resolve().parent.is_dir():
            raise RecipeError(f"cannot write {args.plot}: no such folder")


def tokens_of(tokenizer: Any, text: str, limit: int | None) -> Tensor:
    """The text's first tokens, int64 [N], N <= limit; with what the tokenizer puts in front."""
    characters = len(text) if limit is None else 16 * limit  # few texts have longer tokens
    while True:
        ids = tokenizer(text[:characters], verbose=False).input_ids[:limit]
        if limit is None or len(ids) == limit or characters >= len(text):
            return torch.tensor(ids, dtype=torch.int64)
        characters *= 4


def _candidates(args: argparse.Namespace, model: Any) -> list[Candidate]:
    """Window and sinks first, then what is compared with them."""
    if args.compressor is not None:
        from ctx.hf import load_compressors

        try:
            fitted = load_compressors(args.compressor, model)
        except OSError as error:
            message = f"cannot read {args.compressor}: {error.strerror or error}"
            raise RecipeError(message) from None
        window = candidates.window_and_sinks(fitted.mean_slots, distance=fitted.distance)
        return [window, candidates.fitted(args.compressor.name, fitted)]
    slots, distance = args.slots or 512, args.distance or "slot"
    made = [candidates.window_and_sinks(slots, distance=distance)]
    if args.compressed is not None:
        schedule = schedule_of(slots, args.compressed, args.ratio or 4)
        name = f"mean, {schedule.window} + {schedule.compressed} × {schedule.ratio}"
        made.append(candidates.compressive(name, schedule, distance=distance))
    return made


def _full_limit(args: argparse.Namespace, model: Any, tokens: int) -> int:
    """Tokens for the full cache, 0 for none."""
    if args.full is not None:
        return min(tokens, int(args.full))
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(tokens, int(known or 0))


def table(scores: list[Scores], baseline: int) -> str:
    """A line for each, with the paired difference to the baseline over the tokens that both read.

    Args:
        scores: the candidates'.
        baseline: the index of the one that the others are compared with.
    """
    base = scores[baseline]
    head = ["cache", "perplexity", f"nats over {base.name}", "tokens/s", "memory"]
    rows = [head]
    for one in scores:
        loss = float(one.losses.double().mean())
        both = min(len(one.losses), len(base.losses))
        mine, others = (statistics.block_means(x.losses[:both], BLOCK) for x in (one, base))
        over = "" if one is base else _signed(statistics.difference(mine, others))
        speed = f"{one.tokens / one.seconds:,.0f}"
        size = f"{one.nbytes / 2**20:,.1f} MiB"
        rows.append([one.name, f"{perplexity(loss):,.3f}", over, speed, size])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _signed(estimate: statistics.Estimate) -> str:
    error = "" if estimate.error is None else f" ± {estimate.error:.4f}"
    return f"{estimate.value:+.4f}{error}"


def _draw(path: Path, scores: list[Scores]) -> None:
    block = max(1, min(BLOCK, max(len(one.losses) for one in scores) // 8))
    try:
        drawn = picture.draw(path, scores, block)
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror or error}") from None
    if drawn:
        print(f"written: {path}")
    else:
        print(f"no {path}: pip install matplotlib", file=sys.stderr)
