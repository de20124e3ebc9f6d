"""A model as a graph of tensors and as a package: the same logits as the model's, for any number of
rows and tokens, and the same bytes from a C++ program (examples/cpp/stream)."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

import ctx
from ctx import export
from ctx.memory_rows import leaves
from programs import build_example
from strategies import assert_close, assert_same_bits

SIZES = {"window": 12, "compressed": 8, "ratio": 4, "segment": 8, "sinks": 1}


def make(**changed):
    """A small model of bytes whose texts do not repeat themselves: its weights are large."""
    torch.manual_seed(0)
    settings = {"vocab_size": 256, "embed_dim": 32, "num_layers": 2, "num_heads": 4, **SIZES}
    config = ctx.CompressiveTransformerConfig(**{**settings, "tied": False, **changed})
    model = ctx.CompressiveTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "compressor" in name:  # which begin as a mean
                parameter.add_(torch.randn_like(parameter) / 2)
            elif parameter.dim() > 1:
                parameter.mul_(20)
    return model


def calls(rows, sizes):
    """(tokens, lengths) of one call after the other, ragged."""
    for tokens in sizes:
        lengths = torch.randint(0, tokens + 1, (rows,))
        yield torch.randint(0, 256, (rows, tokens)), lengths


def assert_same_stream(step, model, rows, sizes, **dtype):
    """The step's logits and what it leaves in its memory are those of the model's calls."""
    ours, theirs = (model.init_memory(rows, **dtype) for _ in range(2))
    for tokens, lengths in calls(rows, sizes):
        logits = step(tokens, lengths, leaves(ours))
        with torch.no_grad():
            expected, _ = model(tokens, theirs, lengths=lengths, last_only=True)
        assert logits.shape == (rows, model.config.vocab_size)
        assert_close(logits, expected, 1e-5)
    *mine, seen, rewindable = leaves(ours)
    *yours, their_seen, their_rewindable = leaves(theirs)
    assert_same_bits(seen, their_seen)
    assert_same_bits(rewindable, their_rewindable)
    for x, y in zip(mine, yours, strict=True):
        assert_close(x.double(), y.double(), 1e-5)


RAGGED = [1, 5, 1, 9, 70, 1, 1, 16, 3]  # also beyond max_rewind, 64


@pytest.mark.parametrize(
    "changed",
    [
        *({"compressor": name} for name in ctx.compression.COMPRESSORS),
        {"memory_content": "hidden"},
        {"position": "relative", "compressor_kernel": 9},
        {"window": [12, 4], "compressed": [8, 0], "max_rewind": 1},
    ],
    ids=str,
)
def test_program(changed):
    """One graph for any number of rows and tokens, which writes the memory that it is given."""
    model = make(num_layers=len(changed.get("window", [0])), **changed)
    step = export.program(model).module()
    for rows in (1, 3):
        assert_same_stream(step, model, rows, RAGGED)


def test_program_with_small_slots():
    model, dtype = make(num_layers=1), {"compressed_dtype": torch.int8}
    step = export.program(model, **dtype).module()
    assert_same_stream(step, model, 2, RAGGED, **dtype)


def test_program_evaluates():
    """What drops activations in training does not in a graph; the model stays as it was."""
    model = make(num_layers=1, dropout=0.5).train()
    step = export.program(model).module()
    assert model.training and model.blocks[0].training
    model.eval()
    assert_same_stream(step, model, 2, [4, 1])


class Copying(nn.Module):
    """A wrapper that gives a block copies of what it is given, as tools that move tensors do."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, memory, *others):
        return self.block(x, tree_map(torch.clone, memory), *others)


def test_program_of_a_wrapped_block():
    model = make()
    model.blocks[1] = Copying(model.blocks[1])
    step, plain = export.program(model).module(), make()
    assert_same_stream(step, plain, 2, RAGGED)


@pytest.fixture
def compiled(monkeypatch):
    """In place of the compiler: what it was called with, and a file."""
    seen = {}

    def compiler(program, *, package_path, inductor_configs):
        seen.update(inductor_configs["aot_inductor.metadata"])
        Path(package_path).write_bytes(b"new")
        if seen.get("fail"):
            raise RuntimeError("no compiler")
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    return seen


def test_metadata(compiled, tmp_path):
    """What a program must know to make a memory travels with the package."""
    model = make(num_layers=1)
    export.save(model, tmp_path / "model.pt2", compressed_dtype=torch.bfloat16)
    assert compiled["ctx_format"] == "1" and compiled["ctx_vocab_size"] == "256"
    words = compiled["ctx_state"].split()
    state = leaves(model.init_memory(5, compressed_dtype=torch.bfloat16))
    assert len(words) == 2 * len(state)
    for dtype, sizes, x in zip(words[::2], words[1::2], state, strict=True):
        shape = [5 if size == "B" else int(size) for size in sizes.split("x")]
        assert getattr(torch, dtype) == x.dtype and shape == list(x.shape)


