"""From a run folder to its trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctx.recipes import checkpoint
from ctx.recipes.errors import RecipeError
from ctx.recipes.settings import TrainSettings
from ctx.transformer import CompressiveTransformer, CompressiveTransformerConfig

__all__ = ["load_model", "load_settings"]


def load_settings(state: dict[str, Any]) -> tuple[CompressiveTransformerConfig, TrainSettings]:
    """The settings of a checkpoint's run."""
    try:
        return (
            CompressiveTransformerConfig.from_dict(state["config"]),
            TrainSettings(**state["settings"]),
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the checkpoint's settings are not of this version: {error}") from None


def load_model(run: Path) -> CompressiveTransformer:
    """The model of a run folder (or of a checkpoint file), ready for inference."""
    state = checkpoint.load(checkpoint.find(run))
    config, _ = load_settings(state)
    model = CompressiveTransformer(config)
    try:
        model.load_state_dict(state["weights"])
    except RuntimeError:
        raise RecipeError(f"the weights in {run} are not those of its configuration") from None
    return model.eval()
