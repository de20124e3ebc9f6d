"""Operators by the emulated CUDA kernels against the same operators by the CPU's.

    python tests/cuda_emulator/operators.py LIBRARY [cases] [first case]

The cases of tests/device_cases.py run on the CPU's kernels first; then the library takes their
place, and they run again.
"""

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_cases import asked_cases, failures_of


def main():
    library, *asked = sys.argv[1:]
    cases = asked_cases(asked)
    want = [case.run() for case in cases]
    ctypes.CDLL(library)
    return failures_of("operators", cases, want) > 0


if __name__ == "__main__":
    sys.exit(main())
