"""Many streams: does a tick of 32 out of 1,000 cost more than a batch of 32 alone?

A session of 1,000 streams in which 32 bring a token, against memories of 32 rows that hold nothing
else and against a session of 32 rows, in the same turns. The 32 are the same in every tick, so that
both sides find in the caches what fits there: neighbours, which lie in memory as a batch does, and
then any of the 1,000. Beside it, without a bound: others in every tick against as many batches of
32 in turns. Both read as many bytes, and all of them anew, but a batch reads its rows in one piece.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ctx
from benchmarks._harness import arguments, interleave, positive, start
from benchmarks._report import Report, bars

__all__ = ["main"]

TOGETHER, LAYERS = 32, 2


class Shape(NamedTuple):
    """The layers of a model, and what a stream of it holds."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    schedule: ctx.Schedule


SHAPES = [
    Shape("4 heads over 2, D 32, 64 + 32 slots", 4, 2, 32, ctx.Schedule(64, 32, 4, 16, 1)),
    Shape("9 heads over 3, D 64, 128 + 128 slots", 9, 3, 64, ctx.Schedule(128, 128, 4, 16, 4)),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.sessions", str(__doc__).splitlines()[0])
    parser.add_argument("--streams", type=positive, default=1000, help="of the large session")
    args = start(parser, argv)
    if args.quick:
        args.streams = min(args.streams, 2 * TOGETHER)
    if args.streams < TOGETHER:
        parser.error(f"--streams must be at least {TOGETHER}, got {args.streams}")
    report = Report("sessions", args)
    with torch.inference_mode():
        for shape in SHAPES:
            _compare(report, shape, args)
    return report.finish(_draw)


def _compare(report: Report, shape: Shape, args: Any) -> None:
    q = torch.randn(TOGETHER, shape.heads, 1, shape.head_dim)
    k, v = torch.randn(2, TOGETHER, shape.kv_heads, 1, shape.head_dim).unbind(0)
    pairs = (q, k, v)
    full = _full(shape)
    large, small = _session(full, args.streams), _session(full, TOGETHER)
    batches = _batches(full, args.streams // TOGETHER)
    kinds = {
        "32 neighbours": large.ids[:TOGETHER],
        "32 anywhere": sorted(random.Random(0).sample(large.ids, TOGETHER)),
    }
    for kind, some in kinds.items():
        candidates = {
            f"ctx, of {args.streams:,}": _ticks(large, [some], pairs),
            "memories of 32 rows": _steps(batches[:1], pairs),
            "a session of 32 rows": _ticks(small, [small.ids], pairs),
        }
        ratio, what = _turns(report, shape, kind, candidates, args)
        report.at_most("3", what, ratio, 1.1)
    ids = large.ids
    random.Random(1).shuffle(ids)
    sets = [ids[i * TOGETHER : (i + 1) * TOGETHER] for i in range(len(batches))]
    candidates = {
        f"ctx, of {args.streams:,}": _ticks(large, sets, pairs),
        "memories of 32 rows": _steps(batches, pairs),
    }
    ratio, what = _turns(report, shape, "others in every tick", candidates, args)
    report.note(f"{what}: {ratio:.3g}")


def _turns(
    report: Report, shape: Shape, kind: str, candidates: dict[str, Callable[[], None]], args: Any
) -> tuple[float, str]:
    """Time of the first candidate over that of the best other one, and what that is."""
    times = interleave(candidates, args.repeat, multiple=shape.schedule.segment)
    for who, timing in times.items():
        report.row(shape=shape.name, streams=kind, who=who, time=timing)
    ours, *alone = (timing.median for timing in times.values())
    return ours / min(alone), f"{shape.name}, {kind}, tick / batch of {TOGETHER} alone"


def _full(shape: Shape) -> list[ctx.KVMemory]:
    """A memory of one stream for each layer, in which every slot is in use."""
    made = []
    for _ in range(LAYERS):
        memory = ctx.KVMemory(
            shape.schedule, 1, shape.kv_heads, shape.head_dim, compressor="mean", max_rewind=16
        )
        tokens = 2 * shape.schedule.reach + shape.schedule.segment
        k, v = torch.randn(2, 1, shape.kv_heads, tokens, shape.head_dim).unbind(0)
        memory.append(k, v)
        made.append(memory)
    return made


def _apart(full: list[ctx.KVMemory], streams: int) -> tuple[Tensor, Tensor]:
    """Tokens for streams that are alike, and how many each brings: from then on each compresses at
    another tick, as streams do that came at different times."""
    _, kv_heads, _, head_dim = full[0].tensors["window_keys"].shape
    most = 4 * full[0].schedule.segment
    return torch.randn(streams, kv_heads, most, head_dim), torch.randint(most, (streams,))


def _session(full: list[ctx.KVMemory], streams: int) -> ctx.Session:
    """That many streams, each about as if it had brought the tokens of `full`."""
    session = ctx.Session(full, streams)
    first = session.join()
    _, kv_heads, _, head_dim = full[0].tensors["window_keys"].shape
    x = torch.randn(1, kv_heads, int(full[0].seen[0]), head_dim)
    for layer in range(LAYERS):
        session.step([first], layer, x, x, x)
    for _ in range(streams - 1):
        session.fork(first)
    x, lengths = _apart(full, streams)
    for layer in range(LAYERS):
        session.step(session.ids, layer, x, x, x, lengths)
    return session


def _batches(full: list[ctx.KVMemory], count: int) -> list[list[ctx.KVMemory]]:
    rows = torch.zeros(TOGETHER, dtype=torch.int64)
    made = [[memory.select(rows) for memory in full] for _ in range(count)]
    for batch in made:
        x, lengths = _apart(full, TOGETHER)
        for memory in batch:
            memory.append(x, x, lengths)
    return made


def _ticks(
    session: ctx.Session, sets: list[list[int]], pairs: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], None]:
    """A tick of each set of streams in turn."""
    turn = 0

    def tick() -> None:
        nonlocal turn
        for layer in range(LAYERS):
            session.step(sets[turn % len(sets)], layer, *pairs)
        turn += 1

    return tick


def _steps(
    batches: list[list[ctx.KVMemory]], pairs: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], None]:
    turn = 0

    def step() -> None:
        nonlocal turn
        for memory in batches[turn % len(batches)]:
            memory.step(*pairs)
        turn += 1

    return step


def _draw(figure: Any, report: Report) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in report.rows))
    for axes, shape in zip(figure.subplots(len(shapes), 1), shapes, strict=True):
        rows = [row for row in report.rows if row["shape"] == shape]
        names = [f"{row['who']}, {row['streams']}" for row in rows]
        bars(axes, names, [1e6 * row["time"].median for row in rows], "µs per tick")
        axes.set_title(shape, fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
