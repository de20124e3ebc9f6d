"""The tokens that received the most attention, as they are."""

from __future__ import annotations

from torch import Tensor

from ctx.compression.base import Native

__all__ = ["MostUsed"]


class MostUsed(Native):
    """Of the c k tokens that leave the window at one boundary the k most used, as they are.

    Usage of a token is the attention that it got from all queries since it was written, averaged
    over the query heads of its kv head; of equals the earlier token stays, and slots are in the
    order of their tokens. Under the distance "token" they keep their own positions. The choice has
    no gradient, the chosen pairs do.

    A memory counts usage, so tokens come with their queries (no ``append``), and cannot be taken
    back (no ``rewind``). Nothing can be trained: there is no auxiliary loss.
    """

    name = "most_used"
    native = True
    by_usage = True

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs alone do not say what to keep.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "ctx.compression.MostUsed: forward must not be called: what stays depends on queries"
        )

    @staticmethod
    def take(groups: Tensor, chosen: Tensor) -> Tensor:
        """The slots of groups [B, Hkv, G, c, D] that `torch.ops.ctx.step_` chose, int64
        [B, Hkv, G]."""
        index = chosen.unsqueeze(-1).expand(-1, -1, -1, groups.shape[4])
        return groups.flatten(2, 3).gather(2, index)
