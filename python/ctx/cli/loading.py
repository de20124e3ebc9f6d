"""From a run folder to its trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ctx.cli import checkpoint
from ctx.cli.errors import CliError
from ctx.cli.settings import TrainSettings
from ctx.transformer import CompressiveTransformer, CompressiveTransformerConfig

__all__ = ["load_model", "load_settings", "set_threads"]


def load_settings(state: dict[str, Any]) -> tuple[CompressiveTransformerConfig, TrainSettings]:
    """The settings of a checkpoint's run."""
    try:
        return (
            CompressiveTransformerConfig.from_dict(state["config"]),
            TrainSettings(**state["settings"]),
        )
    except (TypeError, ValueError) as error:
        raise CliError(f"the checkpoint's settings are not of this version: {error}") from None


def load_model(run: Path) -> CompressiveTransformer:
    """The model of a run folder (or of a checkpoint file), ready for inference."""
    state = checkpoint.load(checkpoint.find(run))
    config, _ = load_settings(state)
    model = CompressiveTransformer(config)
    try:
        model.load_state_dict(state["weights"])
    except RuntimeError:
        raise CliError(f"the weights in {run} are not those of its configuration") from None
    return model.eval()


def set_threads(count: int) -> int:
    """Uses `count` threads, torch's own choice for 0; returns how many there are."""
    if count < 0:
        raise CliError(f"--threads must be at least 0, got {count}")
    if count > 0:
        torch.set_num_threads(count)
    return torch.get_num_threads()