def test_a_package_is_written_whole_or_not_at_all(compiled, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    compiled["fail"] = True
    with pytest.raises(RuntimeError, match="no compiler"):
        export.save(make(num_layers=1), path)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"old"
    compiled["fail"] = False
    export.save(make(num_layers=1), path)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"new"


@pytest.mark.parametrize("call", [export.program, lambda model: export.save(model, "model.pt2")])
def test_models_that_cannot_be_exported(call):
    layer = ctx.CompressiveAttention(8, 2, window=4, compressed=2, ratio=2)
    with pytest.raises(TypeError, match=r"^ctx.export.*CompressiveTransformer, got Compressive"):
        call(layer)
    with torch.device("meta"):
        absent = make()
    with pytest.raises(ValueError, match=r"model must be on the CPU, got meta of embedding.weight"):
        call(absent)
    split = make()
    weight = split.norm.weight.detach()
    split.norm.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    with pytest.raises(TypeError, match=r"model must have plain tensors, got TwoTensor as norm.we"):
        call(split)


def test_paths_that_cannot_be_written(compiled, tmp_path):
    model = make(num_layers=1)
    with pytest.raises(ValueError, match=r"path must be a file that ends with .pt2, got '.*/m.so'"):
        export.save(model, tmp_path / "m.so")
    (tmp_path / "m.pt2").mkdir()
    with pytest.raises(ValueError, match=r"path must be .*, got the folder '.*/m.pt2'"):
        export.save(model, tmp_path / "m.pt2")
    with pytest.raises(TypeError, match=r"ctx.export.save: path must be a str, .*, got int"):
        export.save(model, 3)
    with pytest.raises(FileNotFoundError):
        export.save(model, tmp_path / "nowhere" / "m.pt2")
    assert not compiled  # all of it before the compiler is called


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """examples/cpp/stream."""
    return build_example("stream", tmp_path_factory.mktemp("stream"))


def streamed(program, package, count, prompt):
    """What the program wrote for a prompt."""
    done = subprocess.run(
        [str(program), str(package), str(count)],
        input=prompt,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr.endswith(b" tokens/s\n")
    return done.stdout


PROMPT = Path(__file__).read_bytes()[:700]  # longer than what the program reads at once


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"compressor": "conv"},
        {"compressor": "gated", "num_kv_heads": 2},
        {"compressor": "mean", "position": "alibi"},
        {"compressor": "most_used"},
        {"memory_content": "hidden", "num_layers": 1},
    ],
    ids=str,
)
def test_a_package_streams(changed, program, monkeypatch, tmp_path):
    """The C++ program writes byte for byte what `generate` does; and rows of unequal length stream
    through the same package as through the model."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model, path, count = make(**changed), tmp_path / "model.pt2", 2200
    export.save(model, path)
    text = streamed(program, path, count, PROMPT)
    prompt = torch.tensor([list(PROMPT)])
    assert text == bytes(model.generate(prompt, count, temperature=0)[0].tolist())
    # There is something to compare: no loop of a few bytes, and one that depends on the slots.
    assert len({text[i : i + 4] for i in range(count)}) > count // 2
    window = model.with_memory(compressed=0)
    assert text != bytes(window.generate(prompt, count, temperature=0)[0].tolist())
    package = torch._inductor.aoti_load_package(str(path))
    for rows in (1, 4):
        assert_same_stream(package, model, rows, [*RAGGED, 150, *RAGGED])
    assert_untouched_by_errors(package, model)


def assert_untouched_by_errors(package, model):
    """Bad inputs raise, and leave every tensor of the memory as it was."""
    memory = model.init_memory(2)
    package(torch.randint(0, 256, (2, 70)), torch.tensor([70, 41]), leaves(memory))
    before = memory.clone()
    for token, lengths in ((256, [2, 2]), (-300, [2, 2]), (7, [3, 2]), (7, [2, -1]), (7, [2])):
        with pytest.raises(RuntimeError):
            package(torch.tensor([[1, 2], [token, 3]]), torch.tensor(lengths), leaves(memory))
        for mine, old in zip(leaves(memory), leaves(before), strict=True):
            assert_same_bits(mine, old)


@pytest.mark.slow
def test_errors_of_the_program(program, tmp_path):
    """One line on stderr, nothing on stdout."""
    for arguments, code, said in (
        ([], 2, b"usage: "),
        (["model.pt2", "0"], 2, b"usage: "),
        ([tmp_path / "model.pt2", "5"], 1, b"model.pt2: "),
    ):
        done = subprocess.run([program, *arguments], input=b"x", capture_output=True)
        assert (done.returncode, done.stdout) == (code, b"")
        assert said in done.stderr and done.stderr.count(b"\n") == 1
