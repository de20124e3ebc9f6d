"""The C++ examples: built as their first lines say, against the library of this build, and run."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import ctx
from programs import run

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "cpp"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/CMakeLists.txt"))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds an example, and returns the program."""
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake")

    def get(name):
        folder = tmp_path_factory.mktemp(name)
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        prefix = f"-DCMAKE_PREFIX_PATH={ctx.cmake_prefix_path}"
        run("cmake", "-S", EXAMPLES / name, "-B", folder, *ninja, prefix)
        run("cmake", "--build", folder)
        return folder / name

    return get


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


def test_train(build, tmp_path):
    """It copies, and so does the model of its weights in Python."""
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    said = run(build("train"), "--steps", "300", "--save", tmp_path / "weights", **options)
    share = float(re.search(r"streamed: ([\d.]+) % of the second halves copied", said)[1])
    assert share > 90
    sizes = {"vocab_size": 16, "embed_dim": 64, "num_layers": 2, "num_heads": 4}
    memory = {"window": 4, "compressed": 8, "ratio": 2}
    model = ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**sizes, **memory))
    model.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    word = torch.randint(16, (64, 12))
    logits, _ = model(torch.cat([word, word], 1))
    assert (logits[:, 11:23].argmax(-1) == word).float().mean() > 0.9
