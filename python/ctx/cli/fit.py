"""`python -m ctx fit`: compressors for an existing model, fitted to a text in minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ctx.hf
from ctx.cli.options import DTYPES, add_existing_model, add_options, library_error, set_threads
from ctx.compression import COMPRESSORS
from ctx.hf.fitting.settings import FitSettings
from ctx.hf.loading import load_model
from ctx.recipes.data import read_text
from ctx.recipes.errors import RecipeError
from ctx.recipes.progress import Progress

__all__ = ["add_parser", "run"]

# name in FitSettings, type, meaning
_OPTIONS: list[tuple[str, Any, str]] = [
    ("slots", int, "the most entries a query attends to in a layer (on average, where measured)"),
    ("ratio", int, "tokens per slot"),
    ("sinks", int, "first tokens that are kept exactly"),
    ("excerpts", int, "of the texts, to fit to"),
    ("validation", int, "further excerpts, to choose each layer's placement by"),
    ("excerpt_tokens", int, "tokens of an excerpt"),
    ("queries", int, "random queries of an excerpt"),
    ("steps", int, "of each layer's fit"),
    ("lr", float, "learning rate of these"),
    ("end_to_end_steps", int, "of the end-to-end fit"),
    ("end_to_end_tokens", int, "tokens of its excerpts"),
    ("end_to_end_queries", int, "positions of these whose predictions count"),
    ("end_to_end_lr", float, "its learning rate"),
    ("seed", int, "of queries and excerpts"),
]


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "fit", help="fit compressors to an existing model", description=__doc__
    )
    parser.set_defaults(run=run)
    add_existing_model(parser)
    add = parser.add_argument
    add("--text", type=Path, required=True, nargs="+", metavar="FILE", help="UTF-8 texts")
    add("--out", type=Path, required=True, metavar="FILE",
        help="the compressors; while it is incomplete FILE.partial, from which the same command "
        "goes on")  # fmt: skip
    add("--compressor", default=FitSettings().compressor, choices=list(COMPRESSORS))
    add("--distance", choices=("slot", "token"), default=FitSettings().distance,
        help="slot: bounded, for streams of any length (default)")  # fmt: skip
    add("--allocation", choices=("equal", "measured"), default=FitSettings().allocation,
        help="measured: layers that need more entries get them from the others (default: equal)",
    )  # fmt: skip
    add("--end-to-end", action="store_true",
        help="then fit all layers together to the model's predictions")  # fmt: skip
    add_options(parser, _OPTIONS, FitSettings)
    add(
        "--characters", type=int, metavar="N", help="of each text from its beginning (default: all)"
    )


def run(args: argparse.Namespace) -> int:
    """Fits, and prints what became of each layer."""
    if args.characters is not None and args.characters < 1:
        raise RecipeError(f"--characters must be at least 1, got {args.characters}")
    if not args.out.resolve().parent.is_dir() or args.out.is_dir():
        raise RecipeError(f"cannot write {args.out}: no such folder, or a folder itself")
    set_threads(args.threads)
    texts = [read_text(file).decode()[: args.characters] for file in args.text]
    names = [name for name, _, _ in _OPTIONS] + [
        "compressor",
        "distance",
        "allocation",
        "end_to_end",
    ]
    settings = {name: getattr(args, name) for name in names}
    partial = args.out.with_name(args.out.name + ".partial")
    bars = _Bars()
    try:
        FitSettings(**settings)  # before the model is read
        model, tokenizer = load_model(args.model, DTYPES[args.dtype])
        fitted = ctx.hf.fit(
            model, texts, tokenizer=tokenizer, partial=partial, progress=bars, **settings
        )
    except (ImportError, ValueError, TypeError) as error:
        raise library_error(error, names) from error
    except KeyboardInterrupt:
        if partial.exists():
            print(f"\nkept so far: {partial}; the same command goes on", file=sys.stderr)
        raise
    finally:
        bars.close()
    fitted.save(args.out)
    print(_table(fitted))
    size = args.out.stat().st_size / 1024
    print(f"written: {args.out} ({size:,.0f} KB); try it: python -m ctx stream --compressor")
    return 0


class _Bars:
    """A bar for each stage of a fit."""

    def __init__(self) -> None:
        self.stage = ""
        self.bar: Progress | None = None

    def __call__(self, stage: str, done: int, total: int, said: str, /) -> None:
        if stage != self.stage:
            self.close()
            self.stage, self.bar = stage, Progress(stage, total)
            self.bar.__enter__()
        assert self.bar is not None
        self.bar.to(done, said)

    def close(self) -> None:
        """Ends the bar that stands."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None


def _table(fitted: Any) -> str:
    """A line for each layer: sizes, and errors on the validation excerpts."""
    lines = ["layer  window  slots  error  window alone"]
    for number, (layer, schedule) in enumerate(
        zip(fitted.report["layers"], fitted.schedules, strict=True)
    ):
        errors = layer["validation"]
        lines.append(
            f"{number:5d}  {schedule.window:6d}  {schedule.compressed:5d}  "
            f"{errors[layer['placement']]:.3f}  {errors[0]:12.3f}"
        )
    losses = fitted.report.get("end_to_end")
    if losses:
        part = max(1, len(losses) // 4)
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        lines.append(
            f"KL to the full cache, nats: {first:.4f} in the first {part} steps, {last:.4f} in "
            f"the last"
        )
    mean = "" if fitted.mean_slots == fitted.slots else f", {fitted.mean_slots} on average"
    lines.append(f"at most {fitted.slots} entries in a layer{mean}, distance {fitted.distance!r}")
    return "\n".join(lines)
