"""What a memory was made for: the settings that decide what is stored in it and how that is read.

A memory is a plain dict of tensors; its identity is one more entry, a tensor without elements
(uint8 [B, 0]) whose name says the settings. So it stays with the memory whatever is done to dicts
of tensors: saving, copying, row operations, pytrees, compilation and export. Names are constants
of a program, so the check reads no tensor and works while a graph is traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctx.compression import COMPRESSORS, Compressor, Custom
from ctx.schedule import SIZES, Schedule

__all__ = ["check", "compressor_name", "describe", "entry", "marks", "rescheduled", "settings_in"]

_BEGIN = "made for "


def describe(
    schedule: Schedule,
    compressor: Compressor,
    *,
    content: str,
    position: str | None,
    distance: str,
    rotary: tuple[int, float, bool],
) -> str:
    """The name of the entry for these settings.

    Args:
        schedule: sizes of the memory.
        compressor: what makes its slots.
        content: ``"kv"`` or ``"hidden"``.
        position: the scheme.
        distance: ``"slot"`` or ``"token"``.
        rotary: rotary_dim (0: no rotation, and the others mean nothing), base, interleaved.
    """
    width, base, interleaved = rotary if rotary[0] else (0, 0.0, False)
    settings = {
        **_sizes(schedule),
        "overlap": compressor.overlap,
        "content": content,
        "position": position,
        "distance": distance,
        "rotary_dim": width,
        "rotary_base": float(base),
        "rotary_interleaved": interleaved,
        "compressor": compressor_name(compressor),
    }
    return _joined(settings)


def compressor_name(compressor: Compressor) -> str:
    """What a compressor is called: its name where that is one of
    :data:`ctx.compression.COMPRESSORS`, else the qualified name of the user's class.
    """
    made = compressor.module if isinstance(compressor, Custom) else compressor
    for name, kind in COMPRESSORS.items():
        if isinstance(made, kind) and type(made).forward is kind.forward:
            return name
    return type(made).__qualname__


def entry(name: str, rows: int, device: torch.device | str) -> dict[str, Tensor]:
    """The entry itself, for a memory of so many rows."""
    return {name: torch.zeros(rows, 0, dtype=torch.uint8, device=device)}


def marks(memory: Mapping[Any, Any]) -> list[str]:
    """The names among those of a memory that say what it was made for: one, or none at all."""
    return [name for name in memory if isinstance(name, str) and name.startswith(_BEGIN)]


def settings_in(name: str) -> dict[str, str]:
    """The settings that the name of an entry says, as text."""
    return dict(part.split("=", 1) for part in name.removeprefix(_BEGIN).split(" ") if "=" in part)


def rescheduled(name: str, schedule: Schedule) -> str:
    """The name for the same settings and another schedule."""
    return _joined({**settings_in(name), **_sizes(schedule)})


def check(memory: Mapping[str, Any], wanted: str, where: str) -> None:
    """Raises unless the memory was made for the settings that `wanted` says.

    Raises:
        ValueError: it was made for others, and the message names these; or does not say for what.
    """
    if wanted in memory:
        return
    found = marks(memory)
    must = settings_in(wanted)
    if not found:
        raise ValueError(
            f"{where}: memory must say what it was made for, as init_memory's does, "
            f"got one without {wanted!r}"
        )
    differing = difference(found[0], must)
    asked = " ".join(f"{name}={must.get(name)}" for name in differing)
    got = " ".join(f"{name}={value}" for name, value in differing.items())
    raise ValueError(f"{where}: memory must be made for {asked}, got one made for {got}")


def difference(name: str, wanted: Mapping[str, str]) -> dict[str, str | None]:
    """What an entry's name says otherwise than `wanted`; None: says nothing about."""
    said = settings_in(name)
    differing = {key: said.get(key) for key in wanted if said.get(key) != wanted[key]}
    return differing | {key: value for key, value in said.items() if key not in wanted}


def check_entry(memory: Mapping[str, Tensor], found: list[str], rows: int, where: str) -> None:
    """Raises unless the memory has at most one of the entries `found`, and that of so many rows.

    Raises:
        ValueError: it has several, or one that is not [B, 0].
    """
    if len(found) > 1:
        raise ValueError(f"{where}: memory must be made for one thing, got {', '.join(found)}")
    for name in found:
        shape = memory[name].shape
        if shape != (rows, 0):
            got = list(shape)
            raise ValueError(f"{where}: {name!r} in memory must be [{rows}, 0], got {got}")


def _sizes(schedule: Schedule) -> dict[str, int]:
    return dict(zip(SIZES, schedule.numbers, strict=True))


def _joined(settings: Mapping[str, Any]) -> str:
    return _BEGIN + " ".join(f"{name}={value}" for name, value in settings.items())
