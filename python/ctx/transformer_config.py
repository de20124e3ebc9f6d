"""The configuration of a decoder language model over compressive attention."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ctx import _check
from ctx.compression import COMPRESSORS
from ctx.layer_options import check_options
from ctx.schedule import SIZES, Schedule, Sizes, as_sizes, schedules_of

__all__ = ["CompressiveTransformerConfig"]

_CHOICES = {"mlp": ("swiglu", "gelu"), "norm": ("rms", "layer")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressiveTransformerConfig:
    """Everything that is needed to build a model again; plain values only, so it goes into a
    checkpoint.

    Args:
        vocab_size: number of different tokens; 256 for bytes.
        embed_dim: width of the residual stream.
        num_layers, num_heads, num_kv_heads: blocks, query heads, key/value heads (None: num_heads).
        window, compressed, ratio, segment, sinks: the memory, as in `ctx.Schedule`; each is one
            int, or a list or tuple of `num_layers` ints, first layer first (kept as a tuple).
            `compressed=0` switches the compressive memory off, be it of one layer.
        compressor ... rotary_interleaved, max_rewind: as in `ctx.CompressiveAttention`.
        mlp: "swiglu" or "gelu".
        mlp_dim: inner width of the MLP; None: 4 x embed_dim, and 2/3 of that for "swiglu".
        norm: "rms" or "layer", applied before each branch.
        tied: the output layer shares the embedding's weights.
        dropout: share of embeddings and of both branches' outputs that is dropped in training.
        bias: every linear layer has one.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or out of range.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    window: Sizes
    compressed: Sizes
    ratio: Sizes
    segment: Sizes | None = None
    sinks: Sizes = 0
    compressor: str = "conv"
    compressor_kernel: int | None = None
    memory_content: str = "kv"
    position: str | None = "rotary"
    relative_dim: int | None = None
    distance: str = "slot"
    compressed_bias: str = "learned"
    compressed_bias_init: float | None = None
    compressor_grad: str = "task"
    aux_loss: str | None = None
    rotary_base: float = 10000.0
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    max_rewind: int = 64
    mlp: str = "swiglu"
    mlp_dim: int | None = None
    norm: str = "rms"
    tied: bool = True
    dropout: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        where = "ctx.CompressiveTransformerConfig"
        for name in ("vocab_size", "num_layers", "mlp_dim"):
            value = getattr(self, name)
            if value is None and name == "mlp_dim":
                continue
            whole = _check.integer(value, name, where, 1)
            object.__setattr__(self, name, whole)  # a plain one: it goes into checkpoints
        _check.flag(self.tied, "tied", where)
        for name, choices in _CHOICES.items():
            _check.one_of(getattr(self, name), name, choices, where)
        _check.one_of(self.compressor, "compressor", tuple(COMPRESSORS), where)
        for name in SIZES:
            sizes = as_sizes(getattr(self, name), name, self.num_layers, where)
            object.__setattr__(self, name, _plain(sizes))
        each = any(isinstance(getattr(self, name), tuple) for name in SIZES)
        schedules = self._schedules(self.num_layers if each else 1)  # refuses what is out of range
        ratios = tuple(schedule.ratio for schedule in schedules)
        for name, value in check_options(self._options(), ratios, where).items():
            object.__setattr__(self, name, value)

    def _options(self) -> dict[str, Any]:
        """What a layer's options are checked by, and built with: by the names of its arguments."""
        elsewhere = {"vocab_size", "num_layers", "mlp", "mlp_dim", "norm", "tied", *SIZES}
        names = [field.name for field in dataclasses.fields(self) if field.name not in elsewhere]
        return {name: getattr(self, name) for name in names}

    def schedules(self) -> tuple[Schedule, ...]:
        """The memory's sizes as the law reads them, one for each layer."""
        return self._schedules(self.num_layers)

    def _schedules(self, layers: int) -> tuple[Schedule, ...]:
        return schedules_of(layers, {name: getattr(self, name) for name in SIZES})

    def schedule(self) -> Schedule:
        """The schedule that all layers have.

        Raises:
            ValueError: they have not all the same; `schedules` has each.
        """
        first, *others = self.schedules()
        if any(other != first for other in others):
            raise ValueError(
                "ctx.CompressiveTransformerConfig.schedule: schedules must be one for all layers, "
                f"got {len({first, *others})} different ones: use schedules()"
            )
        return first

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, sizes per layer as lists; `from_dict` is the way back."""
        values = dataclasses.asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CompressiveTransformerConfig:
        """Builds the configuration that `to_dict` described.

        Raises:
            ValueError: a name is unknown or missing, or a value out of range.
        """
        fields = dataclasses.fields(cls)
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        unknown = sorted(set(settings) - {f.name for f in fields})
        missing = sorted(required - set(settings))
        if unknown or missing:
            raise ValueError(
                "ctx.CompressiveTransformerConfig.from_dict: settings must have the names of the "
                f"configuration, got unknown {unknown} and missing {missing}"
            )
        return cls(**settings)

    def attention(self, layer: int) -> dict[str, Any]:
        """The keyword arguments of a layer's `ctx.CompressiveAttention`."""
        sizes = dict(zip(SIZES, self.schedules()[layer].numbers, strict=True))
        return self._options() | sizes


def _plain(sizes: Any) -> Any:
    """Sizes with plain ints for what stands for them; what does not is refused by `Schedule`."""
    if isinstance(sizes, tuple):
        return tuple(_plain(size) for size in sizes)
    whole = hasattr(sizes, "__index__") and not isinstance(sizes, (bool, Tensor))
    return operator.index(sizes) if whole else sizes
