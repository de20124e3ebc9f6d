"""A model and its tokenizer from a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ctx.hf._transformers import cache_classes

__all__ = ["load_config", "load_model"]

_WHERE = "ctx.hf.load_model"


def load_model(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A causal language model of transformers, in evaluation mode, and its tokenizer.

    Nothing is fetched from a network, and no code of the folder is run.

    Args:
        folder: one that ``save_pretrained`` wrote, or one with a single ``.gguf`` file and no
            ``config.json``, whose weights are de-quantised (needs the packages gguf and
            accelerate).
        dtype: of the weights.

    Returns:
        (model, tokenizer).

    Raises:
        ValueError: there is no such folder, model or tokenizer in it; one line.
        ImportError: transformers, or a package that this folder needs, is missing; one line.
    """
    path, options = _found(folder)
    cache_classes()
    import transformers

    # First what is small: without it the model is of no use.
    with _quiet(transformers):
        tokenizer = _read(transformers.AutoTokenizer, "tokenizer", path, options)
        options["dtype"] = dtype
        model = _read(transformers.AutoModelForCausalLM, "model", path, options)
    return model.eval(), tokenizer


def load_config(folder: str | os.PathLike[str]) -> Any:
    """The configuration of the model in a folder, without its weights; as :func:`load_model`."""
    path, options = _found(folder)
    cache_classes()
    import transformers

    with _quiet(transformers):
        return _read(transformers.AutoConfig, "configuration", path, options)


def _found(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The folder, and how transformers is to read it."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{_WHERE}: folder must be that of a model, got {path}")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if not (path / "config.json").is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) != 1:
            raise ValueError(
                f"{_WHERE}: folder must have a config.json or one .gguf file, "
                f"got {', '.join(found) or 'neither'} in {path}"
            )
        options["gguf_file"] = found[0]
    return path, options


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """In it transformers shows no bars and no warnings: what is wrong is one line, the error's."""
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read(kind: Any, what: str, path: Path, options: dict[str, Any]) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except MemoryError:
        raise
    except ImportError as error:
        raise ImportError(f"{_WHERE}: {_first_line(error)}") from error
    except Exception as error:  # of many types, for whatever is wrong in a folder
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise ValueError(
            f"{_WHERE}: folder must have a {what} that transformers reads, got {path}: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
