"""What a run with `compare` also trains: the same model with a window alone, in the same way.

Switching CMem off in a model that was trained with it says what these weights lose, not what the
memory is worth: they have come to rely on their slots. Models that are trained for a window say
that, one with the same window and one with as many slots in all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ctx.recipes.errors import RecipeError
from ctx.recipes.evaluation import Result
from ctx.schedule import Sizes
from ctx.transformer import CompressiveTransformerConfig

__all__ = ["Rival", "named", "rivals"]


@dataclasses.dataclass(frozen=True)
class Rival:
    """One model to train besides: its row in the table, its folder in the run's, its sizes."""

    name: str
    folder: str
    config: CompressiveTransformerConfig


def rivals(config: CompressiveTransformerConfig) -> list[Rival]:
    """The model with its window alone, and with a window of as many slots as it has in all.

    Raises:
        RecipeError: the model has no slots to compare with.
    """
    schedules = config.schedules()
    if not any(schedule.compressed for schedule in schedules):
        raise RecipeError(f"`compare` must go with `compressed` above 0, got {config.compressed}")
    same = tuple(schedule.window for schedule in schedules)
    equal = tuple(schedule.window + schedule.compressed for schedule in schedules)
    found = []
    for sizes in (same, equal):
        window = _text(sizes)
        alone = dataclasses.replace(
            config,
            window=sizes[0] if len(set(sizes)) == 1 else sizes,
            compressed=0,
            compressor_grad="task",  # there are no slots to train it on
            aux_loss=None,
        )
        folder = f"window-{window.replace(',', '-')}"
        found.append(Rival(f"window {window} alone, trained so", folder, alone))
    return found


def named(config: CompressiveTransformerConfig, results: Sequence[Result]) -> list[Result]:
    """The results of `evaluate`, named so that other models can stand in the same table."""
    schedules = config.schedules()
    window, slots = (
        _text([getattr(schedule, name) for schedule in schedules])
        for name in ("window", "compressed")
    )
    names = (
        f"window {window} + {slots} slots",
        "the same weights, CMem off",
        "the same weights, emptied at every segment",
    )
    return [dataclasses.replace(r, name=name) for r, name in zip(results, names, strict=True)]


def _text(sizes: Sizes | Sequence[int]) -> str:
    """Sizes as on the command line: one number where all are equal."""
    each = [sizes] if isinstance(sizes, int) else list(sizes)
    return str(each[0]) if len(set(each)) == 1 else ",".join(map(str, each))
