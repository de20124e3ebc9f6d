"""What the ablation is made of; the only place where its defaults stand.

With these, three seeds of every compressor take about half an hour on two cores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ctx.compression import COMPRESSORS, make_compressor
from ctx.recipes.errors import RecipeError
from ctx.recipes.settings import MODEL, TrainSettings, model_config
from ctx.transformer import CompressiveTransformerConfig

__all__ = ["NOTHING", "WINDOW_ONLY", "AblationSettings", "Variant"]

WINDOW_ONLY = "window only"
NOTHING = "nothing"  # what trains a compressor that has no parameters

_MODEL: dict[str, Any] = {
    "embed_dim": 96, "num_layers": 2, "num_heads": 4, "ratio": 4, "segment": 32,
}  # fmt: skip
_SLOTS = 32  # in the window, and as many in CMem; all in the window where there is no CMem


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of model: its compressor, and what trains that."""

    compressor: str
    trained_by: str  # "task", "aux" or NOTHING
    config: CompressiveTransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """Which models, and how long each is trained; checked when made."""

    compressor: str = "all"
    seeds: int = 3
    steps: int = 600
    batch: int = 8
    length: int = 128
    compressed_bias_init: float = MODEL["compressed_bias_init"]
    held_out: int = 128 * 1024

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= 1000:
            raise RecipeError(f"`seeds` must be at least 1 and at most 1000, got {self.seeds}")
        for name in self.compressors:
            if name not in COMPRESSORS or self.compressors.count(name) > 1:
                raise RecipeError(
                    f"`compressor` must be all or some of {', '.join(COMPRESSORS)}, separated by "
                    f"commas, got {self.compressor!r}"
                )
        self.training(0)
        self.variants()  # refuses a start that is none

    @property
    def compressors(self) -> list[str]:
        """The compressors by name, in the order asked for; "all": every one there is."""
        if self.compressor.strip() == "all":
            return list(COMPRESSORS)
        return [name.strip() for name in self.compressor.split(",")]

    def training(self, seed: int) -> TrainSettings:
        """How one model is trained: the default of `ctx train` in fewer steps."""
        return TrainSettings(
            steps=self.steps,
            batch=self.batch,
            length=self.length,
            held_out=self.held_out,
            warmup=min(50, self.steps),
            seed=seed,
            threads=1,
        )

    def variants(self) -> list[Variant]:
        """The model without CMem first; then every compressor, trained by the task and by
        attention reconstruction, or once where it has no parameters. All hold as many slots.
        """
        model = {**_MODEL, "compressed_bias_init": self.compressed_bias_init}
        alone = model_config({**model, "window": 2 * _SLOTS, "compressed": 0})
        found = [Variant(WINDOW_ONLY, NOTHING, alone)]
        for name in self.compressors:
            both = {**model, "window": _SLOTS, "compressed": _SLOTS, "compressor": name}
            learns = any(True for _ in make_compressor(name, 1, both["ratio"], 2).parameters())
            for grad in ("task", "aux") if learns else ("task",):
                config = model_config({**both, "compressor_grad": grad})
                found.append(Variant(name, grad if learns else NOTHING, config))
        return found
