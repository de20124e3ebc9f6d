"""A long stream: is token 1,000,000 as cheap as token 10,000, in time and in memory?

Two streams of the same memory take turns, one at its 10,000th token and one near its end, so that
what else the machine does falls on both. Resident memory is read on the way of the long one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

import ctx
from benchmarks._harness import Timing, arguments, positive, start
from benchmarks._machine import rss
from benchmarks._report import Report

__all__ = ["main"]

HEADS, HEAD_DIM, RATIO = 8, 64, 4


class Stream:
    """A memory, fed the same few tokens over and over."""

    def __init__(self, slots: int) -> None:
        schedule = ctx.Schedule(slots // 2, slots // 2, RATIO)
        self.memory = ctx.KVMemory(schedule, 1, HEADS, HEAD_DIM, compressor="conv")
        self.q, self.k, self.v = torch.randn(3, 64, 1, HEADS, 1, HEAD_DIM).unbind(0)
        self.tokens = 0

    def run(self, tokens: int) -> float:
        """Steps through `tokens` tokens and returns the seconds per token."""
        inputs = list(zip(self.q, self.k, self.v, strict=True))
        step, period = self.memory.step, len(inputs)
        begin = time.perf_counter()
        for i in range(tokens):
            step(*inputs[i % period])
        self.tokens += tokens
        return (time.perf_counter() - begin) / tokens


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.stream", str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=positive, default=1_000_000, help="of the long stream")
    parser.add_argument("--slots", type=positive, default=256, help="that a query sees")
    parser.set_defaults(threads=1)  # so few slots that a second thread mostly waits for the first
    args = start(parser, argv)
    if args.quick:
        args.tokens, args.slots = min(args.tokens, 4_000), 32
    last = args.tokens // 100  # tokens at the end, and of the short stream, that are compared
    if last < args.repeat:
        parser.error(f"--tokens must be at least {100 * args.repeat}, got {args.tokens}")
    report = Report("stream", args)
    with torch.inference_mode():
        early, late = Stream(args.slots), Stream(args.slots)
        early.run(last)
        first, way = _long(late, args.tokens - last, last)
        sizes = [size for _, _, size in way]
        turns: dict[str, list[float]] = {"early": [], "late": []}
        chunk = max(1, last // max(args.repeat, 20))
        chunk -= chunk % RATIO if chunk > RATIO else 0  # whole periods
        for _ in range(last // chunk):
            turns["early"].append(early.run(chunk))
            turns["late"].append(late.run(chunk))
    sizes.append(rss())
    mib = 1 << 20
    report.row(
        tokens=f"{last:,} to {2 * last:,}",
        time=Timing(tuple(turns["early"])),
        **{"resident MiB": first / mib},
    )
    report.row(
        tokens=f"{args.tokens - last:,} to {args.tokens:,}",
        time=Timing(tuple(turns["late"])),
        **{"resident MiB": sizes[-1] / mib},
    )
    report.extra["way"] = way
    ratio = median(turns["late"]) / median(turns["early"])
    what = f"time per token at {args.tokens:,} / at {last:,} to {2 * last:,}"
    report.at_most("4", what, ratio, 1.05)
    growth = (max(sizes) - first) / mib
    report.at_most("4", f"resident memory, growth in MiB after token {last:,}", growth, 1.0)
    return report.finish(_draw)


def _long(stream: Stream, tokens: int, last: int) -> tuple[int, list[tuple[int, float, int]]]:
    """Resident bytes at token `last`, and (token, seconds per token, resident bytes) after it."""
    stream.run(last)
    first, way = rss(), []
    chunk = max(1, (tokens - last) // 200)
    while stream.tokens < tokens:
        each = stream.run(min(chunk, tokens - stream.tokens))
        way.append((stream.tokens, each, rss()))
    return first, way


def _draw(figure: Any, report: Report) -> None:
    tokens, each, sizes = zip(*report.extra["way"], strict=True)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(tokens, [1e6 * value for value in each], linewidth=0.8)
    top.set(ylabel="µs per token", ylim=(0, 2e6 * median(each)))
    bottom.plot(tokens, [size / (1 << 20) for size in sizes])
    bottom.set(xlabel="token", ylabel="resident MiB", ylim=(0, 1.2 * max(sizes) / (1 << 20)))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
