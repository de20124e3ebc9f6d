"""Gradients: 512 queries over 1,536 slots, backward and both ways, against torch's own attention.

Torch's attention differentiates with respect to all keys and values, ours to those that are not
constant; both are counted by the pairs of the forward pass. See `benchmarks.prefill` for the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks._harness import arguments, start
from benchmarks._report import Report
from benchmarks._segment import Segment
from benchmarks.prefill import DTYPES, compare, compare_peaks, draw

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    args = start(arguments("benchmarks.train", str(__doc__).splitlines()[0]), argv)
    size = 32 if args.quick else 512
    report = Report("train", args)
    for dtype in DTYPES:
        segment, name = Segment(size, dtype=dtype).requires_grad(), str(dtype)[6:]
        compare(report, segment.backwards(), f"backward {name}", 1.25, 3 * size)
        both = {
            who: (_there_and_back(forward, segment.grad), pairs)
            for who, (forward, pairs) in segment.forwards().items()
        }
        compare(report, both, f"forward and backward {name}", None, 3 * size)
    compare_peaks(report, size, backward=True)
    return report.finish(draw)


def _there_and_back(forward: Callable[[], Tensor], grad: Tensor) -> Callable[[], None]:
    return lambda: torch.autograd.backward(forward(), grad)


if __name__ == "__main__":
    sys.exit(main())
