"""What every benchmark does the same way: arguments, taking turns, medians."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Timing", "arguments", "interleave", "start"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, once per turn."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def arguments(module: str, description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--repeat", type=positive, default=15, help="turns of every candidate")
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch and ctx")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three turns: a dry run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and picture")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where a ratio misses its bound"
    )
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line and sets threads and seed."""
    args = parser.parse_args(argv)
    if args.quick:
        args.repeat = min(args.repeat, 3)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    repeat: int,
    *,
    multiple: int = 1,
    least: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times the candidates in turns: every round has one turn of each.

    A turn is as many calls in a row as fill `least` seconds, so that the clock and the cost of
    entering a loop do not count. Rounds go through the candidates forwards and backwards by turns,
    so that none always follows the same other.

    Args:
        candidates: what to call, by name.
        repeat: rounds.
        multiple: calls of a turn are a multiple of this; a call whose cost is periodic (a step that
            compresses every c tokens) is measured over whole periods.
        least: seconds that a turn should take at least.
        clock: seconds.

    Returns:
        Seconds of one call, per candidate.
    """
    calls: dict[str, int] = {}
    for name, call in candidates.items():
        call()  # the first one allocates, and wakes the threads
        begin = clock()
        for _ in range(multiple):
            call()
        once = max((clock() - begin) / multiple, 1e-9)
        calls[name] = multiple * max(1, math.ceil(least / once / multiple))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(repeat):
        for name in order:
            call, count = candidates[name], calls[name]
            begin = clock()
            for _ in range(count):
                call()
            samples[name].append((clock() - begin) / count)
        order.reverse()
    return {name: Timing(tuple(values)) for name, values in samples.items()}
