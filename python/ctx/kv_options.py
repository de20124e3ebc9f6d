"""The options of :class:`ctx.KVMemory`, checked: what attention is, and what scores need besides
queries and keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctx import _check
from ctx.positions import POSITIONS, Relative
from ctx.schedule import Schedule
from ctx.settings import AttentionSettings

__all__ = ["position_operands", "settings_of"]


def settings_of(
    schedule: Any, options: dict[str, Any], where: str
) -> tuple[AttentionSettings, Tensor | None]:
    """What attention is, and the bias of compressed slots where they have one: of a schedule and
    options by name; or of AttentionSettings, which the options must not repeat.

    Raises:
        TypeError, ValueError: an option is out of range, or given twice.
    """
    given = dict(options)
    bias = given.pop("compressed_bias")
    if isinstance(schedule, AttentionSettings):
        settings = schedule
        if settings.compressed_bias != "learned":  # whose numbers are an option
            given, bias = options, settings.compressed_bias
        for name, got in given.items():
            if got != getattr(AttentionSettings, name):
                raise ValueError(
                    f"{where}: {name} must be given by settings alone, got {got!r}, too"
                )
    elif isinstance(schedule, Schedule):
        settings = AttentionSettings(schedule=schedule, **_checked(given, where))
    else:
        raise TypeError(
            f"{where}: schedule must be a ctx.Schedule or ctx.AttentionSettings, "
            f"got {type(schedule).__name__}"
        )
    values = _bias_values(bias, settings.schedule.ratio, where)
    kind = "none" if values is None else "learned"
    return dataclasses.replace(settings, compressed_bias=kind), values


def _checked(options: dict[str, Any], where: str) -> dict[str, Any]:
    """The options with plain ints and floats."""
    plain = dict(options)
    _check.one_of(options["position"], "position", POSITIONS, where)
    distance = options["distance"]
    if not isinstance(distance, str):
        raise TypeError(f'{where}: distance must be "slot" or "token", got {distance!r}')
    _check.one_of(distance, "distance", ("slot", "token"), where)
    plain["rotary_base"] = _check.number(options["rotary_base"], "rotary_base", where)
    if options["rotary_dim"] is not None:
        plain["rotary_dim"] = _check.integer(options["rotary_dim"], "rotary_dim", where)
    _check.flag(options["rotary_interleaved"], "rotary_interleaved", where)
    if options["scale"] is not None:
        plain["scale"] = scale = _check.number(options["scale"], "scale", where)
        if not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"{where}: scale must be finite and not zero, got {scale}")
    return plain


def _bias_values(bias: str | Sequence[float] | Tensor, ratio: int, where: str) -> Tensor | None:
    """The bias of compressed slots by name, or as numbers per query head; None for no bias."""
    if not isinstance(bias, str):
        return _check.per_head(bias, "compressed_bias", where)
    if bias == "none":
        return None
    if bias == "log_ratio":
        return torch.tensor([math.log(ratio)], dtype=torch.float64, device="cpu")
    raise ValueError(
        f'{where}: compressed_bias must be "none", "log_ratio" or numbers per query head, '
        f"got {bias!r}"
    )


def position_operands(
    position: str | None,
    alibi_slopes: Sequence[float] | Tensor | None,
    relative: Relative | None,
    where: str,
) -> tuple[Tensor | None, list[Tensor]]:
    """The slopes and the tensors of relative positions, which must come with their scheme and
    with no other.
    """
    given = {"alibi_slopes": ("alibi", alibi_slopes), "relative": ("relative", relative)}
    for name, (scheme, value) in given.items():
        if (value is None) == (position == scheme):
            must = "be given with" if value is None else "come with"
            got = "None" if value is None else f"position={position!r}"
            raise ValueError(f'{where}: {name} must {must} position="{scheme}", got {got}')
    if relative is not None and not isinstance(relative, Relative):
        raise TypeError(
            f"{where}: relative must be a ctx.positions.Relative, got {type(relative).__name__}"
        )
    slopes = None
    if alibi_slopes is not None:
        slopes = _check.per_head(alibi_slopes, "alibi_slopes", where)
    return slopes, [] if relative is None else [*relative()]
