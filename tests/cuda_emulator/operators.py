"""Operators by the emulated CUDA kernels against the same operators by the CPU's.

    python tests/cuda_emulator/operators.py LIBRARY [cases] [first case]

The cases of tests/device_cases.py run on the CPU's kernels first; then the library takes their
place, and they run again.
"""

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_cases import Case, differences


def main():
    library, *asked = sys.argv[1:]
    count, first = (int(x) for x in [*asked, *("40", "0")[len(asked) :]])
    cases = [Case(seed) for seed in range(first, first + count)]
    want = [case.run() for case in cases]
    ctypes.CDLL(library)
    failures = 0
    for case, expected in zip(cases, want, strict=True):
        try:
            wrong = differences(case, expected, case.run())
        except Exception as error:  # one case must not hide the others
            wrong = [repr(error)]
        failures += bool(wrong)
        if wrong:
            print(case, *wrong, sep="\n  ")
    print(f"operators: {count} cases, {failures} failures")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
