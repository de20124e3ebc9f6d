"""Bits per byte of a text that is streamed through a model, and of what its memories are worth."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx.memory import Memory
from ctx.recipes.data import unigram_entropy
from ctx.recipes.errors import RecipeError
from ctx.transformer import CompressiveTransformer

__all__ = ["Result", "evaluate", "side_by_side", "stream", "table"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table; the memory's bytes are those of one stream, the reach is that of the
    layer that reaches furthest."""

    name: str
    bits_per_byte: float
    tokens_per_second: float
    memory_bytes: int
    reach: int


def evaluate(
    model: CompressiveTransformer, text: Tensor, advance: Callable[[int], None]
) -> list[Result]:
    """The same weights with both memories, without CMem, and with none between segments.

    `advance` is told the number of bytes read, three times the text in all.
    """
    segment_only = model.with_memory(window=0, compressed=0)
    return [
        stream("both memories", model, text, advance),
        stream("CMem off", model.with_memory(compressed=0), text, advance),
        stream("empty memory at every segment", segment_only, text, advance, forget=True),
    ]


def stream(
    name: str,
    model: CompressiveTransformer,
    text: Tensor,  # uint8 [N]
    advance: Callable[[int], None],
    *,
    forget: bool = False,
) -> Result:
    """Streams a text through a model in inference mode, a segment (the longest of its layers) per
    call.

    A long text is read in up to 16 rows side by side, each many times longer than the reach, so
    that starting with an empty memory does not show. `forget` empties the memory at every segment.
    """
    if len(text) < 2:
        raise RecipeError(f"the text must have at least 2 bytes, got {len(text)}")
    segment = max(schedule.segment for schedule in model.schedules)
    reach = max(schedule.reach for schedule in model.schedules)
    lines = side_by_side(text, reach + segment)
    rows, size = lines.shape
    was_training = model.training
    model.eval()
    bits, memory_bytes = 0.0, 0
    memory: Memory | None = None
    began = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, size - 1, segment):
            both = lines[:, start : start + segment + 1].long()
            if memory is None or forget:
                memory = model.init_memory(rows)
            logits, memory = model(both[:, :-1], memory)
            loss = F.cross_entropy(logits.flatten(0, 1), both[:, 1:].flatten(), reduction="sum")
            bits += loss.item() / math.log(2)
            advance(both.numel() - rows)
        memory_bytes = 0 if memory is None else memory.nbytes
    took = time.perf_counter() - began
    model.train(was_training)
    tokens = rows * (size - 1)
    return Result(name, bits / tokens, tokens / took, memory_bytes // rows, reach)


def side_by_side(text: Tensor, reach: int) -> Tensor:
    """A text [N] as up to 16 rows, each many times longer than the reach: [rows, N // rows]."""
    rows = max(1, min(16, len(text) // (16 * reach)))
    size = len(text) // rows
    return text[: rows * size].view(rows, size)


def table(results: Sequence[Result], text: Tensor, of: str = "same weights, streamed") -> str:
    """The results as lines of text, aligned, with the text's own entropy for comparison.

    Args:
        results: a line each.
        text: the one that was streamed.
        of: what the lines have in common.
    """
    head = (of, "bits/byte", "tokens/s", "memory/stream", "reach")
    lines = [
        (
            result.name,
            f"{result.bits_per_byte:.4f}",
            f"{result.tokens_per_second:,.0f}",
            f"{result.memory_bytes / 1024:,.0f} KiB",
            f"{result.reach:,} tokens",
        )
        for result in results
    ]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    printed = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in (head, *lines)
    ]
    printed.insert(1, "-" * len(printed[0]))
    printed.append(f"{len(text):,} bytes of text; byte-unigram entropy {unigram_entropy(text):.4f}")
    return "\n".join(printed)
