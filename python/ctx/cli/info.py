"""`python -m ctx info`: what this installation is made of, as a bug report needs it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from ctx import _C, _load

__all__ = ["add_parser", "run"]

_PACKAGES = ("numpy", "transformers", "accelerate", "safetensors", "gguf", "matplotlib")
_READ = re.compile(r"CTX_\w+|TORCH_CUDA_ARCH_LIST|CUDA_VISIBLE_DEVICES|(OMP|MKL)_NUM_THREADS")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info", help="print what a bug report needs: versions, compiler, machine, variables"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    del args
    rows = _rows()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _rows() -> list[tuple[str, str]]:
    build = _load.build_info
    return [
        ("ctx", f"{build['version']} at {_load.cmake_prefix_path}"),
        ("python", platform.python_version()),
        ("system", f"{platform.platform()}, {_processor()}, {os.cpu_count()} processors"),
        ("torch", f"{torch.__version__} (built against {build['torch']})"),
        ("CUDA", _cuda()),
        ("compiler", f"{build['compiler']}, {build['build_type']}"),
        ("instruction sets", f"{' '.join(_C.cpu_capabilities())}; using {_C.cpu_capability()}"),
        ("threads", str(torch.get_num_threads())),
        ("packages", ", ".join(_packages()) or "none of those that ctx uses"),
        ("variables", " ".join(_variables()) or "none that ctx or its threads read"),
    ]


def _processor() -> str:
    """The model of the processor as the kernel names it, or the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.M)
    return found[1] if found else platform.machine()


def _packages() -> list[str]:
    """The packages that parts of ctx use, where they are installed."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _variables() -> list[str]:
    """Environment variables that change what ctx does or is built as."""
    return [f"{name}={os.environ[name]}" for name in sorted(os.environ) if _READ.fullmatch(name)]


def _cuda() -> str:
    built, targets = _load.build_info["cuda"], _load.build_info["cuda_architectures"]
    ours = f"kernels built with CUDA {built} for {targets}" if built else "no kernels in this build"
    theirs = f"torch has CUDA {torch.version.cuda}" if torch.version.cuda else "torch has none"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{ours}; {theirs}; {', '.join(devices) or 'no device'}"
