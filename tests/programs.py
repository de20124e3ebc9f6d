"""Programs that tests build and run."""

import shutil
import subprocess
from pathlib import Path

import pytest

import ctx

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "cpp"


def run(*command, **options):
    """Runs a program; what it said is in the failure."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-6000:]}"
    return done.stdout


def build_example(name, folder):
    """Builds examples/cpp/`name` in `folder`, against the library of this build; returns it.

    Needs CMake: where there is none the test is skipped.
    """
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake")
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    prefix = f"-DCMAKE_PREFIX_PATH={ctx.cmake_prefix_path}"
    run("cmake", "-S", EXAMPLES / name, "-B", folder, *ninja, prefix)
    run("cmake", "--build", folder)
    return folder / name
