"""Peak memory of one segment, in a process of its own: `python -m benchmarks._peak ours 512 4 1`.

Prints the bytes that became resident on top of the inputs. Large blocks are asked to go back to the
system at once (glibc's MALLOC_MMAP_THRESHOLD_), so what is resident is what is in use.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks._harness import ROOT
from benchmarks._machine import peak_rss, reset_peak, rss
from benchmarks._segment import Segment

__all__ = ["measure"]


def measure(which: str, size: int, batch: int, threads: int, backward: bool) -> int:
    """Bytes at the peak of "ours" or "theirs", forward and, if asked, backward."""
    command = [sys.executable, "-m", "benchmarks._peak", which]
    command += [str(size), str(batch), str(threads), str(int(backward))]
    paths = [str(ROOT), *sys.path]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def _run(segment: Segment, which: str, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = segment.ours() if which == "ours" else segment.theirs()
        if backward:
            out.backward(segment.grad)


def _main(which: str, size: str, batch: str, threads: str, backward: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(threads))
    needs = bool(int(backward))
    small, real = Segment(16), Segment(int(size), batch=int(batch))
    if needs:
        small.requires_grad(), real.requires_grad()
    _run(small, which, needs)  # libraries and threads have been loaded
    before = rss()
    reset_peak()
    _run(real, which, needs)
    print(max(0, peak_rss() - before))


if __name__ == "__main__":
    _main(*sys.argv[1:])
