"""The C++ examples: built as their first lines say, against the library of this build, and run."""

import os
import re

import pytest

from programs import EXAMPLES, build_example, run

pytestmark = pytest.mark.slow

NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/CMakeLists.txt"))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds an example, and returns the program."""
    return lambda name: build_example(name, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_short_description_and_one_command(name):
    lines = (EXAMPLES / name / "CMakeLists.txt").read_text().splitlines()
    assert len(lines) < 20
    source = (EXAMPLES / name / "main.cpp").read_text()
    command = re.search(r"^//   (cmake -S .*)$", source, re.MULTILINE)[1]
    assert f"-S examples/cpp/{name} -B build/{name} " in command
    assert f"&& build/{name}/{name}" in command


def test_hello(build):
    said = run(build("hello"))
    assert re.fullmatch(r"1000 tokens in \d+ bytes; the last one sees a mean of 929.5\n", said)


def test_many_streams(build):
    said = run(build("many_streams"), "--seconds", "3", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert re.search(r"1000 streams of \d+ bytes each, \d+ in a snapshot", said)
    assert re.search(r"\d+ ticks of 32 streams, \d+ tokens/s in them, p50 [\d.]+ ms", said)
    assert float(re.search(r"worst difference (\S+)", said)[1]) < 1e-4
