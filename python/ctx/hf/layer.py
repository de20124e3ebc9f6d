"""One full-attention layer of a :class:`ctx.hf.CompressiveCache`, as transformers calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ctx.hf import columns
from ctx.hf._transformers import cache_classes
from ctx.hf.stream import Stream

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin
else:
    CacheLayerMixin = cache_classes()[1]

__all__ = ["CompressiveLayer"]

#: The attribute by which returned keys carry their layer to the attention function.
CARRIED = "_ctx_hf_layer"


class CompressiveLayer(CacheLayerMixin):
    """A layer on the clock of a stream; rows, crop and reset are the cache's.

    Args:
        stream: what all layers share.
        index: of the layer, among those of the stream.
        config: the model's, which says which attention runs.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, stream: Stream, index: int, config: Any) -> None:
        self.stream, self.index, self.config = stream, index, config
        self.keys = self.values = None

    @property
    def is_initialized(self) -> bool:
        """Whether there is a memory."""
        return self.stream.memory is not None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return not any(law.by_usage for law in self.stream.laws)

    @property
    def batch_size(self) -> int:
        """Rows, once there is a memory."""
        if self.stream.memory is None:
            raise AttributeError("batch_size")
        return self.stream.memory.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first call makes the memory of all layers."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new pairs.

        Under "ctx" they are returned as they are, and carry the layer to the attention, which
        writes and attends; under another attention the memory and they are laid out as columns.

        Raises:
            ValueError, RuntimeError: they do not fit, or this attention cannot compute the law.
        """
        stream = self.stream
        stream.receive(self.index, key_states, value_states)
        if getattr(self.config, "_attn_implementation", None) != "ctx":
            return stream.laid_out(self.index, key_states, value_states)
        carrying = key_states.view_as(key_states)
        setattr(carrying, CARRIED, self)
        stream.pending = self.index
        return carrying, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and how far the first one is numbered: those of the memory end where the call
        begins, so all are visible, and new ones causally.
        """
        seen = self.stream.columns
        held = columns.count(self.stream.laws[self.index].asked, seen)
        return held + int(query_length), seen - held

    def get_seq_length(self) -> int:
        """Tokens that have come, padding included, and not what is stored."""
        return self.stream.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def __repr__(self) -> str:
        return f"CompressiveLayer({self.stream.laws[self.index].schedule})"
