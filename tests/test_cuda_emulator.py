"""The CUDA kernels, compiled by a C++ compiler and run by the emulator of tests/cuda_emulator.

Every kernel against float64 loops over random laws, sizes, types and calls; bugs that are planted
must be found; and the operators, by these kernels on memory that the host does not read, against
the same operators by the CPU's kernels. Needs no GPU.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from ctx import _C

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "cuda_emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

# As csrc/kernels/cuda/intrinsics.cuh numbers them, and a program that must find each.
BUGS = {
    "missing barrier": (1, "test_memory"),
    "wrong slot": (2, "test_memory"),
    "wrong clock": (3, "test_attend"),
    "wrong split border": (4, "test_attend"),
    "unmasked empty split": (5, "test_attend"),
    "swapped int8 scale": (6, "test_memory"),
}
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        check=False,
    )


def compiled(to, source, *flags):
    if COMPILER is None or not (SOURCES / source).is_file():
        pytest.skip("needs the sources and a C++ compiler")
    include = ("-I", SOURCES, "-I", ROOT / "csrc", "-I", ROOT / "csrc" / "include")
    done = run(
        COMPILER,
        *("-std=c++20", "-O1", "-DCTX_PLANTED_BUGS"),
        *("-include", SOURCES / "emulator.h"),
        *include,
        *(SOURCES / source, "-o", to),
        *flags,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return to


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a program, once. The attention kernels, most of the work, are compiled once."""

    @cache
    def kernels(sanitize):
        to = tmp_path_factory.mktemp("kernels") / "attend_kernels.o"
        return compiled(to, "attend_kernels.cpp", "-fPIC", "-c", *sanitize)

    @cache
    def get(name, *flags, sanitize=()):
        if name in ("test_attend", "test_spans", "test_bytes", "table"):
            flags = (kernels(sanitize), "-include", SOURCES / "attend_kernels.h", *flags)
        to = tmp_path_factory.mktemp("emulator") / name
        return compiled(to, f"{name}.cpp", *sanitize, *flags)

    return get


def assert_passes(done):
    assert done.returncode == 0, done.stdout[-6000:]
    assert " 0 failures" in done.stdout, done.stdout[-6000:]


@pytest.mark.parametrize("name", ["test_emulator", "test_memory", "test_attend", "test_spans"])
def test_parity(build, name):
    assert_passes(run(build(name)))


def test_bytes_of_a_decode_step(build):
    """At most a twentieth more than every pair that the query sees, once."""
    assert_passes(run(build("test_bytes")))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(build, bug):
    number, name = BUGS[bug]
    done = run(build(name), 40, 0, number)
    assert done.returncode != 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def library(build):
    """The kernels as a library that takes the place of the CPU's."""
    torch_root = Path(torch.__file__).parent
    engine = Path(_C.__file__).parent / "lib"
    return build(
        "table",
        *("-fPIC", "-shared", "-I", torch_root / "include"),
        *("-L", engine, "-lctx", "-L", torch_root / "lib", "-lc10"),
    )


def operators(library, *asked):
    return run(sys.executable, SOURCES / "operators.py", library, *asked, OMP_NUM_THREADS="1")


def test_operators(library):
    assert_passes(operators(library, 60))


@pytest.mark.slow
def test_operators_in_many_cases(library):
    assert_passes(operators(library, 2000, 1000))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, cases", [("test_memory", 3500), ("test_attend", 1500), ("test_spans", 2000)]
)
def test_many_cases(build, name, cases):
    """At least 500 for each kernel and compressor."""
    assert_passes(run(build(name), cases, 1000))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, cases",
    [("test_emulator", 1), ("test_memory", 140), ("test_attend", 100), ("test_spans", 100)],
)
def test_sanitized(build, name, cases):
    """Nothing is read or written out of bounds, whatever the memory's counters say."""
    done = run(
        build(name, sanitize=SANITIZE),
        *(cases, 5000),
        ASAN_OPTIONS="detect_stack_use_after_return=0",
    )
    assert_passes(done)
