"""The C++ tests and a session under load, built and run with sanitizers.

    pytest -m slow tests/test_sanitizers.py -s         prints what the programs said
    SOAK_TOKENS=2000000 pytest -m slow ...             a longer soak

Torch's libraries are built without sanitizers. AddressSanitizer sees all memory, as it replaces
malloc. ThreadSanitizer does not see how the threads of one operator wait for each other (barriers
of OpenMP are not instrumented), and would call their work a race; so operators run on one thread
each, and what is looked at is sessions in threads of their own.
"""

import os
import re
import subprocess

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
# Kernels of one instruction set have all the threads that any have.
SETS = {"address,undefined": "", "thread": "DEFAULT"}
MISUSE = {
    "address,undefined": ("leak", "LeakSanitizer: detected memory leaks"),
    "thread": ("race", "ThreadSanitizer: data race"),
}


@pytest.fixture(scope="module", params=SETS, ids=lambda name: name.replace(",", "-"))
def build(request, tmp_path_factory):
    """The folder of the programs."""
    folder = tmp_path_factory.mktemp("sanitizers")
    configure(
        ROOT,
        folder,
        "CTX_BUILD_TESTS=ON",
        "CTX_BUILD_PYTHON=OFF",
        "CTX_UNITY=ON",
        f"CTX_TORCH_ROOT={TORCH}",
        f"CTX_SANITIZE={request.param}",
        f"CTX_INSTRUCTION_SETS={SETS[request.param]}",
    )
    compile_all(folder)
    return folder


@pytest.fixture
def misuse(request, build):
    return MISUSE[request.node.callspec.params["build"]]


def test_programs(build):
    said = run("ctest", "--test-dir", build, "--output-on-failure", env={**os.environ, **OPTIONS})
    print(said)
    assert re.search(r"100% tests passed, 0 tests failed out of \d+", said)


def test_sessions_in_threads(build):
    """One thread for each session, all at the same time."""
    command = (build / "soak_session", "--threads", "4", "--tokens", SOAK_TOKENS)
    said = run(*command, env={**os.environ, **OPTIONS})
    print(said)
    assert re.search(r"^\d+ tokens in \d+ ticks of 4 sessions; \d+ events, \d+ calls", said, re.M)
    assert re.search(r"^\d+ checks, 0 failed$", said, re.M)


def test_misuse_is_found(build, misuse):
    """Or the sanitizer does not see what it should."""
    kind, message = misuse
    command = [str(build / "soak_session"), "--misuse", kind]
    done = subprocess.run(command, env={**os.environ, **OPTIONS}, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert "ctx::Session::" in done.stderr
