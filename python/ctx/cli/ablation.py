"""`python -m ctx ablation`: what each compressor, and what trains it, is worth on real text."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ctx.cli.ablation_results import Results, table
from ctx.cli.ablation_settings import OPTIONS, AblationSettings, Variant
from ctx.cli.data import Corpus, load_corpus
from ctx.cli.errors import CliError
from ctx.cli.evaluation import stream
from ctx.cli.limits import check_fits
from ctx.cli.trainer import Trainer

__all__ = ["add_parser", "measure", "run"]


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
    for name, kind, text in OPTIONS:
        default = getattr(AblationSettings, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=kind, default=default,
            help=f"{text} (default: {default})", metavar={int: "N", float: "X", str: "NAMES"}[kind],
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains what is not yet measured, one JSON write for each; then prints the table."""
    settings = AblationSettings(**{name: getattr(args, name) for name, _, _ in OPTIONS})
    if not 1 <= args.jobs <= 256:
        raise CliError(f"--jobs must be at least 1 and at most 256, got {args.jobs}")
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
    if left:
        _train(left, settings, args.files, results, args.jobs)
    print(table(results.runs))
    print(f"took {time.perf_counter() - began:.0f} s; written to {results.path}")
    return 0


def _train(
    left: Sequence[tuple[Variant, int]],
    settings: AblationSettings,
    files: Sequence[Path],
    results: Results,
    jobs: int,
) -> None:
    spawn = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    with ProcessPoolExecutor(jobs, spawn, _begin, (files, settings.held_out)) as pool:
        waiting: dict[Future[dict[str, Any]], str] = {}
        for variant, seed in left:
            name = f"{variant.compressor}, {variant.trained_by}, seed {seed}"
            waiting[pool.submit(_work, variant, settings, seed)] = name
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                measured = done.result()
                results.add(measured)
                print(
                    f"{number}/{len(left)} {waiting[done]}: {measured['both']:.4f} bits/byte in "
                    f"{measured['seconds']:.0f} s",
                    file=sys.stderr,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_corpus: Corpus  # of a worker process


def _begin(files: Sequence[Path], held_out: int) -> None:
    global _corpus
    torch.set_num_threads(1)
    _corpus = load_corpus(files, held_out)


def _work(variant: Variant, settings: AblationSettings, seed: int) -> dict[str, Any]:
    return measure(variant, settings, seed, _corpus)


def measure(
    variant: Variant, settings: AblationSettings, seed: int, corpus: Corpus
) -> dict[str, Any]:
    """Trains one model and streams the held-out text through it, with CMem and without."""
    began = time.perf_counter()
    trainer = Trainer(variant.config, settings.training(seed), corpus)
    for _ in range(settings.steps):
        trainer.train_step()
    model, text = trainer.model, corpus.held_out
    both = stream("both memories", model, text, lambda count: None)
    off = stream("CMem off", model.with_memory(compressed=0), text, lambda count: None)
    return {
        "compressor": variant.compressor,
        "trained_by": variant.trained_by,
        "seed": seed,
        "both": both.bits_per_byte,
        "off": off.bits_per_byte,
        "seconds": round(time.perf_counter() - began, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": dataclasses.asdict(variant.config),
    }
