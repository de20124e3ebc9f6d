"""PEP 517 backend: setuptools' own, which asks for torch only where none is installed.

A build must use the headers of the very torch it will run with. pip builds in an isolated
environment in which that torch cannot be imported; but the interpreter's install paths still lead
to it, and CMake needs only its files.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

TORCH = "torch>=2.9"


class Torch(NamedTuple):
    """An installed torch: its folder, and its version such as 2.14.1+cu130."""

    root: Path
    version: str

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


def locate_torch() -> Torch | None:
    """Finds the torch to build against without importing it.

    Looks at CTX_TORCH_ROOT, then where `import torch` would find it, then in the folders into which
    pip installs.
    """
    if "CTX_TORCH_ROOT" in os.environ:
        root = Path(os.environ["CTX_TORCH_ROOT"])
        torch = _torch_at(root)
        if torch is None:
            sys.exit(f"ctx: CTX_TORCH_ROOT must be the folder of a torch package, got {root}")
        return torch
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or []) if spec else []
    places += [str(Path(folder) / "torch") for folder in _site_folders()]
    return next(filter(None, (_torch_at(Path(place)) for place in places)), None)


def _site_folders() -> list[str]:
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = Path(sys.prefix) / "pyvenv.cfg"
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    elif re.search(r"include-system-site-packages\s*=\s*true", settings.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        folders += [sysconfig.get_path("purelib", vars=base), site.getusersitepackages()]
    return folders


def _torch_at(root: Path) -> Torch | None:
    version = root / "version.py"
    if not (version.is_file() and (root / "include" / "ATen" / "ATen.h").is_file()):
        return None
    match = re.search(r"^__version__ = '(.+)'$", version.read_text(), re.MULTILINE)
    return Torch(root.resolve(), match[1]) if match else None


def _torch_if_missing() -> list[str]:
    torch = locate_torch()
    if torch is None:
        print(f"ctx: no torch is installed here; asking for {TORCH}", flush=True)
        return [TORCH]
    return []


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_if_missing()]


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_if_missing()]
