"""Options that several commands share, and how settings of the recipes are called on the command
line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ctx.compression import COMPRESSORS
from ctx.recipes.errors import RecipeError, setting_error

__all__ = [
    "DTYPES",
    "MODEL_OPTIONS",
    "RUN_OPTIONS",
    "add_existing_model",
    "add_options",
    "in_options",
    "library_error",
    "set_threads",
    "sizes",
]


#: What a model of transformers may be read as.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_existing_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model of transformers to read, and how to run it."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR",
        help="a Hugging Face model's folder, or one with a .gguf file")  # fmt: skip
    add("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")
    add("--threads", type=int, default=0, metavar="N", help="0: torch's choice")


def library_error(error: Exception, names: Iterable[str]) -> Exception:
    """An error of ``ctx.hf`` for the command line: those of settings `names` give the options."""
    if not str(error).startswith("ctx."):
        return error
    if isinstance(error, ImportError):
        return RecipeError(str(error).partition(": ")[2])
    made = setting_error(error, names)
    return RecipeError(str(made).replace("folder must", "--model must", 1))


def sizes(text: str) -> int | tuple[int, ...]:
    """A size of the memory as it is written on the command line: `64`, or `64,64,0` layer by layer.

    Raises:
        ValueError: it is neither.
    """
    numbers = tuple(int(part) for part in text.split(","))
    return numbers if "," in text else numbers[0]


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

_OPTIONS = {name: option for option, name, _, _ in MODEL_OPTIONS} | {"num_tokens": "--tokens"}


def in_options(message: str) -> str:
    """A message of the recipes, where settings stand in backticks, with their options instead."""

    def option(name: re.Match[str]) -> str:
        return _OPTIONS.get(name[1], f"--{name[1].replace('_', '-')}")

    return re.sub(r"`(\w+)`", option, message)


def add_options(
    parser: argparse.ArgumentParser, options: list[tuple[str, Any, str]], settings: type
) -> None:
    """Adds options of settings (name, type, meaning), with the class's defaults."""
    for name, kind, text in options:
        default = getattr(settings, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=kind, default=default,
            help=f"{text} (default: {default})", metavar={int: "N", float: "X", str: "NAMES"}[kind],
        )  # fmt: skip


def set_threads(count: int) -> int:
    """Uses `count` threads, torch's own choice for 0; returns how many there are."""
    if count < 0:
        raise RecipeError(f"--threads must be at least 0, got {count}")
    if count > 0:
        torch.set_num_threads(count)
    return torch.get_num_threads()
