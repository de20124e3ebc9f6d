"""Settings shared by all tests.

    pytest                                    a few thousand random cases, the same ones every time
    pytest -n auto --dist worksteal           the same, a process for each core
    pytest --hypothesis-profile=ci            three times as many, the same ones every time
    pytest --hypothesis-profile=explore       ten times as many, different ones every time

A test asks for its own number of cases with `strategies.cases(n)`; the profile multiplies it.
"""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import cpp_builds
from combinations_table import COVERED, table

SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("quick", max_examples=100, derandomize=True, **SLOW_IS_FINE)
settings.register_profile("ci", max_examples=300, derandomize=True, print_blob=True, **SLOW_IS_FINE)
settings.register_profile("explore", max_examples=1000, print_blob=True, **SLOW_IS_FINE)
settings.load_profile("quick")


# Tiny tensors: a second thread only waits. Tests of threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def consumer_with_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a build of tests/cmake_consumer, outside the tree, with add_subdirectory of
    this repository and its C++ tests; `ctx` in it is the library's own.

    CTX_SANITIZE=address,undefined builds with these sanitizers.
    """
    folder = tmp_path_factory.mktemp("consumer")
    shutil.copytree(cpp_builds.CONSUMER, folder / "source")
    sanitizers = os.environ.get("CTX_SANITIZE", "")
    cpp_builds.configure(
        folder / "source",
        folder / "build",
        f"CTX_SOURCE={cpp_builds.ROOT}",
        f"CTX_TORCH_ROOT={cpp_builds.TORCH}",
        "CTX_BUILD_TESTS=ON",
        "CTX_UNITY=ON",
        "CMAKE_BUILD_TYPE=Release",
        f"CTX_SANITIZE={sanitizers}",
        f"CMAKE_EXE_LINKER_FLAGS={sanitizers and '-fsanitize=' + sanitizers}",
    )
    cpp_builds.compile_all(folder / "build")
    return folder / "build"


def pytest_collection_finish() -> None:
    """Modules and collected tests stay to the end: the garbage collector need not search them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist sends what it compared to the process that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["covered"] = sorted(COVERED, key=str)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Takes over what a worker sent."""
    COVERED.update(tuple(entry) for entry in getattr(node, "workeroutput", {}).get("covered", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of combinations that were compared, where test_combinations.py ran."""
    if COVERED:
        terminalreporter.section("combinations that agree with the reference")
        for line in table():
            terminalreporter.write_line(line)
