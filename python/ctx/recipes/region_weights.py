"""The attention that each layer of a model gives to sinks, compressed slots and window."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ctx.memory import Memory
from ctx.recipes.evaluation import side_by_side
from ctx.transformer import CompressiveTransformer

__all__ = ["region_weights", "region_weights_table"]


def region_weights(
    model: CompressiveTransformer,
    text: Tensor,  # uint8 [N]
    advance: Callable[[int], None],
) -> Tensor:
    """Averages over all tokens of a text and all query heads, float64 [layers, 3].

    The text is streamed as `ctx.recipes.evaluation.stream` does it; `advance` is told the number of
    bytes read.
    """
    segment = max(schedule.segment for schedule in model.schedules)
    lines = side_by_side(text, segment + max(schedule.reach for schedule in model.schedules))
    was_training = model.training
    model.eval()
    total = torch.zeros(len(model.layers), 3, dtype=torch.float64)
    memory: Memory | None = None
    with torch.inference_mode():
        for start in range(0, lines.shape[1], segment):
            if memory is None:
                memory = model.init_memory(len(lines))
            chunk = lines[:, start : start + segment].long()
            _, memory, weights = model(chunk, memory, return_region_weights=True)
            total += weights.double().mean(2).sum((1, 2)).cpu()  # [layers, B, H, T, 3]
            advance(chunk.numel())
    model.train(was_training)
    return total / lines.numel()


def region_weights_table(found: Tensor) -> str:
    """The shares as lines of text, a line per layer."""
    lines = ["share of attention  sinks  compressed  window"]
    lines.append("-" * len(lines[0]))
    for layer, (sinks, compressed, window) in enumerate(found.tolist()):
        lines.append(f"{f'layer {layer}':18}  {sinks:5.3f}  {compressed:10.3f}  {window:6.3f}")
    return "\n".join(lines)
