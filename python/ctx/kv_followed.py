"""Tensors of the user's that a :class:`ctx.KVMemory` uses as they are at the time of each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ctx.compression import Compressor

if TYPE_CHECKING:
    from ctx.kv_state import KVState

__all__ = ["Followed", "parameters_of"]


def parameters_of(compressor: Compressor) -> list[Tensor]:
    """What the engine computes a compressor from; nothing where the module's call makes slots."""
    return compressor.operands() if compressor.native else []


class Followed:
    """The parameters of the compressor and of relative positions, and the bias of compressed slots
    where it was given as a tensor.

    What is written into one of them the engine sees, which holds an alias; :meth:`hand_over` is for
    what was replaced.
    """

    def __init__(self, bias: Tensor | None, others: bool) -> None:
        self.bias = bias
        #: Whether there is anything to look at.
        self.any = others or bias is not None
        self._handed: dict[str, Any] = {}

    def copy(self) -> Followed:
        """For another engine object that has been handed the same."""
        other = Followed(self.bias, self.any)
        other._handed = dict(self._handed)
        return other

    def hand_over(self, memory: KVState) -> None:
        """Gives the engine what it has not been given yet."""
        native = memory._native
        if memory.relative is not None:
            self._hand("relative", [*memory.relative()], native.set_relative)
        self._hand("parameters", parameters_of(memory.compressor), native.set_parameters)
        if self.bias is not None:
            # A copy is made anew when the tensor is written to, an alias sees it.
            device = native.seen.device
            copied = self.bias._version if self.bias.device != device else None
            place = (*_places_of([self.bias]), copied)
            if place != self._handed.get("bias"):
                native.set_compressed_bias(self.bias.detach().to(device))
                self._handed["bias"] = place

    def _hand(
        self, name: str, tensors: list[Tensor], give: Callable[[Sequence[Tensor]], None]
    ) -> None:
        places = _places_of(tensors)
        if places != self._handed.get(name, []):
            give([x.detach() for x in tensors])
            self._handed[name] = places


def _places_of(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What tells whether tensors are still those that were handed to the engine: where their
    numbers are and how they lie there.
    """
    return [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in tensors]
