"""Tensors that follow from settings alone.

They are made when they are needed and are no part of a module's state: whatever way a module is
built, cast, copied or loaded, they are those of its settings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctx.positions import slopes

__all__ = ["log_ratio", "slopes_of"]

_MADE: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}


def log_ratio(ratio: int, num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bias of slots that stand for `ratio` tokens each, [H]; shared, not to be written to."""
    return _constant((math.log(ratio),) * num_heads, dtype, device)


def slopes_of(num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """ALiBi's slopes, [H] (:func:`ctx.positions.alibi_slopes`); shared, not to be written to."""
    return _constant(tuple(slopes(num_heads)), dtype, device)


def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():  # a part of the graph, not of this process
        return torch.tensor(values, dtype=dtype, device=device)
    made = _MADE.get((values, dtype, device))
    if made is None:
        with torch.inference_mode(False):  # or it would be of no use under grad
            made = torch.tensor(values, dtype=dtype, device=device)
        if type(made) is Tensor:  # not one of a tracer's
            _MADE[values, dtype, device] = made
    return made
