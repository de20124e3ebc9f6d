"""What each compressor, and what trains it, is worth on real text: one model per variant."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ctx.recipes.ablation_settings import AblationSettings, Variant
from ctx.recipes.data import Corpus, load_corpus
from ctx.recipes.evaluation import stream
from ctx.recipes.trainer import Trainer

__all__ = ["measure", "measure_all"]


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


def measure_all(
    left: Sequence[tuple[Variant, int]],
    settings: AblationSettings,
    files: Sequence[Path],
    jobs: int,
) -> Iterator[dict[str, Any]]:
    """What :func:`measure` returns for each (variant, seed), as they end, `jobs` at a time.

    Every model is trained in a process of its own with one thread; where the caller stops early,
    models that have not begun are not trained.
    """
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, spawn, _begin, (files, settings.held_out)) as pool:
        waiting: list[Future[dict[str, Any]]] = [
            pool.submit(_work, variant, settings, seed) for variant, seed in left
        ]
        try:
            for done in as_completed(waiting):
                yield done.result()
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
