"""Builds of the C++ library by CMake, without Python."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from programs import run

ROOT = Path(__file__).resolve().parents[1]
CONSUMER = ROOT / "tests" / "cmake_consumer"
TORCH = Path(torch.__file__).parent


def configure(source, folder, *options):
    """CMake's output; `options` are names and values as on its command line."""
    if not (ROOT / "CMakeLists.txt").is_file() or shutil.which("cmake") is None:
        pytest.skip("needs the sources and CMake")
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    return run("cmake", "-S", source, "-B", folder, *ninja, *(f"-D{each}" for each in options))


def compile_all(folder, *targets):
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", os.cpu_count() or 1)
    run("cmake", "--build", folder, "--parallel", jobs, *(f"--target={each}" for each in targets))
