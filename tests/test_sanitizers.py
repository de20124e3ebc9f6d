"""The C++ tests and a session under load, built and run with sanitizers.

    pytest -m slow tests/test_sanitizers.py -s         prints what the programs said
    SOAK_TOKENS=2000000 pytest -m slow ...             a longer soak
    SANITIZER_BUILDS=build pytest -m slow ...          keeps the programs, in build/asan, build/tsan

Torch's libraries are built without sanitizers. AddressSanitizer sees all memory, as it replaces
malloc. ThreadSanitizer does not see how the threads of one operator wait for each other (barriers
of OpenMP are not instrumented), and would call their work a race; so operators run on one thread
each, and what is looked at is sessions in threads of their own.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from cpp_builds import ROOT, TORCH, compile_all, configure
from programs import run

pytestmark = pytest.mark.slow

SOAK_TOKENS = int(os.environ.get("SOAK_TOKENS", 40_000))
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "OMP_NUM_THREADS": "1",
}


class Kind(NamedTuple):
    """A way to build, what of it is run, and a misuse with its report."""

    name: str
    sanitizers: str
    instruction_sets: str
    programs: str  # as ctest -R takes it
    targets: tuple[str, ...]
    misuse: str
    report: str


KINDS = [
    Kind("asan", "address,undefined", "", ".", (), "leak", "LeakSanitizer: detected memory leaks"),
    # The programs that have threads; kernels of one instruction set have all that any have.
    Kind(
        "tsan",
        "thread",
        "DEFAULT",
        "session",
        ("soak_session", "test_session"),
        "race",
        "ThreadSanitizer: data race",
    ),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def build(kind, tmp_path_factory):
    """The folder of the programs."""
    kept = os.environ.get("SANITIZER_BUILDS")
    folder = Path(kept) / kind.name if kept else tmp_path_factory.mktemp(kind.name)
    configure(
        ROOT,
        folder,
        "CTX_BUILD_TESTS=ON",
        "CTX_BUILD_PYTHON=OFF",
        "CTX_UNITY=ON",
        f"CTX_TORCH_ROOT={TORCH}",
        f"CTX_SANITIZE={kind.sanitizers}",
        f"CTX_INSTRUCTION_SETS={kind.instruction_sets}",
    )
    compile_all(folder, *kind.targets)
    return folder


def test_programs(build, kind):
    command = ("ctest", "--test-dir", build, "-R", kind.programs, "--output-on-failure")
    said = run(*command, env={**os.environ, **OPTIONS})
    print(said)
    assert re.search(r"100% tests passed(, 0 tests failed)? out of [1-9]", said)


def test_sessions_in_threads(build):
    """One thread for each session, all at the same time."""
    command = (build / "soak_session", "--threads", "4", "--tokens", SOAK_TOKENS)
    said = run(*command, env={**os.environ, **OPTIONS})
    print(said)
    assert re.search(r"^\d+ tokens in \d+ ticks of 4 sessions; \d+ events, \d+ calls", said, re.M)
    assert re.search(r"^\d+ checks, 0 failed$", said, re.M)


def test_misuse_is_found(build, kind):
    """Or the sanitizer does not see what it should."""
    command = [str(build / "soak_session"), "--misuse", kind.misuse]
    done = subprocess.run(command, env={**os.environ, **OPTIONS}, capture_output=True, text=True)
    assert done.returncode != 0
    assert kind.report in done.stderr
    assert "ctx::Session::" in done.stderr
