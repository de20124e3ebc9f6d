"""Padded batches: from any mask to rows whose padding stands on the right, and back.

The engine takes right-padded rows and their lengths. Batches of generation are often padded on the
left; what is here moves the tokens, so that padding never enters a memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctx import _check

__all__ = ["from_right_padded", "mask_of", "to_right_padded"]


def _check_tensor(
    x: Any,
    name: str,
    dtype: torch.dtype,
    sizes: dict[str, int],
    where: str,
    device: torch.device | None,
) -> None:
    """Raises unless it is a tensor of that dtype and of these sizes, on that device."""
    if not isinstance(x, Tensor) or x.dtype != dtype:
        kind = "a bool" if dtype == torch.bool else "an int64"
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: {name} must be {kind} tensor, got {got}")
    if x.shape != (*sizes.values(),):
        want = f"[{', '.join(sizes)}] = {[*sizes.values()]}"
        raise ValueError(f"{where}: {name} must be {want}, got {list(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{where}: {name} must be on {device} as the tokens, got {x.device}")
    if x.layout != torch.strided:
        raise ValueError(f"{where}: {name} must be a dense tensor, got {x.layout}")


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
    rows = {"B": batch, "T": tokens}
    if mask is not None:
        _check_tensor(mask, "mask", torch.bool, rows, where, device)
    if lengths is not None:
        _check_tensor(lengths, "lengths", torch.int64, {"B": batch}, where, device)
        if lengths.device.type == "cpu":
            for row, length in enumerate(lengths.tolist()):
                if not 0 <= length <= tokens:
                    raise ValueError(
                        f"{where}: lengths must be between 0 and T = {tokens}, got {length} in row "
                        f"{row}"
                    )
    if reset_at is not None:
        _check_tensor(reset_at, "reset_at", torch.bool, rows, where, device)


def moved(
    x: Tensor, mask: Tensor | None, lengths: Tensor | None, reset_at: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [B, T, ...], lengths and `reset_at` with the padding of `mask`, if any, on the right."""
    if mask is None:
        return x, lengths, reset_at
    if reset_at is not None:
        reset_at, _ = to_right_padded(reset_at, mask)
    return *to_right_padded(x, mask), reset_at


def moved_back(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """x [B, T, ...] of right-padded rows with every token at its place in `mask`, if any, and zero
    at padding.
    """
    if mask is not None:
        return from_right_padded(x, mask)
    return x if lengths is None else blanked(x, lengths)


def weights_moved_back(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Region weights [B, H, T, 3], likewise; they are zero at padding."""
    if mask is None:
        return weights
    return from_right_padded(weights.transpose(1, 2), mask).transpose(1, 2)


def mask_of(lengths: Tensor, tokens: int) -> Tensor:
    """bool [B, T], true at the first ``lengths[b]`` places of row b."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def blanked(x: Tensor, lengths: Tensor) -> Tensor:
    """x [B, T, E] with zero behind the first ``lengths[b]`` places of row b."""
    return x.masked_fill(mask_of(lengths, x.shape[1]).logical_not().unsqueeze(-1), 0.0)


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
    rows = {"B": x.shape[0], "T": x.shape[1]}
    _check_tensor(mask, "mask", torch.bool, rows, where, x.device)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))
