"""One call of a model: where its tokens stand, planned at the first layer and used by all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctx import engine
from ctx.engine import Plan
from ctx.hf.layer_law import LayerLaw
from ctx.memory import Memory
from ctx.padding import from_right_padded, to_right_padded

__all__ = ["Forward", "mask_of_call"]


class Forward:
    """Rows, positions and plans of one call.

    Args:
        laws: of all layers on the clock.
        memory: before the call.
        tokens: columns T of the call, padding included.
        mask: bool [B, T], true at tokens; None: everywhere.
        position_ids: [B or 1, T], what the model rotated keys and queries to; None: the numbers
            of the tokens in their streams.
        where: what messages begin with.

    Raises:
        ValueError: positions do not go on by one per token.
    """

    def __init__(
        self,
        laws: list[LayerLaw],
        memory: Memory,
        tokens: int,
        mask: Tensor | None,
        position_ids: Tensor | None,
        where: str,
    ) -> None:
        self.memory, self.tokens = memory, tokens
        self.mask = mask
        #: The layer that comes next.
        self.next = 0
        seen = memory.seen
        #: Numbers of the tokens in their streams, int64 [B, T]; padding, which is on the right
        #: here, has numbers that mean nothing.
        self.number = seen[:, None] + torch.arange(tokens, device=seen.device)
        #: How much further keys and queries were rotated than to their numbers; None: no further.
        self.ahead: Tensor | None = None
        lengths = None if mask is None else mask.sum(1)
        if position_ids is not None:
            self._place(position_ids, lengths, where)
        ahead = 0 if self.ahead is None else self.ahead
        #: What takes the rotation of queries back, float64 [B, T].
        self.back = (-self.number - ahead).to(torch.float64)
        self.plans: dict[tuple[int, ...], Plan] = engine.plans(
            laws, memory, self.number, lengths, None, True
        )

    @property
    def plan(self) -> Plan:
        """One of the plans, for what they share: the clock."""
        return next(iter(self.plans.values()))

    def _place(self, position_ids: Tensor, lengths: Tensor | None, where: str) -> None:
        batch, tokens = self.number.shape
        if position_ids.shape not in ((batch, tokens), (1, tokens)):
            raise ValueError(
                f"{where}: position_ids must be [B, T] = {[batch, tokens]}, "
                f"got {list(position_ids.shape)}"
            )
        given = position_ids.expand(batch, -1).to(self.number)
        padding = None
        if self.mask is not None and lengths is not None:
            given, _ = to_right_padded(given, self.mask)
            padding = torch.arange(tokens, device=given.device) >= lengths[:, None]
        ahead = given - self.number
        if padding is not None:
            ahead = torch.where(padding, ahead[:, :1], ahead)
        if not ahead.any():
            return
        if (ahead != ahead[:, :1]).any():
            raise ValueError(
                f"{where}: position_ids must go on by one per token in every row, "
                f"got {position_ids.tolist()}"
            )
        self.ahead = ahead

    def moved(self, x: Tensor) -> Tensor:
        """[B, H, T, D] with padding on the right."""
        if self.mask is None:
            return x
        return to_right_padded(x.transpose(1, 2), self.mask)[0].transpose(1, 2)

    def moved_back(self, x: Tensor) -> Tensor:
        """[B, H, T, Dv] as the model takes it, [B, T, H, Dv], every token at its place."""
        x = x.transpose(1, 2)
        return x.contiguous() if self.mask is None else from_right_padded(x, self.mask)

    def keys(self, k: Tensor, law: LayerLaw) -> Tensor:
        """Keys [B, Hkv, T, D] of right-padded rows, rotated to the numbers of their tokens."""
        if self.ahead is None or law.settings.position != "rotary":
            return k
        return engine.rotary(k, -self.ahead, law.turning)

    def queries(self, q: Tensor, law: LayerLaw) -> Tensor:
        """Queries [B, H, T, D] of right-padded rows without rotation."""
        if law.settings.position != "rotary":
            return q
        return engine.rotary(q, self.back, law.unrotating)


def mask_of_call(mask: Any, memory: Memory, tokens: int, columns: int, where: str) -> Tensor | None:
    """The columns of a 2-D mask that belong to the call, bool [B, T]; None where all are tokens.

    Args:
        mask: bool [B, columns + T], true at tokens; None: no padding in this call.
        columns: tokens and padding before the call.

    Raises:
        ValueError, TypeError: it is no such mask, or says of earlier tokens what they were not.
    """
    if mask is None:
        return None
    batch = memory.batch_size
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{where}: attention_mask must be [B, tokens so far], without a shape of its own "
            f"for each query, got {got}"
        )
    if mask.shape != (batch, columns + tokens):
        raise ValueError(
            f"{where}: attention_mask must be [B, tokens so far] = {[batch, columns + tokens]}, "
            f"got {list(mask.shape)}"
        )
    mask = mask.to(torch.bool)
    if columns and not torch.equal(mask[:, :columns].sum(1), memory.seen):
        raise ValueError(
            f"{where}: attention_mask must have as many tokens in its first {columns} columns as "
            f"the cache has seen, {memory.seen.tolist()}, got "
            f"{mask[:, :columns].sum(1).tolist()}"
        )
    now = mask[:, columns:]
    return None if bool(now.all()) else now
