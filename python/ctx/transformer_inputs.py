"""What a model's call may be given, checked before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctx import memory_check
from ctx.padding import check_rows

if TYPE_CHECKING:
    from ctx.transformer import CompressiveTransformer

__all__ = ["check"]


def check(
    model: CompressiveTransformer,
    tokens: Any,
    memory: Any,
    where: str,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset_at: Tensor | None = None,
) -> None:
    """Raises unless the arguments fit the model: everything about every layer."""
    spec, vocab_size = model.spec, model.config.vocab_size
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{where}: tokens must be a tensor, got {type(tokens).__name__}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"{where}: tokens must be int64, got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"{where}: tokens must be [B, T], got {list(tokens.shape)}")
    if tokens.shape[0] < 1:
        raise ValueError(
            f"{where}: tokens must have at least one row, got B = 0 in {list(tokens.shape)}"
        )
    if memory is not None:
        memory_check.kind(memory, spec, where)
    if torch.compiler.is_compiling():  # the rest reads values, or is not for a graph
        return
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = map(int, tokens.aminmax())
        if low < 0 or high >= vocab_size:
            got = low if low < 0 else high
            raise IndexError(f"{where}: tokens must be in [0, {vocab_size}), got {got}")
    device = _device(model)
    if device is not None and device.type != "meta" and tokens.device != device:
        raise ValueError(
            f"{where}: tokens must be on {device} as the parameters, got {tokens.device}"
        )
    check_rows(tokens.shape[0], tokens.shape[1], lengths, mask, reset_at, where, tokens.device)
    if memory is not None:
        memory_check.call(memory, spec, tokens.shape[0], tokens.device, where, "tokens")


def _device(module: nn.Module) -> torch.device | None:
    """Where a module computes, as far as its first parameter or buffer tells.

    A shard does not: it may be kept elsewhere between calls.
    """
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return None if hasattr(type(tensor), "__tensor_flatten__") else tensor.device
    return None
