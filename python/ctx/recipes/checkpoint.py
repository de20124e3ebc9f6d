"""One file that holds a run: written whole or not at all, read without running any code."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from ctx.recipes.errors import RecipeError

__all__ = ["FILE_NAME", "VERSION", "find", "load", "save"]

FILE_NAME = "checkpoint.pt"
FORMAT = "ctx-checkpoint"
VERSION = 1

_PARTS: dict[str, Any] = {
    "config": dict,  # CompressiveTransformerConfig.to_dict()
    "settings": dict,  # TrainSettings
    "files": list,  # absolute paths of the texts; empty: the standard library
    "digest": str,  # of the texts
    "compare": bool,  # whether models with a window alone are trained, too
    "step": int,  # steps done = index of the next chunk of the streams
    "weights": dict,
    "optimizer": dict,
    "gradients": dict,  # by parameter, summed since the last update; empty right behind one
    "memory": (dict, list, type(None)),  # Memory.state_dict(); once a dict per layer
    "rng": torch.Tensor,
    "seconds": float,  # spent in training so far
}


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes to a temporary file, syncs, and renames: the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself must reach the disk, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror or error}") from None


def find(run: Path) -> Path:
    """The checkpoint of a run folder, or the file itself."""
    path = run / FILE_NAME if run.is_dir() else run
    if not path.is_file():
        raise RecipeError(f"{run} must be a run folder with a {FILE_NAME}, found none")
    return path


def load(path: Path) -> dict[str, Any]:
    """Reads and checks a checkpoint; tensors and plain values only (`weights_only=True`)."""
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other people's pickles
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        raise RecipeError(
            f"{path} must be a checkpoint of ctx, got a damaged or foreign file"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RecipeError(f"{path} must be a checkpoint of ctx, got another kind of file")
    if state.get("version") != VERSION:
        raise RecipeError(
            f"{path} must be a checkpoint of version {VERSION}, got version {state.get('version')}"
        )
    state.setdefault("gradients", {})  # before updates could wait, none ever did
    state.setdefault("compare", False)  # before there was `compare`
    for name, kind in _PARTS.items():
        if name not in state or not isinstance(state[name], kind):
            raise RecipeError(f"{path} must be a checkpoint of ctx, got one without {name}")
    return state
