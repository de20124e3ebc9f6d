"""A file from which a fit that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctx import memory_files

__all__ = ["Partial", "fit_hash"]

_WHERE = "ctx.hf.fit"


def fit_hash(*parts: Any) -> str:
    """SHA-256 of everything that a fit depends on: plain values, and integer tensors."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(part.contiguous().numpy().tobytes())
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()


class Partial:
    """What is done of a fit, in a file if there is a path.

    Args:
        path: of the file; None: nothing is kept.
        fit: the hash of the fit; a file of another fit is refused.

    Raises:
        ValueError: the file is of another fit, or none of this class's.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fit: str) -> None:
        self.path = None if path is None else Path(path)
        self.state: dict[str, Any] = {"fit": fit, "layers": [], "alone": {}, "whole": None}
        if self.path is None or not self.path.exists():
            return
        try:
            held = torch.load(self.path, weights_only=True)
            same = held["fit"] == fit
        except Exception as error:
            raise ValueError(
                f"{_WHERE}: partial must be a file of an interrupted fit, got {str(self.path)!r} "
                f"({type(error).__name__})"
            ) from None
        if not same:
            raise ValueError(
                f"{_WHERE}: partial must be of the same model, texts and settings, got the file "
                f"{str(self.path)!r} of another fit; remove it to begin anew"
            )
        self.state = held

    def keep(self) -> None:
        """Writes what is done, whole or not at all."""
        if self.path is not None:
            memory_files.replaced(self.path, self.state, _WHERE)

    def done(self) -> None:
        """Removes the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
