"""What an interrupted call leaves of a memory that it streams into: a call happened or it did not.

Layers are written one after the other, so an exception or Ctrl-C between two of them leaves some a
call ahead of the others. What the rings still hold is taken back; otherwise the memory is marked,
so that the next call refuses it by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MARK", "check", "check_in_step", "take_back"]

#: What ``rewindable`` is in a memory that could not be taken back; no call ends with such a value.
MARK = -1


def check(memory: Sequence[Any], device: torch.device, where: str) -> None:
    """Raises for a memory that :func:`take_back` marked; a device is never waited for."""
    first = memory[0]
    if device.type != "cpu" or not isinstance(first, dict):
        return
    spare = first.get("rewindable")
    if isinstance(spare, Tensor) and spare.device.type == "cpu" and MARK in spare.tolist():
        raise ValueError(
            f"{where}: memory must be what a call left that ended, got one that was being written "
            "when its call was interrupted: go back to a copy"
        )


def check_in_step(memory: Sequence[dict[str, Tensor]], device: torch.device, where: str) -> None:
    """Raises where layers have not seen the same tokens; a device is never waited for."""
    if device.type != "cpu":
        return
    first = memory[0]["seen"].tolist()
    for i, layer in enumerate(memory):
        seen = layer["seen"].tolist()
        if seen != first:
            raise ValueError(
                f"{where}: memory must have seen the same tokens in every layer, got {first} in "
                f"layer 0 and {seen} in layer {i}, as an interrupted call leaves it: go back to a "
                "copy, or take back what is too much with ctx.rows.rewind"
            )


def take_back(
    memory: Sequence[dict[str, Tensor]],
    before: Tensor,  # int64 [B]
    tokens: int,
    lengths: Tensor | None,  # int64 [B]
    reset_at: Tensor | None,  # bool [B, T]
) -> None:
    """Undoes, in place, what a call of `tokens` tokens per row wrote, or marks the memory.

    Args:
        memory: of every layer, each as it was before the call or as it is after it.
        before: `seen` of all layers before the call.
        tokens: T.
        lengths, reset_at: as the call was given them, padding on the right.
    """
    written = [layer["seen"] - before for layer in memory]
    resets = reset_at is not None and bool(reset_at.any())
    if not any(bool(count.any()) for count in written):
        if not resets:
            return
        # A row that begins anew may end at the count that it had: only then nothing can be told.
        assert reset_at is not None
        ends = _ends(before, tokens, lengths, reset_at)
        if bool((ends != before).any()):
            return
    exact = not resets and all(
        not layer["attention_received"].shape[2] and bool((count <= layer["rewindable"]).all())
        for layer, count in zip(memory, written, strict=True)
    )
    with torch.inference_mode():  # a memory may have been made there
        for layer, count in zip(memory, written, strict=True):
            if exact:
                layer["seen"].sub_(count)
                layer["rewindable"].sub_(count)
            else:
                layer["rewindable"].fill_(MARK)


def _ends(before: Tensor, tokens: int, lengths: Tensor | None, reset_at: Tensor) -> Tensor:
    """`seen` after the call, int64 [B]."""
    if lengths is None:
        lengths = torch.full_like(before, tokens)
    place = torch.arange(tokens, device=before.device)
    begins = torch.where(reset_at & (place < lengths[:, None]), place, -1).amax(1)
    return torch.where(begins < 0, before + lengths, lengths - begins)
