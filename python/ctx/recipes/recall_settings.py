"""Sizes of the recall task and of its models; the only place where their defaults stand.

The defaults take less than ten minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ctx.compression import COMPRESSORS
from ctx.recipes.errors import RecipeError
from ctx.recipes.limits import check_fits
from ctx.recipes.recall_task import KEYS, VALUES, RecallTask
from ctx.recipes.settings import config_error
from ctx.transformer import CompressiveTransformerConfig

__all__ = ["Contestant", "RecallSettings"]

_MODEL: dict[str, Any] = {
    "vocab_size": KEYS + VALUES,
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "rotary_base": 100.0,  # for hundreds of tokens, not thousands
    "tied": False,  # keys are asked and values answered: two alphabets, and they learn faster apart
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One model of the comparison."""

    name: str
    config: CompressiveTransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallSettings:
    """Sizes of the task, of the memory and of the training; checked when made."""

    steps: int = 500
    seed: int = 0
    threads: int = 0
    compressor: str = "all"
    pairs: int = 16
    length: int = 128
    window: int = 16
    slots: int = 28
    ratio: int = 4
    batch: int = 32
    lr: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("steps", "pairs", "length", "slots", "ratio", "batch"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "threads", "window"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int):
                self._check(name, value < 2**62, "below 2**62")
        self._check("pairs", self.pairs <= KEYS, f"at most {KEYS}, the number of keys")
        self._check("lr", math.isfinite(self.lr) and self.lr > 0, "positive and finite")
        for name in self.compressors:
            if name not in COMPRESSORS or self.compressors.count(name) > 1:
                choice = ", ".join(COMPRESSORS)
                raise RecipeError(
                    f"`compressor` must be all or some of {choice}, separated by commas, "
                    f"got {self.compressor!r}"
                )
        for contestant in self.contestants():
            check_fits(contestant.config, self.batch, self.task.tokens, training=True)
        _, beyond, _ = self.marks
        self._check(
            "length",
            self.task.farthest > beyond,
            f"at least {self.length + beyond + 1 - self.task.farthest}, so that queries lie more "
            f"than {beyond} tokens behind a pair: a window of {self.window + self.slots} ends",
        )

    def _check(self, name: str, good: bool, what: str) -> None:
        if not good:
            raise RecipeError(f"`{name}` must be {what}, got {getattr(self, name)}")

    @property
    def compressors(self) -> list[str]:
        """The compressors by name, in the order asked for; "all": every one there is."""
        if self.compressor.strip() == "all":
            return list(COMPRESSORS)
        return [name.strip() for name in self.compressor.split(",")]

    @property
    def task(self) -> RecallTask:
        """What is asked."""
        return RecallTask(self.pairs, self.length)

    @property
    def marks(self) -> tuple[int, int, int]:
        """Distances at which the model without CMem ceases to see every pair exactly, at which it
        sees none, since tokens wait for their group to fill, and at which the reach of CMem ends.
        """
        held = self.window + self.slots
        waiting = -held % self.ratio + self.ratio - 1
        return held, held + waiting, self.window + self.ratio * self.slots

    def contestants(self) -> list[Contestant]:
        """The model without CMem first, then one per compressor; all may hold as many slots."""
        wide = {"window": self.window + self.slots, "compressed": 0, "compressor": "mean"}
        sizes: list[tuple[str, dict[str, Any]]] = [("window only", wide)]
        for name in self.compressors:
            both = {"window": self.window, "compressed": self.slots, "compressor": name}
            sizes.append((f"CMem, {name}", both))
        try:
            return [
                Contestant(
                    name, CompressiveTransformerConfig(**{**_MODEL, "ratio": self.ratio, **size})
                )
                for name, size in sizes
            ]
        except (TypeError, ValueError) as error:
            raise config_error(error) from None
