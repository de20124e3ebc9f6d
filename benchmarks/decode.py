"""One token at a time: how near is reading the memory to the machine's limit?

Attention over a memory of at least 64 MiB against the read bandwidth of the machine, measured in
the same turns by a parallel sum over as many bytes, and against torch's own attention over the same
slots; a whole step against its attention alone; a small memory against the reference and against
the loop that everyone writes; int8 slots against bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import ctx
from benchmarks._harness import arguments, interleave, start
from benchmarks._memories import CatLoop, as_int8, full_memory, sdpa_ways, visible
from benchmarks._report import Report, bars

__all__ = ["main"]

MIB = 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Shape(NamedTuple):
    """A memory, and what its attention should reach (share of the bandwidth, times SDPA)."""

    name: str
    heads: int
    kv_heads: int
    dtype: str
    share: float
    faster: float


SHAPES = [
    Shape("MHA", 32, 32, "float32", 0.75, 1.6),
    Shape("GQA-4", 32, 8, "float32", 0.75, 4.0),
    Shape("MHA", 32, 32, "bfloat16", 0.60, 5.0),
    Shape("GQA-4", 32, 8, "bfloat16", 0.60, 15.0),
]
HEAD_DIM, RATIO = 128, 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.decode", str(__doc__).splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="least size of the large memories")
    args = start(parser, argv)
    if args.quick:
        args.mib = 1
    report = Report("decode", args)
    with torch.inference_mode():
        for shape in SHAPES:
            _large(report, shape, args)
        _small(report, args)
        _int8(report, args)
    return report.finish(_draw)


def _large(report: Report, shape: Shape, args: Any) -> None:
    dtype = DTYPES[shape.dtype]
    pair = 2 * shape.kv_heads * HEAD_DIM * dtype.itemsize  # bytes of a key and a value
    slots = max(64 if args.quick else 4096, args.mib * MIB // pair)
    schedule = ctx.Schedule(slots // 2, slots // 2, RATIO)
    made = {"dtype": dtype, "position": "rotary"}
    memory = full_memory(schedule, shape.kv_heads, HEAD_DIM, compressor="mean", **made)
    # Weights as a model of that dtype has them.
    conv = ctx.compression.Conv(shape.kv_heads, RATIO, HEAD_DIM, dtype=dtype)
    convolved = full_memory(schedule, shape.kv_heads, HEAD_DIM, compressor=conv, **made)
    seen = visible(schedule, int(memory.seen[0]) - 1)
    q = torch.randn(1, shape.heads, 1, HEAD_DIM).to(dtype)
    k, v = (torch.randn(2, 1, shape.kv_heads, 1, HEAD_DIM).to(dtype)).unbind(0)
    keys, values = torch.randn(2, 1, shape.kv_heads, seen, HEAD_DIM).to(dtype).unbind(0)
    size = seen * pair
    numbers = torch.randn(size // 4)
    candidates = {
        "read": lambda: numbers.sum(),
        "ctx attend": lambda: memory.attend(q),
        **sdpa_ways(q, keys, values),
    }
    times = interleave(candidates, args.repeat)
    where = {"shape": f"{shape.name} {shape.dtype}", "slots": seen, "MiB": size / MIB}
    for name, timing in times.items():
        speed = size / timing.median / 1e9
        report.row(**where, what=name, time=timing, **{"GB/s": speed})
    ours = times["ctx attend"].median
    share = times["read"].median / ours
    report.at_least(
        "1", f"{shape.name} {shape.dtype}, share of the read bandwidth", share, shape.share
    )
    ways = {name: timing for name, timing in times.items() if name.startswith("sdpa")}
    best = min(ways, key=lambda name: ways[name].median)
    said = {"sdpa": "SDPA as one calls it", best: f"SDPA at its best ({best})"}
    if "sdpa repeated" in ways:
        said["sdpa repeated"] = "SDPA over keys repeated for every query head"
    for way, name in said.items():
        what = f"{shape.name} {shape.dtype}, times as fast as {name}"
        report.at_least("1", what, ways[way].median / ours, shape.faster)
    # Whole periods of c steps: compression is in every turn. Both read the same memory and nothing
    # else, as what the turn before has read may still be in a cache.
    for compressor, held in (("mean", memory), ("conv", convolved)):
        alone, whole = f"ctx attend ({compressor})", f"ctx step {compressor}"
        steps = {alone: lambda m=held: m.attend(q), whole: lambda m=held: m.step(q, k, v)}
        times = interleave(steps, args.repeat, multiple=schedule.segment)
        for name, timing in times.items():
            report.row(**where, what=name, time=timing, **{"GB/s": size / timing.median / 1e9})
        ratio = times[whole].median / times[alone].median
        what = f"{shape.name} {shape.dtype}, step ({compressor}) / its attention, {seen} slots"
        report.at_most("2", what, ratio, 1.10)


def _small(report: Report, args: Any) -> None:
    """At most 512 slots, 8 heads, D 64, batch 1."""
    slots, heads, head_dim = (32 if args.quick else 512), 8, 64
    schedule = ctx.Schedule(slots // 2 - RATIO, slots // 2, RATIO)
    memory = full_memory(schedule, heads, head_dim, compressor="mean")
    reference = ctx.reference.KVMemory(
        ctx.reference.Schedule(*schedule.numbers), 1, heads, head_dim, compressor="mean"
    )
    q, k, v = torch.randn(3, 1, heads, 1, head_dim).unbind(0)
    many = torch.randn(1, heads, schedule.reach + schedule.segment, head_dim)
    reference.append(many, many)
    cat = CatLoop(heads, slots, head_dim, torch.float32)
    candidates = {
        "ctx step": lambda: memory.step(q, k, v),
        "reference": lambda: reference.step(q, k, v),
        "cat + SDPA": lambda: cat.step(q, k, v),
    }
    times = interleave(candidates, args.repeat, multiple=schedule.segment)
    for name, timing in times.items():
        report.row(shape="8 heads, D 64, float32", slots=cat.slots, what=name, time=timing)
    ours = times["ctx step"].median
    at = f"{cat.slots} slots, 8 heads, D 64, step, times as fast as"
    report.at_least("2", f"{at} ctx.reference", times["reference"].median / ours, 10.0)
    report.at_least("2", f"{at} cat + SDPA", times["cat + SDPA"].median / ours, 3.0)


def _int8(report: Report, args: Any) -> None:
    """The compressed region alone, the same slots as float32, bfloat16 and int8.

    Also in a region that stays in the caches: where int8 is no faster there, either, arithmetic is
    the limit and not the bytes.
    """
    for kv_heads in (32, 8):
        group = "MHA" if kv_heads == 32 else "GQA-4"
        for cached, mib in ((True, min(4, args.mib)), (False, args.mib)):
            slots = max(64, mib * MIB // (2 * kv_heads * HEAD_DIM * 2))
            memories = _compressed_memories(slots, kv_heads)
            q = torch.randn(1, 32, 1, HEAD_DIM)
            exact, narrow = (memories[name].attend(q) for name in ("float32", "float32 with int8"))
            low = q.bfloat16()
            times = interleave(
                {
                    f"ctx attend, {name} slots": lambda m=memories[name], q=low: m.attend(q)
                    for name in ("bfloat16", "int8")
                },
                args.repeat,
            )
            for name, timing in times.items():
                numbers = 2 * slots * kv_heads * HEAD_DIM / timing.median / 1e9
                report.row(
                    shape=f"{group}, CMem alone",
                    slots=slots,
                    MiB=mib,
                    what=name,
                    time=timing,
                    **{"10^9 numbers/s": numbers},
                )
            wide, fast = (timing.median for timing in times.values())
            what = f"{group}, CMem alone, {mib} MiB, int8 times as fast as bfloat16"
            if cached:
                report.note(f"{what}, in the caches: {wide / fast:.2f}")
                continue
            report.at_least("6", what, wide / fast, 1.6)
            error = ((narrow - exact).norm() / exact.norm()).item()
            what = f"{group}, relative error of int8 slots in a float32 memory"
            report.at_most("6", what, error, 1e-2)


def _compressed_memories(slots: int, kv_heads: int) -> dict[str, ctx.KVMemory]:
    """The same random slots, and no window, as each of the storages."""
    schedule = ctx.Schedule(0, slots, RATIO)
    memories = {
        name: full_memory(schedule, kv_heads, HEAD_DIM, dtype=pairs, compressed_dtype=stored)
        for name, pairs, stored in (
            ("float32", torch.float32, None),
            ("bfloat16", torch.bfloat16, None),
            ("int8", torch.bfloat16, torch.int8),
            ("float32 with int8", torch.float32, torch.int8),
        )
    }
    held = memories["float32"].tensors
    for name in ("bfloat16", "int8", "float32 with int8"):
        for part, tensor in memories[name].tensors.items():
            tensor.copy_(as_int8(held[part]) if tensor.dtype == torch.int8 else held[part])
    return memories


def _draw(figure: Any, report: Report) -> None:
    shapes = [f"{shape.name} {shape.dtype}" for shape in SHAPES]
    for axes, shape in zip(figure.subplots(2, 2).flat, shapes, strict=True):
        rows = [row for row in report.rows if row["shape"] == shape]
        bars(axes, [row["what"] for row in rows], [row["GB/s"] for row in rows], "GB/s")
        axes.set_title(f"{shape}, {rows[0]['MiB']:.0f} MiB", fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
