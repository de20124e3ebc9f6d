"""On a GPU: how near are steps to the device's bandwidth, and how fast are calls and a whole model?

A step of one layer in a CUDA graph against the device's own copy, in the same turns; kernels per
step; a segment of 2,048 queries over 4,096 pairs, forward and backward, against torch's attention;
a model of SmolLM2-135M's shape, token by token, eager and in a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ctx
from benchmarks._device import captured, clock_of, describe_device, launches
from benchmarks._harness import Timing, arguments, interleave, start
from benchmarks._memories import full_memory, visible
from benchmarks._report import Report, bars
from benchmarks._segment import Segment
from benchmarks.bandwidth import SMOLLM2, tokens_per_second

__all__ = ["main"]

MB = 1_000_000
RATIO, HEAD_DIM = 4, 128


class Shape(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    dtype: torch.dtype


SHAPES = [
    Shape("bf16, 32 heads over 8", 32, 8, torch.bfloat16),
    Shape("float32, 8 heads", 8, 8, torch.float32),
]
# Of pairs, in MB, and the share of the copy's bandwidth that a step should reach there.
SIZES = {4: None, 128: 0.6, 512: 0.9}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.cuda", str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this program")
    parser.add_argument("--dry-run", action="store_true", dest="quick", help="the same as --quick")
    args = start(parser, argv)
    args.device = str(torch.empty(0, device=args.device).device)
    report = Report("cuda", args)
    device = torch.device(args.device)
    report.machine["device"] = describe_device(device)
    print(report.machine["device"])
    with torch.inference_mode():
        for shape in SHAPES:
            for size in (4,) if args.quick else SIZES:
                _decode(report, shape, size, device)
        _count(report, device)
    _model(report, device)
    _segment(report, device)
    return report.finish(_draw)


def _times(report: Report, candidates: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
    device = torch.device(report.args.device)
    least = 1e-3 if report.args.quick else 0.02
    return interleave(candidates, report.args.repeat, least=least, clock=clock_of(device))


def _decode(report: Report, shape: Shape, size: int, device: torch.device) -> None:
    """A step of one layer, over rows of at most 4,096 slots."""
    quick, dtype = report.args.quick, shape.dtype
    pair = 2 * shape.kv_heads * HEAD_DIM * dtype.itemsize
    slots = size * MB // pair
    batch = max(1, slots // 4096)
    batch, slots = (2, 64) if quick else (batch, slots // batch)
    schedule = ctx.Schedule(slots // 2, slots // 2, RATIO)
    options = {"dtype": dtype, "device": device, "batch": batch, "compressor": "mean"}
    memory = full_memory(schedule, shape.kv_heads, HEAD_DIM, **options)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(batch, n, 1, HEAD_DIM, device=device).to(dtype) for n in heads)
    seen = int(memory.seen[0])

    def period() -> None:
        for _ in range(RATIO):
            memory.step(q, k, v)

    # Of the tokens of a segment, on average.
    shown = sum(visible(schedule, seen + t) for t in range(RATIO)) / RATIO
    read = batch * shown * pair
    keys, values = (
        torch.randn(batch, shape.kv_heads, int(shown), HEAD_DIM, device=device).to(dtype)
        for _ in range(2)
    )
    grouped = shape.heads != shape.kv_heads
    source = torch.randn((1 if quick else 128) * MB, device=device)  # 512 MB
    target = torch.empty_like(source)
    step, attention = (
        captured(call, device)
        for call in (
            period,
            lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped),
        )
    )
    candidates: dict[str, Callable[[], Any]] = {
        "ctx step, graph": step,
        "ctx step, eager": period,
        "sdpa alone, graph": attention,
        "copy": lambda: target.copy_(source),
    }
    times = _times(report, candidates)
    moved = dict.fromkeys(candidates, read) | {"copy": 2 * source.nbytes}
    calls = {name: RATIO if name.startswith("ctx") else 1 for name in candidates}
    speeds = {}
    for name, timing in times.items():
        once = Timing(tuple(seconds / calls[name] for seconds in timing.samples))
        speeds[name] = moved[name] / once.median / 1e9
        where = {"shape": shape.name, "MB": read / MB, "rows": batch}
        report.row(**where, what=name, time=once, **{"GB/s": speeds[name]})
    what, least = f"{shape.name}, {size} MB of pairs, a step in a graph", SIZES[size]
    if least is None:
        micros = 1e6 * times["ctx step, graph"].median / RATIO
        report.at_most("5", f"{what}, µs", micros, 15.0)
    else:
        share = speeds["ctx step, graph"] / speeds["copy"]
        report.at_least("5", f"{what}, share of the copy's bandwidth", share, least)


def _count(report: Report, device: torch.device) -> None:
    """Kernels of one token's step."""
    shape, dtype = SHAPES[0], SHAPES[0].dtype
    schedule = ctx.Schedule(64, 64, RATIO)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(1, n, 1, HEAD_DIM, device=device).to(dtype) for n in heads)
    for compressor in ("mean", "conv", "most_used"):
        options = {"dtype": dtype, "device": device, "compressor": compressor}
        memory = full_memory(schedule, shape.kv_heads, HEAD_DIM, **options)
        count = launches(lambda m=memory: m.step(q, k, v), device)
        report.row(shape=shape.name, what=f"ctx step, {compressor}", kernels=count)
        if compressor != "most_used":
            report.at_most("3", f"kernels of a layer's step and its call, {compressor}", count, 5)


