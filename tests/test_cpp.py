"""The C++ tests: built by CMake without Python, run, and snapshots exchanged in both directions.

CTX_SANITIZE=address,undefined builds them with these sanitizers.
"""

from pathlib import Path

import pytest
import torch

import ctx
from programs import run
from snapshot_files import HOSTILE, HOSTILE_ABOUT, state
from strategies import assert_same_bits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
B, H, HKV, D, DV = 2, 4, 2, 6, 4  # tests/cpp/streams.h


@pytest.fixture
def build(consumer_with_sources):
    """The folder of the built C++ tests."""
    return consumer_with_sources / "ctx"


def test_ctest(build):
    said = run("ctest", "--test-dir", build, "--output-on-failure")
    names = sorted(path.stem for path in (ROOT / "tests" / "cpp").glob("test_*.cpp"))
    assert names
    for name in names:
        assert f"{name} ..." in said and "100% tests passed" in said, said


def memory():
    """ctx::test::options() of tests/cpp/streams.h."""
    options = {"compressor": "conv", "rotary_dim": 4, "max_rewind": 7}
    return ctx.KVMemory(ctx.Schedule(5, 3, 2, 4, 1), B, HKV, D, DV, **options)


def tokens(first, count):
    """ctx::test::Tokens."""

    def cut(heads, width, salt):
        place = torch.arange(B * heads * 100 * width)
        numbers = ((place * 7919 + salt * 104729) % 2003).double().div(1001.5).sub(1)
        return numbers.view(B, heads, 100, width).float()[:, :, first : first + count]

    return cut(H, D, 1), cut(HKV, D, 2), cut(HKV, DV, 3)


def assert_same_memory(got, want):
    for name, tensor in want.tensors.items():
        assert_same_bits(got.tensors[name], tensor)


def test_python_reads_what_cpp_wrote(build, tmp_path):
    """And the outputs, and what comes after, are the same bit for bit."""
    snapshot, outputs = tmp_path / "cpp.ctx", tmp_path / "outputs.pt"
    run(build / "test_snapshot", "write", snapshot, outputs)
    here, there = memory(), memory()
    first = here.step(*tokens(0, 37))
    there.load(snapshot)
    assert_same_memory(there, here)
    assert_same_bits(torch.load(outputs, weights_only=True), first)
    assert state(snapshot.read_bytes()).keys() == here.state_dict().keys()
    assert_same_bits(there.step(*tokens(37, 23)), here.step(*tokens(37, 23)))


@pytest.mark.parametrize("writer", ["save", "torch.save"])
def test_cpp_goes_on_from_what_python_wrote(build, tmp_path, writer):
    snapshot, outputs = tmp_path / "python.ctx", tmp_path / "outputs.pt"
    here, back = memory(), memory()
    here.step(*tokens(0, 37))
    if writer == "save":
        here.save(snapshot)
    else:
        torch.save(here.state_dict(), snapshot)
    run(build / "test_snapshot", "continue", snapshot, tmp_path / "cpp.ctx", outputs)
    assert_same_bits(torch.load(outputs, weights_only=True), here.step(*tokens(37, 23)))
    back.load(tmp_path / "cpp.ctx")
    assert_same_memory(back, here)


def test_cpp_refuses_hostile_files(build, tmp_path):
    """What tests/test_snapshot_files.py reads in this process; sanitizers see it here."""
    paths = []
    for number, (data, _) in enumerate([*HOSTILE.values(), *HOSTILE_ABOUT.values()]):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(data)
    assert f"{len(paths)} checks, 0 failed" in run(build / "test_snapshot", "refused", *paths)


def test_changed_bytes(build):
    """Of today's snapshots and of those of format 1; see the arguments of the program."""
    old = [ROOT / "tests" / "snapshots" / name for name in ("kv_memory_1.ctx", "session_1.ctx")]
    said = run(build / "test_snapshot", "flips", 1000, 2, *old)
    assert said.count("1000 changed bytes") == 5 and said.count("1000 refused") == 3
