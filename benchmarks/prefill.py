"""Many tokens at once, forward: 512 queries over 1,536 slots against torch's own attention.

Time per visible (query, slot) pair: torch's attention may leave the mask away, and then computes
pairs that nobody asked for, which count for it; or take the mask. The faster of both is the bound.
Peak memory is measured in processes of their own, from the same parts to the same output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks._harness import arguments, interleave, start
from benchmarks._memories import full_memory
from benchmarks._peak import measure
from benchmarks._report import Report, bars
from benchmarks._segment import Segment

__all__ = ["compare", "compare_peaks", "draw", "main"]

DTYPES = (torch.float32, torch.bfloat16)


def main(argv: Sequence[str] | None = None) -> int:
    args = start(arguments("benchmarks.prefill", str(__doc__).splitlines()[0]), argv)
    size = 32 if args.quick else 512
    report = Report("prefill", args)
    with torch.inference_mode():
        for dtype in DTYPES:
            segment = Segment(size, dtype=dtype)
            candidates = segment.forwards()
            candidates["ctx, no rotary"] = (
                Segment(size, dtype=dtype, rotary=False).ours,
                segment.pairs,
            )
            memory = full_memory(
                segment.schedule, 8, 64, compressor="mean", max_rewind=size, dtype=dtype
            )
            candidates["ctx KVMemory.step"] = (
                lambda m=memory, s=segment: m.step(s.q, s.k, s.v),
                segment.pairs,
            )
            compare(report, candidates, f"forward {str(dtype)[6:]}", 1.1, 3 * size)
        compare_peaks(report, size, backward=False)
    return report.finish(draw)


def compare(report: Report, candidates: Any, what: str, bound: float | None, slots: int) -> None:
    """Times the candidates, {name: (call, pairs)}; holds "ctx" to `bound` times the best SDPA.

    Without a bound it only times them.
    """
    times = interleave({name: call for name, (call, _) in candidates.items()}, report.args.repeat)
    each = {name: times[name].median / pairs for name, (_, pairs) in candidates.items()}
    for name, timing in times.items():
        report.row(
            what=what,
            queries=slots // 3,
            slots=slots,
            who=name,
            time=timing,
            **{"ns per pair and head": 1e9 * each[name] / 8},
        )
    if bound is None:
        return
    best = min((name for name in each if name.startswith("sdpa")), key=each.__getitem__)
    report.at_most("3", f"{what}, time per pair / {best}", each["ctx"] / each[best], bound)


def compare_peaks(report: Report, size: int, backward: bool) -> None:
    """Peak memory on top of the inputs, median of a few processes."""
    batch, turns = 4, (1 if report.args.quick else 3)
    peaks: dict[str, list[int]] = {"ours": [], "theirs": []}
    for _ in range(turns):
        for which, found in peaks.items():
            found.append(measure(which, size, batch, report.args.threads, backward))
    ours, theirs = (sorted(found)[turns // 2] for found in peaks.values())
    what = "forward and backward" if backward else "forward"
    for who, peak in (("ctx", ours), ("cat + mask + sdpa", theirs)):
        report.row(
            what=f"{what}, peak, batch {batch}",
            queries=size,
            slots=3 * size,
            who=who,
            MiB=peak / (1 << 20),
        )
    report.at_most("3", f"{what}, peak memory / SDPA with a mask", ours / max(theirs, 1), 1.0)


def draw(figure: Any, report: Report) -> None:
    label = "ns per pair and head"
    whats = list(dict.fromkeys(row["what"] for row in report.rows))
    for axes, what in zip(figure.subplots(len(whats), 1), whats, strict=True):
        rows = [row for row in report.rows if row["what"] == what]
        unit = label if label in rows[0] else "MiB"
        bars(axes, [row["who"] for row in rows], [row[unit] for row in rows], unit)
        axes.set_title(what, fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
