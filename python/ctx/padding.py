"""Padded batches: from any mask to rows whose padding stands on the right, and back.

The engine takes right-padded rows and their lengths. Batches of generation are often padded on the
left; these two functions move the tokens, so that padding never enters a memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctx import _check

__all__ = ["from_right_padded", "mask_of", "to_right_padded"]


def check_mask(
    mask: Tensor,
    batch: int,
    tokens: int,
    where: str,
    name: str = "mask",
    device: torch.device | None = None,
) -> None:
    """Raises unless the mask of that name is bool [B, T], on that device."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{where}: {name} must be a bool tensor, got {got}")
    if mask.shape != (batch, tokens):
        raise ValueError(
            f"{where}: {name} must be [B, T] = [{batch}, {tokens}], got {list(mask.shape)}"
        )
    if device is not None and mask.device != device:
        raise ValueError(f"{where}: {name} must be on {device} as the tokens, got {mask.device}")
    if mask.layout != torch.strided:
        raise ValueError(f"{where}: {name} must be a dense tensor, got {mask.layout}")


def check_rows(
    batch: int,
    tokens: int,
    lengths: Tensor | None,
    mask: Tensor | None,
    reset_at: Tensor | None,
    where: str,
    device: torch.device | None = None,
) -> None:
    """Raises unless what is said about rows of `tokens` tokens fits; reads values on the CPU
    only."""
    if lengths is not None and mask is not None:
        raise ValueError(f"{where}: lengths and mask must not both be given, got both")
    if mask is not None:
        check_mask(mask, batch, tokens, where, device=device)
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"{where}: lengths must be an int64 tensor, got {got}")
        if lengths.shape != (batch,):
            raise ValueError(f"{where}: lengths must be [B] = [{batch}], got {list(lengths.shape)}")
        if device is not None and lengths.device != device:
            raise ValueError(
                f"{where}: lengths must be on {device} as the tokens, got {lengths.device}"
            )
        if lengths.layout != torch.strided:
            raise ValueError(f"{where}: lengths must be a dense tensor, got {lengths.layout}")
        if lengths.device.type == "cpu":
            for row, length in enumerate(lengths.tolist()):
                if not 0 <= length <= tokens:
                    raise ValueError(
                        f"{where}: lengths must be between 0 and T = {tokens}, got {length} in row "
                        f"{row}"
                    )
    if reset_at is not None:
        check_mask(reset_at, batch, tokens, where, "reset_at", device)


def mask_of(lengths: Tensor, tokens: int) -> Tensor:
    """bool [B, T], true at the first ``lengths[b]`` places of row b."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def to_right_padded(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the tokens of every row to its beginning, in their order.

    Args:
        x: [B, T, ...].
        mask: bool [B, T], true at tokens, false at padding; the padding may be anywhere.

    Returns:
        ``x`` with the padding on the right, and the rows' lengths, int64 [B].

    Raises:
        TypeError, ValueError: ``x`` is not [B, T, ...], or ``mask`` not bool [B, T].
    """
    _check_padded(x, mask, "ctx.padding.to_right_padded")
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return _gather(x, order), mask.sum(1)


def from_right_padded(x: Tensor, mask: Tensor) -> Tensor:
    """The way back: [B, T, ...] with every token at its place in ``mask``, and zero at padding.

    Raises:
        TypeError, ValueError: ``x`` is not [B, T, ...], or ``mask`` not bool [B, T].
    """
    _check_padded(x, mask, "ctx.padding.from_right_padded")
    place = (mask.cumsum(1) - 1).clamp_min(0)
    padding = mask.logical_not().reshape(*mask.shape, *[1] * (x.dim() - 2))
    return _gather(x, place).masked_fill(padding, 0)


def _check_padded(x: Tensor, mask: Tensor, where: str) -> None:
    _check.tensors(where, x=x)
    if x.dim() < 2:
        raise ValueError(f"{where}: x must be [B, T, ...], got {list(x.shape)}")
    check_mask(mask, x.shape[0], x.shape[1], where, device=x.device)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))
