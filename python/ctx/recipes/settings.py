"""Model, optimiser and length of a training run; the only place where their defaults stand.

The defaults take about three minutes on two cores, the final evaluation included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ctx.compression import COMPRESSORS
from ctx.recipes.errors import RecipeError, setting_error
from ctx.transformer import CompressiveTransformerConfig

__all__ = ["MODEL", "TrainSettings", "config_error", "model_config"]

MODEL: dict[str, Any] = {
    "vocab_size": 256,
    "embed_dim": 128,
    "num_layers": 3,
    "num_heads": 4,
    "window": 64,
    "compressed": 64,
    "ratio": 4,
    "segment": 64,
    "compressed_bias_init": -4.0,  # closed: slots come in as the model finds a use for them
}


def model_config(changed: Mapping[str, Any]) -> CompressiveTransformerConfig:
    """The default model with some settings changed.

    Raises:
        RecipeError: the library refuses them.
    """
    compressor = COMPRESSORS.get(changed.get("compressor", "conv"))
    trained = compressor is None or not compressor.by_usage
    if changed.get("compressor_grad") == "aux" and trained:  # something must train it
        changed = {"aux_loss": "reconstruction", **changed}
    if changed.get("position") == "none":
        changed = {**changed, "position": None}
    if changed.get("compressed_bias", "learned") != "learned":  # then there is nothing that starts
        changed = {"compressed_bias_init": None, **changed}
    try:
        return CompressiveTransformerConfig(**{**MODEL, **changed})
    except (TypeError, ValueError) as error:
        raise config_error(error) from None


def config_error(error: Exception) -> RecipeError:
    """What the library says about a model's settings, as an error of a recipe."""
    fields = dataclasses.fields(CompressiveTransformerConfig)
    return setting_error(error, (field.name for field in fields))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything about a run that is neither model nor text."""

    steps: int = 1700
    batch: int = 8
    length: int = 128
    lr: float = 3e-3
    final_lr: float = 0.05
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    update_every: int = 1
    update_every_after: int = 0
    aux_weight: float = 1.0
    seed: int = 0
    threads: int = 0
    held_out: int = 256 * 1024
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "length", "update_every", "checkpoint_every")
        least = {**dict.fromkeys(positive, 1), "held_out": 2}
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            low = least.get(name, 0)
            if not (math.isfinite(value) and value >= low):
                raise RecipeError(f"`{name}` must be at least {low}, got {value}")
            if isinstance(value, int) and value >= 2**63:
                raise RecipeError(f"`{name}` must be below 2**63, got {value}")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_lr` of the peak at the last step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)

    def gathered(self, steps: int) -> int:
        """How many gradients have been summed since the last update, after so many steps; an update
        at the end of the newest of them is not counted.
        """
        late = steps - self.update_every_after
        return 1 if late < 1 else (late - 1) % self.update_every + 1

    def updates(self, step: int) -> bool:
        """Whether the optimiser acts at the end of a step: always in the first
        `update_every_after`, then in every `update_every`-th; and in the last, so that nothing that
        was computed is lost.
        """
        early = step < self.update_every_after
        full = self.gathered(step + 1) == self.update_every
        return early or full or step == self.steps - 1