def _segment(report: Report, device: torch.device) -> None:
    """Per pair that a query sees, forward alone and with the backward."""
    size, heads = (32, 2) if report.args.quick else (2048, 16)
    for dtype in (torch.bfloat16, torch.float32):
        made = Segment(size, heads=heads, head_dim=HEAD_DIM, dtype=dtype, device=device)
        with torch.inference_mode():
            _compare(report, made.forwards(), f"forward {str(dtype)[6:]}", size)
        steps = made.requires_grad().steps()
        _compare(report, steps, f"forward and backward {str(dtype)[6:]}", size)


def _compare(report: Report, candidates: Any, what: str, size: int) -> None:
    times = _times(report, {name: call for name, (call, _) in candidates.items()})
    each = {name: times[name].median / pairs for name, (_, pairs) in candidates.items()}
    for name, timing in times.items():
        report.row(shape=f"{what}, {size} × {3 * size}", what=name, time=timing)
    for name in ("sdpa, no mask", "sdpa, mask"):
        report.at_most("5", f"{what}, time per pair / {name}", each["ctx"] / each[name], 2.0)


def _model(report: Report, device: torch.device) -> None:
    """Tokens per second of all streams together, and what the copy's bandwidth would allow."""
    quick, s = report.args.quick, SMOLLM2
    config = ctx.CompressiveTransformerConfig(
        vocab_size=256 if quick else 49152,
        embed_dim=9 * s.head_dim // (8 if quick else 1),
        num_layers=2 if quick else s.layers,
        num_heads=9,
        num_kv_heads=s.kv_heads,
        mlp_dim=96 if quick else 1536,
        window=16 if quick else s.window,
        compressed=16 if quick else s.compressed,
        ratio=s.ratio,
    )
    with torch.device(device):
        model = ctx.CompressiveTransformer(config).to(torch.bfloat16).eval()
    copy = max((row["GB/s"] for row in report.rows if row.get("what") == "copy"), default=0.0)
    for batch in (1, 2) if quick else (1, 16, 256):
        step = _model_step(model, batch, device)
        with torch.no_grad():
            graph = captured(step, device)
            times = _times(report, {"eager": step, "graph": graph})
        for name, timing in times.items():
            speed = batch / timing.median
            row = {"shape": "SmolLM2-135M", "rows": batch, "what": f"ctx model, {name}"}
            share = speed / tokens_per_second(s, copy, batch)
            report.row(**row, time=timing, **{"tokens/s": speed, "share of the bound": share})
    with torch.no_grad():
        count = launches(_model_step(model, 1, device), device)
    report.row(shape="SmolLM2-135M", what="ctx model, one token", kernels=count)


def _model_step(
    model: ctx.CompressiveTransformer, batch: int, device: torch.device
) -> Callable[[], Tensor]:
    memory = model.init_memory(batch)
    for ring in memory.rings:
        for part in filter(Tensor.is_floating_point, ring):
            part.normal_()
    memory.seen.fill_(4 * model.schedule.reach)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def step() -> Tensor:
        logits: Tensor = model(token, memory)[0]
        return logits

    return step


def _draw(figure: Any, report: Report) -> None:
    for axes, shape in zip(figure.subplots(1, 2).flat, SHAPES, strict=True):
        rows = [row for row in report.rows if row["shape"] == shape.name and "GB/s" in row]
        names = [f"{row['what']}, {row['MB']:.0f} MB" for row in rows]
        bars(axes, names, [row["GB/s"] for row in rows], "GB/s")
        axes.set_title(shape.name, fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
