"""Rotary frequencies of Hugging Face models as plain numbers.

Rotary angles are position × ``inv_freq[i]``, so the ways of scaling positions that models use are
frequencies, and a factor of cosines and sines, computed once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["default_inv_freq", "scaled_inv_freq"]


def default_inv_freq(base: float, rotary_dim: int) -> tuple[float, ...]:
    """``base ** (-2 i / rotary_dim)`` for the rotary_dim / 2 pairs of channels, in float64."""
    return tuple(base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))


def scaled_inv_freq(
    parameters: Mapping[str, Any],
    base: float,
    rotary_dim: int,
    max_position_embeddings: int | None,
    where: str,
) -> tuple[tuple[float, ...], float]:
    """Frequencies and attention factor for the rope parameters of a Hugging Face model.

    Args:
        parameters: with ``rope_type`` (or ``type``) "default", "linear", "llama3" or "yarn", and
            the numbers of that type by the names that Hugging Face uses.
        base: radians per position start as ``base ** (-2 i / rotary_dim)``.
        rotary_dim: channels that are rotated.
        max_position_embeddings: of the model; used where ``parameters`` has no
            ``original_max_position_embeddings``, or no ``factor``.
        where: prefix of messages.

    Returns:
        rotary_dim / 2 radians per position, and the factor of cosines and sines.

    Raises:
        ValueError: another type, or a number is missing.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    plain = default_inv_freq(base, rotary_dim)
    if kind == "default":
        return plain, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        reason = ", whose frequencies change with the length" if kind == "dynamic" else ""
        raise ValueError(
            f"{where}: rope_type must be one of ('default', 'linear', 'llama3', 'yarn'), "
            f"got {kind!r}{reason}"
        )
    values = {**parameters}
    if values.get("original_max_position_embeddings") is None:
        values["original_max_position_embeddings"] = max_position_embeddings
    if values.get("factor") is None and kind == "yarn" and max_position_embeddings is not None:
        values["factor"] = max_position_embeddings / _needed(
            values, "original_max_position_embeddings", kind, where
        )
    factor = _needed(values, "factor", kind, where)
    if kind == "linear":
        return tuple(f / factor for f in plain), 1.0
    original = _needed(values, "original_max_position_embeddings", kind, where)
    if kind == "llama3":
        low = _needed(values, "low_freq_factor", kind, where)
        high = _needed(values, "high_freq_factor", kind, where)
        if not high > low:
            raise ValueError(
                f"{where}: high_freq_factor must be more than low_freq_factor = {low}, got {high}"
            )
        return tuple(_llama3(f, factor, low, high, original) for f in plain), 1.0
    if not base > 1:
        raise ValueError(f"{where}: rope_theta must be more than 1 for 'yarn', got {base}")
    if values.get("attention_factor") is not None:
        attention_factor = _needed(values, "attention_factor", kind, where)
    else:
        attention_factor = _yarn_attention_factor(factor, values)
    return _yarn(plain, base, factor, original, values), attention_factor


def _needed(values: Mapping[str, Any], name: str, kind: str, where: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(
            f"{where}: {name} must be a positive number for rope_type {kind!r}, got {value!r}"
        )
    return float(value)


def _llama3(frequency: float, factor: float, low: float, high: float, original: float) -> float:
    """Long wavelengths are divided by the factor, short ones kept, and those between mixed.

    Source: the reference implementation of Llama 3.1 (arXiv:2407.21783).
    """
    rotations = original * frequency / (2 * math.pi)  # over the original context
    if rotations < low:
        return frequency / factor
    if rotations > high:
        return frequency
    smooth = (rotations - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(
    plain: tuple[float, ...],
    base: float,
    factor: float,
    original: float,
    values: Mapping[str, Any],
) -> tuple[float, ...]:
    """Pairs that rotate more than ``beta_fast`` times over the original context are kept, pairs
    that rotate less than ``beta_slow`` times divided by the factor, and those between mixed.

    Source: Peng et al. 2023 (arXiv:2309.00071), section 3.2.
    """
    dim = 2 * len(plain)

    def pair_that_rotates(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_rotates(values.get("beta_fast") or 32)
    high = pair_that_rotates(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as Hugging Face does, against a division by zero
    mixed = []
    for pair, frequency in enumerate(plain):
        divided = min(max((pair - low) / (high - low), 0.0), 1.0)
        mixed.append(divided * frequency / factor + (1 - divided) * frequency)
    return tuple(mixed)


def _yarn_attention_factor(factor: float, values: Mapping[str, Any]) -> float:
    """Source: Peng et al. 2023 (arXiv:2309.00071), section 3.4; ``mscale`` as in DeepSeek-V2."""

    def growth(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return growth(mscale) / growth(mscale_all_dim)
    return growth(1.0)
