"""Loads the compiled part of ctx, or says in one sentence why it cannot and which command repairs
it.

A compiled extension fits one minor version of torch. Without this module another one would show
itself as an undefined symbol with a mangled name, or not at all.

In an installed package everything lies in one folder. In a source tree the compiled part is in
`build/`, where `pip install -e .` and a plain CMake build leave it; the newest one that fits is
used.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

__all__ = ["build_info", "cmake_prefix_path", "version"]

_PACKAGE = Path(__file__).resolve().parent
_TREE = _PACKAGE.parents[1]  # the repository, if this is one
_IN_TREE = (_TREE / "CMakeLists.txt").is_file()
_MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
_REPAIR = (
    f"cd {_TREE} && pip install --no-build-isolation --no-deps -e ."
    if _IN_TREE
    else "pip install --force-reinstall --no-deps --no-cache-dir .  (in the folder of the sources)"
)


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _builds() -> list[Path]:
    """Folders that hold a module for this Python, the newest first."""
    folders = [_PACKAGE]
    if _IN_TREE:
        folders += [_TREE / "build" / "ctx", *(_TREE / "build").glob("*/ctx")]
    complete = [
        path
        for path in folders
        if (path / _MODULE).is_file() and (path / "_build_info.py").is_file()
    ]
    return sorted(complete, key=lambda path: (path / _MODULE).stat().st_mtime, reverse=True)


def _find() -> tuple[Path, dict[str, Any]]:
    found = [(path, runpy.run_path(str(path / "_build_info.py"))) for path in _builds()]
    for path, info in found:
        if info["torch_minor"] == _minor(torch.__version__):
            return path, info
    if found:
        raise ImportError(
            f"ctx: the compiled part must match the installed torch: it was built against torch "
            f"{found[0][1]['torch']}, but torch {torch.__version__} is installed. "
            f"Rebuild it: {_REPAIR}"
        )
    raise ImportError(
        f"ctx: the compiled part {_MODULE} is missing beside {_PACKAGE}: it has not been built for "
        f"this Python. Build it: {_REPAIR}"
    )


def _load() -> tuple[Path, dict[str, Any]]:
    path, info = _find()
    if path != _PACKAGE:
        sys.modules["ctx"].__path__.append(str(path))
    try:
        importlib.import_module("ctx._C")
    except ImportError as error:
        raise ImportError(
            f"ctx: the compiled part does not load; it was built against torch {info['torch']}, "
            f"and torch {torch.__version__} is installed ({error}). Rebuild it: {_REPAIR}"
        ) from error
    return path, info


_path, build_info = _load()
version: str = build_info["version"]

#: Where CMake finds ctx: `cmake -DCMAKE_PREFIX_PATH="$(python -m ctx --cmake-prefix-path)"`.
cmake_prefix_path: str = str(_path)
