"""Any module as a compressor."""

from __future__ import annotations

from torch import Tensor, nn

from ctx import _check
from ctx.compression.base import Compressor

__all__ = ["Custom"]


class Custom(Compressor):
    """Any module that maps (keys, values) of groups to (key slots, value slots).

    An integer ``overlap`` of the module says how many tokens left of a group it wants besides. A
    module without one that has a :class:`Compressor` inside (an adapter around it) wants what the
    first of these does.

    Raises:
        TypeError, ValueError: ``overlap`` is no integer, or below 0; or a compressor inside chooses
            by usage, which no other module can take part in.
    """

    name = "custom"

    def __init__(
        self,
        module: nn.Module,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int | None = None,
    ) -> None:
        super().__init__(kv_heads, ratio, head_dim, value_dim)
        inside = [part for part in module.modules() if isinstance(part, Compressor)]
        for part in inside:
            if part.by_usage:
                raise ValueError(
                    "ctx.compression.Custom: module must not contain a compressor that chooses by "
                    f"usage, got {part.name!r} in {type(module).__name__}"
                )
        self._inside = inside[0].overlap if inside else 0
        self.module = module
        _ = self.overlap  # refuses one that is none

    @property
    def overlap(self) -> int:
        """What the module says, else what the first compressor inside it does, else 0."""
        overlap = getattr(self.module, "overlap", self._inside)
        return _check.integer(overlap, "overlap", "ctx.compression.Custom", 0)

    def reset_parameters(self) -> None:
        """Every submodule that knows how to begin does so."""
        for module in self.modules():
            begin = getattr(module, "reset_parameters", None)
            if module is not self and callable(begin):
                begin()

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The module's slots."""
        slots: tuple[Tensor, Tensor] = self.module(keys, values)
        return slots
