"""What attention to a compressive memory is, as one validated value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ctx import _check
from ctx.frequencies import default_inv_freq, scaled_inv_freq
from ctx.schedule import SIZES, Schedule

__all__ = ["AttentionSettings"]

_WHERE = "ctx.AttentionSettings"
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "position": ("rotary", "relative", "alibi", None),
    "distance": ("slot", "token"),
    "keys": ("plain", "rotated"),
    "compressed_bias": ("none", "log_ratio", "learned"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Schedule, positions, and what is added to scores: everything but sizes and parameters.

    A score is ``scale × q·k`` (with relative positions also the term of the distance), capped if
    ``logit_softcap`` is set; then ALiBi, the slot bias and the slot mass are added.

    Args:
        schedule: sizes of the memory.
        position: ``"rotary"`` (Su et al. 2021, arXiv:2104.09864), ``"relative"`` (Dai et al. 2019,
            arXiv:1901.02860), ``"alibi"`` (Press et al. 2022, arXiv:2108.12409) or None.
        distance: ``"slot"`` counts what stands between query and key, as the paper does, and is
            bounded; ``"token"`` counts tokens.
        rotary_dim: the first this many channels of a head are rotated, even; None: all of them.
            This and the next four matter with ``position="rotary"`` only.
        rotary_base: pair i of channels rotates by ``rotary_base ** (-2 i / rotary_dim)`` radians
            per position.
        rotary_interleaved: pairs of channels are (0, 1), (2, 3), …; otherwise (0, rotary_dim / 2),
            (1, rotary_dim / 2 + 1), …
        inv_freq: rotary_dim / 2 radians per position in place of those of ``rotary_base``; see
            :meth:`from_rope_scaling`. Any sequence of numbers; kept as a tuple.
        attention_factor: cosines and sines are multiplied by it, > 0.
        keys: ``"plain"``: keys are given without rotation. ``"rotated"``: they are given rotated to
            the number of their token in its stream, ``attention_factor`` included, as Hugging Face
            models cache them. Queries are given without rotation in both cases.
        scale: factor of the scores, finite and not 0; None: head_dim^-1/2.
        compressed_bias: added to the scores of compressed slots: ``"none"``, ``"log_ratio"`` (the
            log of ``schedule.ratio``) or ``"learned"`` (a parameter per query head).
        slot_mass: the scores of a slot also get the mass that its compressor gives it: the
            logarithm of how many tokens it counts as. Not with ``"log_ratio"``, which counts them
            too; a learned bias then starts at 0.
        logit_softcap: a cap s replaces a scaled score x by ``s tanh(x / s)`` (a choice of this
            library, as in Gemma 2, arXiv:2408.00118); None or 0: no cap.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is of the wrong type.
    """

    schedule: Schedule
    position: str | None = "rotary"
    distance: str = "slot"
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    rotary_interleaved: bool = False
    inv_freq: tuple[float, ...] | None = None
    attention_factor: float = 1.0
    keys: str = "plain"
    scale: float | None = None
    compressed_bias: str = "none"
    slot_mass: bool = False
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            got = type(self.schedule).__name__
            raise TypeError(f"{_WHERE}: schedule must be a ctx.Schedule, got {got}")
        for name in ("rotary_base", "attention_factor", "scale", "logit_softcap"):
            value = getattr(self, name)
            if value is not None or name in ("rotary_base", "attention_factor"):
                object.__setattr__(self, name, _check.number(value, name, _WHERE))
        if self.rotary_dim is not None:
            width = _check.integer(self.rotary_dim, "rotary_dim", _WHERE)
            object.__setattr__(self, "rotary_dim", width)
        _check.flag(self.rotary_interleaved, "rotary_interleaved", _WHERE)
        _check.flag(self.slot_mass, "slot_mass", _WHERE)
        if self.inv_freq is not None:
            object.__setattr__(self, "inv_freq", _numbers(self.inv_freq, "inv_freq"))
        if self.logit_softcap == 0:
            object.__setattr__(self, "logit_softcap", None)
        self.validate()

    def validate(self, head_dim: int | None = None) -> None:
        """Checks the values of all settings, with ``head_dim`` also those that depend on it.

        Raises:
            ValueError: a setting is out of range.
        """
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{_WHERE}: {name} must be one of {choices}, got {value!r}")
        base, factor, cap = self.rotary_base, self.attention_factor, self.logit_softcap
        for name, number in (("rotary_base", base), ("attention_factor", factor)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{_WHERE}: {name} must be positive and finite, got {number}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"{_WHERE}: scale must be finite and not zero, got {self.scale}")
        if cap is not None and not (math.isfinite(cap) and cap > 0):
            raise ValueError(f"{_WHERE}: logit_softcap must be finite and at least 0, got {cap}")
        if self.slot_mass and self.compressed_bias == "log_ratio":
            raise ValueError(
                f"{_WHERE}: compressed_bias must be 'none' or 'learned' with slot_mass, which "
                "counts the tokens of a slot already, got 'log_ratio'"
            )
        if self.keys == "rotated" and self.position != "rotary":
            raise ValueError(
                f"{_WHERE}: keys must be 'plain' unless position is 'rotary', got 'rotated'"
            )
        self._validate_rotary(head_dim)

    def _validate_rotary(self, head_dim: int | None) -> None:
        width = self.rotary_dim if self.rotary_dim is not None else head_dim
        if self.position != "rotary" or width is None:
            width = self.rotary_dim or 0
        most = math.inf if head_dim is None else head_dim
        if not (0 <= width <= most and width % 2 == 0):
            bound = "" if head_dim is None else f" and at most head_dim = {head_dim}"
            raise ValueError(
                f"{_WHERE}: rotary_dim must be even{bound} and at least 0, got {width}"
            )
        if self.inv_freq is None:
            return
        if not all(math.isfinite(f) and f >= 0 for f in self.inv_freq):
            raise ValueError(
                f"{_WHERE}: inv_freq must be finite and at least 0, got {self.inv_freq}"
            )
        known = self.rotary_dim is not None or head_dim is not None
        if self.position == "rotary" and known and len(self.inv_freq) != width // 2:
            raise ValueError(
                f"{_WHERE}: inv_freq must be rotary_dim / 2 = {width // 2} numbers, "
                f"got {len(self.inv_freq)}"
            )

    def resolved(self, head_dim: int) -> AttentionSettings:
        """The same settings for heads of this width, with a number wherever None stood for one.

        ``rotary_dim``, ``inv_freq`` and ``scale`` are set; where nothing is rotated, ``rotary_dim``
        is 0, ``inv_freq`` empty and ``attention_factor`` 1. Resolving twice changes nothing.

        Args:
            head_dim: channels of a key, >= 1.

        Raises:
            ValueError: ``head_dim`` or a setting that depends on it is out of range.
        """
        head_dim = _check.integer(head_dim, "head_dim", _WHERE, 1)
        self.validate(head_dim)
        scale = head_dim**-0.5 if self.scale is None else self.scale
        if self.position != "rotary":
            return replace(self, scale=scale, rotary_dim=0, inv_freq=(), attention_factor=1.0)
        width = head_dim if self.rotary_dim is None else self.rotary_dim
        inv_freq = self.inv_freq
        if inv_freq is None:
            inv_freq = default_inv_freq(self.rotary_base, width)
        return replace(self, scale=scale, rotary_dim=width, inv_freq=inv_freq)

    @classmethod
    def from_rope_scaling(
        cls,
        rope_parameters: Mapping[str, Any] | None,
        head_dim: int,
        *,
        max_position_embeddings: int | None = None,
        **settings: Any,
    ) -> AttentionSettings:
        """Settings with the rotary frequencies of a Hugging Face model.

        Args:
            rope_parameters: ``config.rope_parameters`` (``config.rope_scaling`` of older models):
                ``rope_type`` "default", "linear" (Chen et al. 2023, arXiv:2306.15595), "llama3" or
                "yarn" (Peng et al. 2023, arXiv:2309.00071) with their numbers. ``rope_theta`` and
                ``partial_rotary_factor`` are read if they are there. None: the default type.
            head_dim: channels of a key; ``partial_rotary_factor`` of them are rotated.
            max_position_embeddings: ``config.max_position_embeddings``; used where the parameters
                name no ``original_max_position_embeddings`` or, for "yarn", no ``factor``.
            settings: all other settings by name, ``schedule`` among them. ``rotary_base`` is used
                where the parameters have no ``rope_theta``.

        Raises:
            ValueError: the type is another one ("dynamic": its frequencies change with the length
                of the sequence), a number is missing, or a setting is out of range.
        """
        where = f"{_WHERE}.from_rope_scaling"
        for name in ("inv_freq", "attention_factor", "rotary_dim"):
            if name in settings:
                raise ValueError(
                    f"{where}: {name} must come from rope_parameters, got {settings[name]!r}"
                )
        parameters = {} if rope_parameters is None else {**rope_parameters}
        base = parameters.get("rope_theta")
        if base is not None:
            settings["rotary_base"] = _check.number(base, "rope_theta", where)
        part = parameters.get("partial_rotary_factor")
        part = 1.0 if part is None else _check.number(part, "partial_rotary_factor", where)
        width = int(_check.integer(head_dim, "head_dim", where) * part)
        checked = cls(rotary_dim=width, **settings)  # before its numbers are used
        checked.validate(head_dim)
        base = checked.rotary_base
        inv_freq, factor = scaled_inv_freq(parameters, base, width, max_position_embeddings, where)
        return cls(rotary_dim=width, inv_freq=inv_freq, attention_factor=factor, **settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain numbers, strings, lists and dicts, as JSON takes them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["schedule"] = dict(zip(SIZES, self.schedule.numbers, strict=True))
        values["inv_freq"] = None if self.inv_freq is None else [*self.inv_freq]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionSettings:
        """The settings that :meth:`to_dict` gave; names that are missing get their defaults.

        Raises:
            ValueError, TypeError: a name is unknown, ``schedule`` is missing, or a value is none
                that the setting can have.
        """
        where = f"{_WHERE}.from_dict"
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"{where}: names must be among {names}, got {name!r}")
        sizes = values.get("schedule")
        if not isinstance(sizes, Mapping) or not set(sizes) <= set(SIZES):
            raise ValueError(f"{where}: schedule must be a dict of {SIZES}, got {sizes!r}")
        return cls(**{**values, "schedule": Schedule(**sizes)})


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    """A sequence of numbers, a 1-D array or tensor as a tuple of floats."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        items = value.tolist() if hasattr(value, "tolist") else [*value]
        return tuple(_check.number(item, name, _WHERE) for item in items)
    except TypeError:
        raise TypeError(f"{_WHERE}: {name} must be numbers or None, got {value!r}") from None
