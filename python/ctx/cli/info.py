"""`python -m ctx info`: what this installation is made of."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

from ctx import _C, _load

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info", help="print versions, compiler, instruction sets and threads"
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
        ("torch", f"{torch.__version__} (built against {build['torch']})"),
        ("CUDA", _cuda()),
        ("compiler", f"{build['compiler']}, {build['build_type']}"),
        ("instruction sets", f"{' '.join(_C.cpu_capabilities())}; using {_C.cpu_capability()}"),
        ("threads", str(torch.get_num_threads())),
    ]


def _cuda() -> str:
    built, targets = _load.build_info["cuda"], _load.build_info["cuda_architectures"]
    ours = f"kernels built with CUDA {built} for {targets}" if built else "no kernels in this build"
    theirs = f"torch has CUDA {torch.version.cuda}" if torch.version.cuda else "torch has none"
    return f"{ours}; {theirs}; {torch.cuda.device_count()} devices"
