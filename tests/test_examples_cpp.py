"""The C++ examples: built and run by the command in their first lines, from a copy of the
repository's examples, against the library of this build."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import ctx
from programs import EXAMPLES, run

pytestmark = pytest.mark.slow

NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/CMakeLists.txt"))


@pytest.fixture
def documented(tmp_path):
    """Runs the command that an example's first lines say, in a copy of the repository's examples,
    with other values of its options, and more of them behind it."""
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake")
    shutil.copytree(EXAMPLES, tmp_path / "examples" / "cpp")
    folder = Path(sys.executable).parent
    generator = {"CMAKE_GENERATOR": "Ninja"} if shutil.which("ninja") else {}
    python = os.pathsep.join([str(Path(ctx.__file__).parents[1]), *sys.path])
    environment = {
        **os.environ,
        **generator,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": python,
        "OMP_NUM_THREADS": "1",
    }

    def call(name, *more, **replaced):
        line = " ".join([command(name), *map(str, more)])
        for old, new in replaced.items():
            option = f"--{old} "
            assert option in line
            line = re.sub(rf"{option}\S+", f"{option}{new}", line)
        return run("bash", "-c", line, cwd=tmp_path, env=environment)

    return call


def command(name):
    source = (EXAMPLES / name / "main.cpp").read_text()
    return re.search(r"^//   (cmake -S .*)$", source, re.MULTILINE)[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_short_description_and_one_command(name):
    lines = (EXAMPLES / name / "CMakeLists.txt").read_text().splitlines()
    assert len(lines) < 20
    assert f"-S examples/cpp/{name} -B build/{name} " in command(name)
    assert f"&& build/{name}/{name}" in command(name)


def test_hello(documented):
    said = documented("hello").splitlines()[-1]
    assert re.fullmatch(r"1000 tokens in \d+ bytes; the last one sees a mean of 929.5", said)


def test_many_streams(documented):
    said = documented("many_streams", seconds=3)
    assert re.search(r"1000 streams of \d+ bytes each, \d+ in a snapshot", said)
    assert re.search(r"\d+ ticks of 32 streams, \d+ tokens/s in them, p50 [\d.]+ ms", said)
    assert float(re.search(r"worst difference (\S+)", said)[1]) < 1e-4


def test_train(documented, tmp_path):
    """It copies, and so does the model of its weights in Python."""
    said = documented("train", "--steps", 300, "--save", tmp_path / "weights")
    share = float(re.search(r"streamed: ([\d.]+) % of the second halves copied", said)[1])
    assert share > 90
    sizes = {"vocab_size": 16, "embed_dim": 64, "num_layers": 2, "num_heads": 4}
    memory = {"window": 4, "compressed": 8, "ratio": 2}
    model = ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**sizes, **memory))
    model.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    word = torch.randint(16, (64, 12))
    logits, _ = model(torch.cat([word, word], 1))
    assert (logits[:, 11:23].argmax(-1) == word).float().mean() > 0.9
