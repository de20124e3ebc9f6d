"""What a stream costs, and how many tokens per second a device's bandwidth allows: a calculation.

A step of B streams reads every weight once, and of each stream all that its query sees. No device
can be faster than its bandwidth allows for that; prints the table of docs/cuda.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from benchmarks._report import table

__all__ = ["DEVICES", "SMOLLM2", "Model", "main", "rows", "tokens_per_second"]

# 10^9 bytes per second that the makers publish.
DEVICES = {"H200 SXM": 4800, "H100 SXM": 3350, "A100 80 GB SXM": 2039, "RTX 4090": 1008}


@dataclass(frozen=True)
class Model:
    """Sizes of a model and its memory, the names as in ctx.CompressiveTransformerConfig.

    Args:
        parameters: how many numbers are read per step, whatever the batch.
        itemsize: bytes of a number of weights and pairs.
        int8_slots: compressed slots are int8 with a float32 scale for each key and value.
        overlap: tokens left of a group that the compressor reads; 0 for most.
    """

    layers: int
    kv_heads: int
    head_dim: int
    parameters: int
    window: int
    compressed: int
    ratio: int
    segment: int
    sinks: int = 0
    overlap: int = 0
    max_rewind: int = 64
    itemsize: int = 2
    int8_slots: bool = False

    @property
    def pair(self) -> int:
        """Bytes of a token's key and value, of one layer."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize

    @property
    def slot(self) -> int:
        """Bytes of a compressed slot, of one layer."""
        return 2 * self.kv_heads * (self.head_dim + 4) if self.int8_slots else self.pair

    @property
    def stream(self) -> int:
        """Bytes that the memory of one stream takes, spare entries and the clock included."""
        longest = self.window + self.segment + self.ratio - 1
        window = longest + self.overlap + self.max_rewind
        calls = -(-(self.max_rewind - 1) // self.segment) * self.segment
        spare = -(-calls // self.ratio)
        slots = self.compressed + spare if self.compressed else 0
        return self.layers * ((window + self.sinks) * self.pair + slots * self.slot) + 2 * 8

    @property
    def read(self) -> int:
        """Bytes of a stream that a token's query reads once everything is full, at the least."""
        exact, slots = self.sinks + self.window + 1, self.compressed
        return self.layers * (exact * self.pair + slots * self.slot)

    @property
    def weights(self) -> int:
        return self.parameters * self.itemsize


def tokens_per_second(model: Model, bandwidth: float, batch: int) -> float:
    """At most, of all streams together, at `bandwidth` in 10^9 bytes per second."""
    return batch * bandwidth * 1e9 / (model.weights + batch * model.read)


# SmolLM2-135M over 512 exact tokens and 512 slots of 4.
SMOLLM2 = Model(
    layers=30,
    kv_heads=3,
    head_dim=64,
    parameters=134_515_008,
    window=512,
    compressed=512,
    ratio=4,
    segment=4,
)


def rows(model: Model = SMOLLM2) -> list[dict[str, str]]:
    """A row for each device, and slots as pairs are or in int8."""
    made = []
    for device, bandwidth in DEVICES.items():
        for int8 in (False, True):
            kind = replace(model, int8_slots=int8)
            row = {"device": device, "GB/s": f"{bandwidth:,}", "slots": "int8" if int8 else "bf16"}
            row["MB per stream"] = f"{kind.stream / 1e6:.1f}"
            row["MB read per token"] = f"{kind.read / 1e6:.1f}"
            for batch in (1, 16, 256):
                speed = tokens_per_second(kind, bandwidth, batch)
                row[f"tokens/s, batch {batch}"] = f"{speed:,.0f}"
            made.append(row)
    return made


def main() -> int:
    print(table(rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
