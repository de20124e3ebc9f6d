"""What `ctx ablation` is made of; every default of it is written here, once.

Chosen so that three seeds of every compressor take about half an hour on two cores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ctx.cli.errors import CliError
from ctx.cli.settings import MODEL, TrainSettings, model_config
from ctx.compression import COMPRESSORS, make_compressor
from ctx.transformer import CompressiveTransformerConfig

__all__ = ["NOTHING", "OPTIONS", "WINDOW_ONLY", "AblationSettings", "Variant"]

WINDOW_ONLY = "window only"
NOTHING = "nothing"  # what trains a compressor that has no parameters

_MODEL: dict[str, Any] = {
    "embed_dim": 96, "num_layers": 2, "num_heads": 4, "ratio": 4, "segment": 32,
}  # fmt: skip
_SLOTS = 32  # in the window, and as many in CMem; all in the window where there is no CMem

# name in AblationSettings (the option is --name), type, meaning
OPTIONS: list[tuple[str, Any, str]] = [
    ("compressor", str, f"all, or some, separated by commas, of {', '.join(COMPRESSORS)}"),
    ("seeds", int, "models of each kind, of seeds 0, 1, ..."),
    ("steps", int, "training steps of each model"),
    ("batch", int, "streams side by side"),
    ("length", int, "tokens per stream and step"),
    ("compressed_bias_init", float, "where the learned bias of slots starts"),
    ("held_out", int, "bytes at the end of the text kept for the evaluation"),
]


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
            raise CliError(f"--seeds must be at least 1 and at most 1000, got {self.seeds}")
        for name in self.compressors:
            if name not in COMPRESSORS or self.compressors.count(name) > 1:
                raise CliError(
                    f"--compressor must be all or some of {', '.join(COMPRESSORS)}, separated by "
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
