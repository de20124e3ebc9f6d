"""The options of an attention layer, checked once for the layer and for a model's configuration."""

from __future__ import annotations

import math
from typing import Any

from ctx import _check
from ctx.compression import COMPRESSORS, check_kernel
from ctx.frequencies import default_inv_freq
from ctx.losses import LOSSES
from ctx.positions import POSITIONS
from ctx.schedule import SIZES
from ctx.settings import AttentionSettings

__all__ = [
    "SETTINGS_ONLY",
    "LayerOptions",
    "bias_start",
    "check_by_usage",
    "check_options",
    "with_settings",
]

_CHOICES: dict[str, tuple[str, ...]] = {
    "memory_content": ("kv", "hidden"),
    "distance": ("slot", "token"),
    "compressed_bias": ("none", "log_ratio", "learned"),
    "compressor_grad": ("task", "aux"),
    "aux_loss": LOSSES,
}


def _defaults(*names: str) -> dict[str, Any]:
    return {name: getattr(AttentionSettings, name) for name in names}


#: Options that are fields of AttentionSettings, and their defaults as arguments of a layer.
_SETTINGS = (
    "position", "distance", "compressed_bias", "rotary_base", "rotary_dim", "rotary_interleaved",
)  # fmt: skip
_FLAT = _defaults(*_SETTINGS) | {"compressed_bias": "learned", "sinks": 0}
#: Fields of AttentionSettings that a layer has no argument for, and their defaults.
SETTINGS_ONLY = _defaults("inv_freq", "attention_factor", "slot_mass", "logit_softcap", "scale")
_SIZES = ("embed_dim", "num_heads", "num_kv_heads", "max_rewind")

#: Options by the names of :class:`ctx.CompressiveAttention`'s arguments.
LayerOptions = dict[str, Any]


def check_options(options: LayerOptions, ratios: tuple[int, ...], where: str) -> LayerOptions:
    """The options with plain ints and floats.

    Args:
        options: every argument of :class:`ctx.CompressiveAttention` but sizes of the memory, dtype
            and device.
        ratios: tokens per slot of each layer.
        where: what the message begins with.

    Raises:
        ValueError, TypeError: an option is out of range; the message names it.
    """
    plain = dict(options)
    optional = ("num_kv_heads", "rotary_dim", "relative_dim", "compressor_kernel")
    for name in (*_SIZES, *optional[1:]):
        value = options[name]
        if value is None and name in optional:
            continue
        plain[name] = _check.integer(value, name, where, 1 if name in _SIZES else None)
    for name in ("rotary_base", "dropout"):
        plain[name] = _check.number(options[name], name, where)
    for name in ("rotary_interleaved", "bias"):
        _check.flag(options[name], name, where)
    for name, allowed in _CHOICES.items():
        if name != "aux_loss" or options[name] is not None:
            _check.one_of(options[name], name, allowed, where)
    if isinstance(options["compressor"], str):
        _check.one_of(options["compressor"], "compressor", tuple(COMPRESSORS), where)
    if options["compressed_bias_init"] is not None:
        start = bias_start(options["compressed_bias_init"], options["compressed_bias"], where)
        plain["compressed_bias_init"] = start
    if not 0.0 <= plain["dropout"] < 1.0:
        got = plain["dropout"]
        raise ValueError(f"{where}: dropout must be at least 0 and below 1, got {got}")
    if not (math.isfinite(plain["rotary_base"]) and plain["rotary_base"] > 0):
        got = plain["rotary_base"]
        raise ValueError(f"{where}: rotary_base must be positive and finite, got {got}")
    embed_dim, num_heads = plain["embed_dim"], plain["num_heads"]
    kv_heads = plain["num_kv_heads"] or num_heads
    if embed_dim % num_heads:
        raise ValueError(
            f"{where}: embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}"
        )
    if num_heads % kv_heads:
        raise ValueError(
            f"{where}: num_kv_heads must divide num_heads = {num_heads}, got {kv_heads}"
        )
    head_dim = embed_dim // num_heads
    width = head_dim if plain["rotary_dim"] is None else plain["rotary_dim"]
    _check.one_of(options["position"], "position", POSITIONS, where)
    fits = 0 <= width <= head_dim and width % 2 == 0
    if options["position"] == "rotary" and not fits:
        raise ValueError(
            f"{where}: rotary_dim must be even and at most head_dim = {head_dim}, got {width}"
        )
    sinusoids = embed_dim if plain["relative_dim"] is None else plain["relative_dim"]
    if sinusoids < 1 or (options["position"] == "relative" and sinusoids % 2):
        raise ValueError(f"{where}: relative_dim must be even and positive, got {sinusoids}")
    called = options["compressor"] if isinstance(options["compressor"], str) else "a module"
    for ratio in ratios:
        check_kernel(called, ratio, plain["compressor_kernel"], where, "compressor_kernel")
    if isinstance(options["compressor"], str) and COMPRESSORS[called].by_usage:
        check_by_usage(plain, where)
    return plain


def with_settings(settings: AttentionSettings, options: LayerOptions, where: str) -> LayerOptions:
    """The options with those that `settings` has fields of, sizes of the memory included.

    Args:
        settings: what attention to the memory is.
        options: every argument of :class:`ctx.CompressiveAttention` but dtype and device, as given.
        where: what the message begins with.

    Raises:
        ValueError: an option is given twice, or ``settings.keys`` is not ``"plain"``.
    """
    for name in (*SIZES, *_SETTINGS):
        if options[name] != _FLAT.get(name):
            got = options[name]
            raise ValueError(f"{where}: {name} must be given by settings alone, got {got!r}, too")
    if settings.keys != "plain":
        raise ValueError(
            f"{where}: settings.keys must be 'plain' in a layer, which makes its own keys, "
            f"got {settings.keys!r}"
        )
    given = {name: getattr(settings, name) for name in (*_SETTINGS, *SETTINGS_ONLY)}
    usual = default_inv_freq(settings.rotary_base, settings.rotary_dim or 0)
    if settings.position != "rotary" or settings.inv_freq == usual:
        given["inv_freq"] = None
    return options | given | {name: getattr(settings.schedule, name) for name in SIZES}


def check_by_usage(options: LayerOptions, where: str) -> None:
    """Raises where a compressor that chooses by attention received meets an option without it."""
    for name, other in (("aux_loss", None), ("memory_content", "kv")):
        if options[name] != other:
            raise ValueError(
                f"{where}: {name} must be {other!r} for compressor 'most_used', "
                f"got {options[name]!r}"
            )


def bias_start(value: Any, kind: str, where: str) -> float:
    """Where a bias of compressed slots starts, as a float.

    Raises:
        TypeError, ValueError: it is no finite number, or the bias is not learned.
    """
    start = _check.number(value, "compressed_bias_init", where)
    if not math.isfinite(start):
        raise ValueError(f"{where}: compressed_bias_init must be finite, got {start}")
    if kind != "learned":
        raise ValueError(
            f"{where}: compressed_bias_init must be None for compressed_bias {kind!r}, got {start}"
        )
    return start
