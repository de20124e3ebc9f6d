"""What one full-attention layer's memory is, and what operators take of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctx.compression import Compressor
from ctx.compression.registry import compressor_of
from ctx.engine import Law, Scores, law_of
from ctx.hf.model import head_dim_of, is_interleaved, rope_parameters_of
from ctx.schedule import Schedule
from ctx.settings import AttentionSettings
from ctx.spec import LayerSpec, layer_spec
from ctx.state import arithmetic

__all__ = ["Geometry", "LayerLaw", "laws_of"]

#: kv_heads, head_dim, value_dim of what is stored of a token.
Geometry = tuple[int, int, int]


class LayerLaw:
    """The settings of a layer; with the first keys also its compressor, specification and laws.

    Args:
        settings: what attention is, but for scale and soft cap, which the model says in each call.
        compressor: a name or a module.
        max_rewind: spare entries of the window's ring.
        bias: [Hkv], added to the scores of slots; None: nothing is.
    """

    def __init__(
        self,
        settings: AttentionSettings,
        compressor: Any,
        max_rewind: int,
        bias: Tensor | None = None,
    ) -> None:
        self.settings = settings
        #: The schedule that is asked for; rings that grow are made for a smaller window first.
        self.asked = settings.schedule
        self.given = compressor
        self.max_rewind = max_rewind
        self.bias = bias
        self.geometry: Geometry | None = None
        self._laws: dict[tuple[float | None, float | None, bool], Law] = {}

    compressor: Compressor
    spec: LayerSpec
    plan_key: tuple[int, ...]  # what a plan depends on
    counts_attention: bool
    law: Law  # of a call that only writes
    turning: Law  # rotates keys further, without the factor of the cosines
    unrotating: Law  # takes a rotation back, at negative positions

    @property
    def schedule(self) -> Schedule:
        """Sizes of the memory."""
        return self.settings.schedule

    @property
    def grows(self) -> bool:
        """Whether rings may be smaller than asked for while nothing leaves the window."""
        return self.schedule.compressed == 0 and not self.by_usage

    def sized(self, window: int) -> LayerLaw:
        """The same law over a window of so many tokens, at most those that were asked for."""
        schedule = self.asked.resized(window=min(window, self.asked.window))
        settings = dataclasses.replace(self.settings, schedule=schedule)
        made = LayerLaw(settings, self.given, self.max_rewind, self.bias)
        made.asked = self.asked
        return made

    @property
    def by_usage(self) -> bool:
        """Whether slots are chosen by the attention that tokens received."""
        made = self.given if isinstance(self.given, torch.nn.Module) else None
        return self.given == "most_used" or bool(getattr(made, "by_usage", False))

    def measure(self, geometry: Geometry, device: torch.device, where: str) -> None:
        """Takes the sizes of what the model stores, once.

        Raises:
            ValueError, TypeError: settings or the compressor do not fit them, or they are others
                than before.
        """
        if geometry == self.geometry:
            return
        names = "kv_heads, head_dim, value_dim"
        if self.geometry is not None:
            raise ValueError(f"{where}: {names} must be {self.geometry}, got {geometry}")
        heads, head_dim, value_dim = geometry
        self._head_dim = head_dim
        self.settings = settings = self.settings.resolved(head_dim)
        ratio = self.schedule.ratio
        self.compressor = compressor_of(
            self.given, where, heads, ratio, head_dim, value_dim, device=device, dtype=torch.float32
        )
        self.spec = layer_spec(settings, self.compressor, geometry, self.max_rewind, content="kv")
        self.law = self.scored(None, None)
        self.plan_key = self.law.settings[:6]
        self.counts_attention = self.compressor.by_usage
        if settings.position == "rotary":
            self.turning = self._with_factor(1.0)
            self.unrotating = self._with_factor(1 / settings.attention_factor)
        self.geometry = geometry

    def _with_factor(self, factor: float) -> Law:
        plain = dataclasses.replace(self.settings, attention_factor=factor)
        return law_of(plain, "custom", self._head_dim, 0)

    def scored(self, scale: float | None, softcap: float | None, custom: bool = False) -> Law:
        """The law with the model's factor of the scores and its cap.

        Args:
            scale: None: that of the settings.
            softcap: None: no cap.
            custom: slots are given, and not made by the engine.
        """
        key = (scale, softcap, custom)
        if key not in self._laws:
            settings = dataclasses.replace(self.settings, logit_softcap=softcap)
            if scale is not None:
                settings = dataclasses.replace(settings, scale=scale)
            name = "custom" if custom else self.compressor.engine_name
            overlap = self.compressor.overlap
            self._laws[key] = law_of(settings, name, self._head_dim, overlap)
        return self._laws[key]

    def scores(self, q: Tensor) -> Scores:
        """What scores of queries [B, H, T, D] are made of besides them and keys."""
        if self.bias is None or not self.schedule.compressed:
            return Scores(None, None, [])
        bias = self.bias.to(q.device, arithmetic(q.dtype))
        return Scores(bias.repeat_interleave(q.shape[1] // len(bias)), None, [])

    def operands(self) -> Sequence[Tensor]:
        """The compressor's parameters as the engine takes them."""
        return [x.detach() for x in self.compressor.operands()]


def laws_of(
    config: Any,
    schedules: Sequence[Schedule],
    compressors: Sequence[str | nn.Module],
    where: str,
    *,
    distance: str,
    slot_mass: bool,
    max_rewind: int,
    rotary_interleaved: bool | None = None,
    biases: Sequence[Tensor] | None = None,
) -> list[LayerLaw]:
    """What the full-attention layers of a model are.

    Args:
        config: of the decoder.
        schedules, compressors, biases: one for each of these layers.

    Raises:
        ValueError, TypeError: a setting is out of range, or the model has no rotary positions.
    """
    parameters, width = rope_parameters_of(config, where), head_dim_of(config)
    interleaved = is_interleaved(config, rotary_interleaved, where)
    laws = []
    for layer, schedule in enumerate(schedules):
        settings = AttentionSettings.from_rope_scaling(
            parameters,
            width,
            max_position_embeddings=getattr(config, "max_position_embeddings", None),
            schedule=schedule,
            rotary_interleaved=interleaved,
            keys="rotated",
            distance=distance,
            slot_mass=slot_mass,
            compressed_bias="none" if biases is None else "learned",
        )
        bias = None if biases is None else biases[layer]
        laws.append(LayerLaw(settings, compressors[layer], max_rewind, bias))
    return laws
