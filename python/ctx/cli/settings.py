"""What a training run is made of; every default of `ctx train` is written here, once.

Chosen for about three minutes on two cores, the final evaluation included.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ctx.cli.errors import CliError
from ctx.compression import COMPRESSORS
from ctx.transformer import CompressiveTransformerConfig

__all__ = [
    "MODEL",
    "MODEL_OPTIONS",
    "RUN_OPTIONS",
    "TrainSettings",
    "in_options",
    "model_config",
    "sizes",
]


def sizes(text: str) -> int | tuple[int, ...]:
    """A size of the memory as it is written on the command line: `64`, or `64,64,0` layer by layer.

    Raises:
        ValueError: it is neither.
    """
    numbers = tuple(int(part) for part in text.split(","))
    return numbers if "," in text else numbers[0]


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


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


# option, name in CompressiveTransformerConfig, type or choices, meaning
MODEL_OPTIONS: list[tuple[str, str, Any, str]] = [
    ("--width", "embed_dim", int, "width of the residual stream"),
    ("--layers", "num_layers", int, "blocks"),
    ("--heads", "num_heads", int, "query heads; must divide the width"),
    ("--kv-heads", "num_kv_heads", int, "key/value heads"),
    ("--window", "window", sizes, "exact tokens behind every query; one number, or one per layer"),
    ("--compressed", "compressed", sizes, "slots of the compressive memory; 0: none; or per layer"),
    ("--ratio", "ratio", sizes, "tokens per slot; or per layer"),
    ("--segment", "segment", sizes, "tokens between evictions; or per layer"),
    ("--sinks", "sinks", sizes, "first tokens that are kept for ever; or per layer"),
    ("--compressor", "compressor", str, _either(COMPRESSORS)),
    ("--compressor-kernel", "compressor_kernel", int, "of conv: tokens it reads for a slot"),
    ("--memory-content", "memory_content", str, "kv, or hidden: layer inputs, as in the paper"),
    ("--position", "position", str, "rotary, relative, alibi or none"),
    ("--distance", "distance", str, "slot or token"),
    ("--compressed-bias", "compressed_bias", str, "none, log_ratio or learned"),
    (
        "--compressed-bias-init",
        "compressed_bias_init",
        float,
        "where a learned bias starts: low, slots are let in as they prove useful; at log ratio, "
        "a slot begins as so many tokens",
    ),
    ("--compressor-grad", "compressor_grad", str, "what trains the compressor: task or aux"),
    ("--aux-loss", "aux_loss", str, "reconstruction (for --compressor-grad aux) or autoencoding"),
    ("--mlp", "mlp", str, "swiglu or gelu"),
    ("--mlp-dim", "mlp_dim", int, "inner width of the MLP (default: by the width)"),
    ("--norm", "norm", str, "rms or layer"),
    ("--dropout", "dropout", float, "share of activations dropped in training"),
]
# option, name in TrainSettings, type, meaning
RUN_OPTIONS: list[tuple[str, str, Any, str]] = [
    ("--steps", "steps", int, "chunks of the streams to train on"),
    ("--batch", "batch", int, "streams side by side"),
    ("--length", "length", int, "tokens per stream and step; gradients reach this far back"),
    ("--lr", "lr", float, "peak learning rate"),
    ("--final-lr", "final_lr", float, "learning rate at the end, as a share of the peak"),
    ("--warmup", "warmup", int, "steps of linear warm-up"),
    ("--weight-decay", "weight_decay", float, "of AdamW, on matrices"),
    ("--clip", "clip", float, "largest norm of the gradient; 0: no limit"),
    ("--update-every", "update_every", int, "steps whose gradients one update takes the mean of"),
    ("--update-every-after", "update_every_after", int, "steps with an update each before that"),
    ("--aux-weight", "aux_weight", float, "of the auxiliary loss, where there is one"),
    ("--seed", "seed", int, "of the initial weights and of dropout"),
    ("--threads", "threads", int, "0: torch's choice"),
    ("--held-out", "held_out", int, "bytes at the end of the text kept for the evaluation"),
    ("--checkpoint-every", "checkpoint_every", int, "steps between checkpoints"),
]


def model_config(changed: Mapping[str, Any]) -> CompressiveTransformerConfig:
    """The default model with some settings changed."""
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
        raise in_options(error) from None


def in_options(error: Exception) -> CliError:
    """An error of the library in the words of the command line."""
    message = str(error).partition(": ")[2]
    names = {name: option for option, name, _, _ in MODEL_OPTIONS}
    names |= {"num_tokens": "--tokens", "top_k": "--top-k", "top_p": "--top-p"}
    names |= {"temperature": "--temperature", "seed": "--seed"}
    return CliError(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), message))


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
            value, name = getattr(self, field.name), field.name.replace("_", "-")
            low = least.get(field.name, 0)
            if not (math.isfinite(value) and value >= low):
                raise CliError(f"--{name} must be at least {low}, got {value}")
            if isinstance(value, int) and value >= 2**63:
                raise CliError(f"--{name} must be below 2**63, got {value}")

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
