"""What a memory was made with: the settings that decide what is stored and how it is read, and the
geometry of its tensors. A layer takes a memory of its own specification and no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctx.compression import COMPRESSORS, Compressor, Custom
from ctx.frequencies import default_inv_freq
from ctx.schedule import SIZES, Schedule
from ctx.settings import AttentionSettings

__all__ = ["FORMAT", "LayerSpec", "Spec", "compressor_name", "layer_spec"]

#: Version of the layout of a memory's tensors; a state of another one is refused by name.
FORMAT = 2


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """The specification of one layer's memory; equal and hashable by value.

    Args:
        window, compressed, ratio, segment, sinks: as in :class:`ctx.Schedule`.
        overlap: tokens before a group that the compressor reads besides.
        content: ``"kv"`` or ``"hidden"``.
        position, distance: as in :class:`ctx.CompressiveAttention`.
        rotary_dim, rotary_base, rotary_interleaved: of stored keys; 0, 0.0, False without rotation.
        inv_freq: frequencies, where they are not those of ``rotary_base``.
        attention_factor, keys, slot_mass: as in :class:`ctx.AttentionSettings`.
        compressor: its name, or the qualified name of a class of the user's.
        kv_heads, head_dim, value_dim: geometry of what is stored of a token.
        max_rewind: spare entries of the window's ring.
    """

    window: int
    compressed: int
    ratio: int
    segment: int
    sinks: int
    overlap: int
    content: str
    position: str | None
    distance: str
    rotary_dim: int
    rotary_base: float
    rotary_interleaved: bool
    inv_freq: tuple[float, ...] | None
    attention_factor: float
    keys: str
    slot_mass: bool
    compressor: str
    kv_heads: int
    head_dim: int
    value_dim: int
    max_rewind: int

    def __post_init__(self) -> None:
        if isinstance(self.inv_freq, list):  # as JSON has it
            object.__setattr__(self, "inv_freq", tuple(self.inv_freq))
        # One string: compared in a step of eager code, and one constant of a compiled graph.
        said = (f"{name}={getattr(self, name)}" for name in _NAMES)
        object.__setattr__(self, "key", " ".join(said))

    key: str = dataclasses.field(init=False, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerSpec) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def schedule(self) -> Schedule:
        """The sizes as the law."""
        return Schedule(*(getattr(self, name) for name in SIZES))

    @property
    def counts_attention(self) -> bool:
        """Whether slots are chosen by the attention that tokens received, which is then state."""
        kind = COMPRESSORS.get(self.compressor)
        return kind is not None and kind.by_usage

    def rescheduled(self, schedule: Schedule) -> LayerSpec:
        """The same with other sizes."""
        sizes: Any = dict(zip(SIZES, schedule.numbers, strict=True))
        return dataclasses.replace(self, **sizes)

    def difference(self, other: LayerSpec) -> list[str]:
        """Names of the fields in which the two differ."""
        return [name for name in _NAMES if getattr(self, name) != getattr(other, name)]


_NAMES = tuple(field.name for field in dataclasses.fields(LayerSpec) if field.init)


@dataclass(frozen=True)
class Spec:
    """The specification of a memory: one :class:`LayerSpec` per layer, first layer first."""

    layers: tuple[LayerSpec, ...]
    format: int = FORMAT
    _parts: tuple[Spec, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Not itself where it is of one layer: graph compilers follow references, also in a circle.
        alone = len(self.layers) == 1
        parts = () if alone else tuple(Spec((layer,)) for layer in self.layers)
        object.__setattr__(self, "_parts", parts)

    def part(self, layer: int) -> Spec:
        """The specification of one layer alone."""
        return self._parts[layer] if self._parts else self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints; :meth:`from_dict` is the way back."""
        layers = [{name: getattr(layer, name) for name in _NAMES} for layer in self.layers]
        return {"format": self.format, "layers": layers}

    @staticmethod
    def from_dict(plain: Mapping[str, Any], where: str = "ctx.Spec.from_dict") -> Spec:
        """The specification that :meth:`to_dict` described.

        Raises:
            ValueError: it is of another format version, or names are missing or unknown.
        """
        if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
            got = plain.get("format") if isinstance(plain, Mapping) else type(plain).__name__
            raise ValueError(f"{where}: spec must be of format {FORMAT}, got {got}")
        layers = plain.get("layers")
        if not isinstance(layers, (list, tuple)) or not layers:
            raise ValueError(f"{where}: layers must be a list of at least one, got {layers!r}")
        for layer in layers:
            if not isinstance(layer, Mapping) or set(layer) != set(_NAMES):
                got = sorted(map(str, layer)) if isinstance(layer, Mapping) else repr(layer)
                raise ValueError(f"{where}: layers must have {', '.join(_NAMES)}, got {got}")
        return Spec(tuple(LayerSpec(**layer) for layer in layers))

    def check(self, other: Spec, where: str) -> None:
        """Raises unless a memory of specification `other` is one of this.

        Raises:
            ValueError: it is not; the message names the settings that differ.
        """
        if other is self:
            return
        if len(other.layers) != len(self.layers):
            raise ValueError(
                f"{where}: memory must have {len(self.layers)} layers, got {len(other.layers)}"
            )
        for mine, held in zip(self.layers, other.layers, strict=True):
            if held is not mine and held.key != mine.key:
                names = mine.difference(held)
                asked, got = (
                    " ".join(f"{name}={getattr(one, name)}" for name in names)
                    for one in (mine, held)
                )
                raise ValueError(
                    f"{where}: memory must be made for {asked}, got one made for {got}"
                )


def compressor_name(compressor: Compressor) -> str:
    """The name of a compressor: its key in :data:`ctx.compression.COMPRESSORS` where it computes
    what the class of that name does, else the qualified name of the user's class.
    """
    made = compressor.module if isinstance(compressor, Custom) else compressor
    for name, kind in COMPRESSORS.items():
        if isinstance(made, kind) and type(made).forward is kind.forward:
            return name
    return type(made).__qualname__


def layer_spec(
    settings: AttentionSettings,
    compressor: Compressor,
    stored: tuple[int, int, int],
    max_rewind: int,
    *,
    content: str,
) -> LayerSpec:
    """The specification of a layer's memory.

    Args:
        settings: what attention is, resolved for the layer's heads.
        compressor: what makes its slots.
        stored: kv_heads, head_dim, value_dim of what is remembered of a token.
        max_rewind: spare entries.
        content: see :class:`LayerSpec`.
    """
    width = settings.rotary_dim or 0
    base = settings.rotary_base
    usual = width == 0 or settings.inv_freq == default_inv_freq(base, width)
    return LayerSpec(
        *settings.schedule.numbers,
        compressor.overlap,
        content,
        settings.position,
        settings.distance,
        width,
        float(base) if width and usual else 0.0,
        settings.rotary_interleaved if width else False,
        None if usual else settings.inv_freq,
        settings.attention_factor,
        settings.keys,
        settings.slot_mass,
        compressor_name(compressor),
        *stored,
        max_rewind,
    )
