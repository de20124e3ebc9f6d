"""Peers of one layer: torch's own attention over the same slots, and the cat-per-token loop."""

from __future__ import annotations

import torch

import ctx
from benchmarks._harness import interleave
from benchmarks._memories import CatLoop, full_memory, sdpa_ways
from benchmarks._report import Report

__all__ = ["TITLE", "measure"]

TITLE = "one layer, one token"
RATIO = 4


@torch.inference_mode()
def measure(report: Report) -> None:
    """A decode step of one row, float32: 8 heads of 64, and 9 heads over 3 (SmolLM2-135M's)."""
    for heads, kv_heads in ((8, 8), (9, 3)):
        for slots in (32, 64) if report.args.quick else (512, 4096, 16384):
            schedule = ctx.Schedule(slots // 2 - RATIO, slots // 2, RATIO)
            memory = full_memory(schedule, kv_heads, 64, compressor="mean")
            q = torch.randn(1, heads, 1, 64)
            k, v = torch.randn(2, 1, kv_heads, 1, 64).unbind(0)
            cat = CatLoop(kv_heads, slots, 64, torch.float32)
            ways = sdpa_ways(q, *torch.randn(2, 1, kv_heads, slots, 64).unbind(0))
            times = interleave(
                {
                    "ctx step": lambda m=memory, t=(q, k, v): m.step(*t),
                    "cat + SDPA": lambda c=cat, t=(q, k, v): c.step(*t),
                    **{f"{name} alone": way for name, way in ways.items()},
                },
                report.args.repeat,
                multiple=RATIO,
            )
            for name, timing in times.items():
                report.row(
                    peer=TITLE,
                    what=f"{heads} heads over {kv_heads}, {slots} slots",
                    who=name,
                    time=timing,
                    **{"ctx is faster by": timing.median / times["ctx step"].median},
                )
