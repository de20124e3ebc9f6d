"""What test_combinations.py has found to agree, and how it is printed."""

from __future__ import annotations

import itertools

import torch

DISTANCES = ["slot", "token"]
SHARES = [1, 2]  # query heads per key/value head
NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
COLUMNS = [*NAMES.values(), "grad"]

# (compressor, position, distance, share, dtype or "grad") of what passed.
COVERED: set[tuple[str, str | None, str, int, str]] = set()


def position_name(position: str | None) -> str:
    """How a scheme is called in a table."""
    return position or "none"


def table() -> list[str]:
    """A line per compressor and distance, a column per position scheme; a dtype, or "grad" for
    gradients, stands there if it passed for every number of shared heads.
    """
    found = {entry[:2] for entry in COVERED}
    compressors = sorted({compressor for compressor, _ in found})
    positions = sorted({position for _, position in found}, key=lambda p: (p is None, p))
    width = len(" ".join(COLUMNS))
    head = f"{'':17}" + "  ".join(position_name(p).ljust(width) for p in positions)
    lines = [head.rstrip()]
    for compressor, distance in itertools.product(compressors, DISTANCES):
        cells = []
        for position in positions:
            key = compressor, position, distance
            passed = [
                column
                if all((*key, share, column) in COVERED for share in SHARES)
                else "-" * len(column)
                for column in COLUMNS
            ]
            cells.append(" ".join(passed))
        lines.append(f"{compressor:10} {distance:5} " + "  ".join(cells))
    lines.append(f"each with H = {' and '.join(f'{share} Hkv' for share in SHARES)}")
    return lines
