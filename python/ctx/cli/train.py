"""`python -m ctx train`: trains on text, writes a run folder, and says what the memory is worth."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from ctx.cli.options import MODEL_OPTIONS, RUN_OPTIONS, set_threads, sizes
from ctx.recipes import checkpoint, compare, curves
from ctx.recipes.data import load_corpus
from ctx.recipes.errors import RecipeError
from ctx.recipes.evaluation import evaluate, stream, table
from ctx.recipes.limits import check_fits
from ctx.recipes.loading import load_settings
from ctx.recipes.param_count import report
from ctx.recipes.presets import PRESETS
from ctx.recipes.progress import Progress
from ctx.recipes.run_folder import RunFolder, next_run
from ctx.recipes.settings import TrainSettings, model_config
from ctx.recipes.trainer import Trainer
from ctx.recipes.training import rival_trainer, train
from ctx.transformer import CompressiveTransformerConfig

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "train",
        help="train a byte-level model and evaluate it with and without its memories",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILES",
                        help="UTF-8 texts, in this order; none: the standard library")  # fmt: skip
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--run", dest="folder", type=Path, metavar="RUN",
                        help="folder to write (default: runs/1, runs/2, ...)")  # fmt: skip
    folder.add_argument("--resume", type=Path, metavar="RUN",
                        help="continue this run, bit for bit, with its own settings; with --steps "
                        "also beyond its end, or to an earlier one: the learning rate is then that "
                        "of a run of so many steps from there on")  # fmt: skip
    parser.add_argument("--compare", action="store_true",
                        help="also train the same model, on the same text, in the same order, for "
                        "as many steps and from the same seed, with the window alone and with a "
                        "window of as many slots (three times as long)")  # fmt: skip
    parser.add_argument("--preset", choices=list(PRESETS), default=argparse.SUPPRESS,
                        help="a model of the paper and its training, which other options change; "
                        "none was trained here")  # fmt: skip
    parser.add_argument("--param-count", action="store_true",
                        help="print how many parameters the model has, by part, and stop; a preset "
                        "is counted with the paper's vocabulary")  # fmt: skip
    defaults = model_config({})
    group = parser.add_argument_group("model")
    for option, name, kind, text in MODEL_OPTIONS:
        _add(group, option, name, kind, text, getattr(defaults, name))
    group = parser.add_argument_group("training")
    for option, name, kind, text in RUN_OPTIONS:
        _add(group, option, name, kind, text, getattr(TrainSettings(), name))


def _add(group: Any, option: str, name: str, kind: Any, text: str, default: Any) -> None:
    if default is not None:
        text += (
            f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
        )
    # No default here: what was not said must be told apart from what was, for --resume.
    group.add_argument(
        option, dest=name, type=kind, help=text, default=argparse.SUPPRESS,
        metavar={int: "N", float: "X", str: "NAME", sizes: "N[,N...]"}[kind],
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains, or continues to; then evaluates. 0, or 130 where a signal stopped it."""
    if args.param_count and not args.resume:
        print(report(_settings(args)[0], PRESETS[args.preset] if "preset" in args else None))
        return 0
    trainer, folder, parts = _resume(args) if args.resume else _begin(args)
    model, settings = trainer.model, trainer.settings
    others = compare.rivals(model.config) if parts["compare"] else []
    for other in others:
        check_fits(other.config, settings.batch, settings.length, training=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    reach = max(schedule.reach for schedule in model.schedules)
    print(
        f"{folder.path}: {size:,} parameters, {len(trainer.corpus.training):,} bytes of text, "
        f"{settings.threads} threads; reach {reach:,} tokens",
        flush=True,
    )
    trained = [trainer]
    finished = train(trainer, folder, parts, last=not others)
    for i, other in enumerate(others if finished else [], 1):
        rival, place = rival_trainer(other, trainer, folder, parts["digest"])
        print(f"{place.path}: {other.name}", flush=True)
        trained.append(rival)
        finished = train(rival, place, {**parts, "compare": False}, last=i == len(others))
        place.close()
        if not finished:
            break
    if not finished:
        print(
            f"ctx train: stopped after step {trained[-1].step:,} of {settings.steps:,}; continue "
            f"with: python -m ctx train --resume {folder.path}",
            file=sys.stderr,
        )
        return 130
    text = trainer.corpus.held_out
    with Progress("evaluation", (3 + len(others)) * len(text), lines=0) as progress:
        results = evaluate(model, text, progress.advance)
        if others:
            results = compare.named(model.config, results)
        for other, rival in zip(others, trained[1:], strict=True):
            results.append(stream(other.name, rival.model, text, progress.advance))
    folder.write_evaluation(results)
    if others:
        print(table(results, text, "streamed"))
        print("each model: the same text in the same order, as many steps, the same seed")
    else:
        print(table(results, text))
        print(_WORTH)
    if not curves.draw(folder.curves, folder.history(), results):
        print("no curves.png: pip install matplotlib", file=sys.stderr)
    folder.close()
    seconds = sum(one.seconds for one in trained)
    print(f"trained for {seconds:.0f} s; written to {folder.path}")
    return 0


_WORTH = (
    "CMem off: what these weights, trained with slots, lose without them; what models trained "
    "without\nslots reach is for --compare to say"
)


def _given(args: argparse.Namespace, options: list[tuple[str, str, Any, str]]) -> dict[str, Any]:
    return {name: getattr(args, name) for _, name, _, _ in options if hasattr(args, name)}


def _settings(args: argparse.Namespace) -> tuple[CompressiveTransformerConfig, TrainSettings]:
    """The defaults, changed by the preset, changed by the options."""
    model, run = _given(args, MODEL_OPTIONS), _given(args, RUN_OPTIONS)
    if "preset" in args:
        preset = PRESETS[args.preset]
        model, run = preset.model | model, preset.run | run
        if model["compressor_grad"] != "aux" and "aux_loss" not in args:
            del model["aux_loss"]  # it came with the preset's aux
    return model_config(model), TrainSettings(**run)


def _begin(args: argparse.Namespace) -> tuple[Trainer, RunFolder, dict[str, Any]]:
    config, settings = _settings(args)
    settings = dataclasses.replace(settings, threads=set_threads(settings.threads))
    check_fits(config, settings.batch, settings.length, training=True)
    if args.compare:
        compare.rivals(config)
    corpus = load_corpus(args.files, settings.held_out)
    trainer = Trainer(config, settings, corpus)
    files = [str(path.resolve()) for path in args.files]
    parts = {"files": files, "digest": corpus.digest, "compare": args.compare}
    return trainer, RunFolder(args.folder or next_run()), parts


def _resume(args: argparse.Namespace) -> tuple[Trainer, RunFolder, dict[str, Any]]:
    given = {**_given(args, MODEL_OPTIONS), **_given(args, RUN_OPTIONS)}
    steps = given.pop("steps", None)
    options = [option for option, name, _, _ in MODEL_OPTIONS + RUN_OPTIONS if name in given]
    options += ["--preset"] * ("preset" in args) + ["--param-count"] * args.param_count
    if options or args.files:
        dropped = ", ".join(options + ["FILES"] * bool(args.files))
        raise RecipeError(f"--resume takes all settings from the run: drop {dropped}")
    path = checkpoint.find(args.resume)
    state = checkpoint.load(path)
    config, settings = load_settings(state)
    if steps is not None:
        settings = dataclasses.replace(settings, steps=steps)
    set_threads(settings.threads)
    corpus = load_corpus([Path(name) for name in state["files"]], settings.held_out)
    if corpus.digest != state["digest"]:
        raise RecipeError(f"the texts must be those that {args.resume} was trained on, got others")
    trainer = Trainer(config, settings, corpus)
    trainer.load(state)
    if trainer.step > settings.steps:
        raise RecipeError(
            f"--steps must be at least the {trainer.step} that {args.resume} has done, got {steps}"
        )
    parts = {name: state[name] for name in ("files", "digest", "compare")}
    parts["compare"] |= args.compare
    if parts["compare"]:
        compare.rivals(config)  # refused before anything is written
    folder = RunFolder(path.parent, resumed=trainer.step)
    checkpoint.save(folder.checkpoint, {**parts, **trainer.state()})  # knows its new end at once
    return trainer, folder, parts
