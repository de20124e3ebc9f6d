"""The examples run as a user starts them, and print what they promise."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command_line import environment
from ctx.compression import COMPRESSORS
from strategies import assert_close

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "python"


def test_attention_pooling_learns_what_a_mean_cannot_keep():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "attention_pooling.py"],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(
        float, re.search(r"([\d.]+) at first, ([\d.]+) at last", done.stdout).groups()
    )
    errors = dict(re.findall(r"error of a stream, (\w+) +([\d.]+)", done.stdout))
    assert last < first / 3
    assert float(errors["attention_pooling"]) < float(errors["mean"]) / 5


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "attention_pooling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del COMPRESSORS["attention_pooling"]


def test_attention_pooling_starts_as_a_mean_and_has_gradients(example):
    pooling = example.AttentionPooling(2, 4, 16)
    keys, values = torch.randn(2, 3, 2, 5, 4, 16).unbind(0)
    slots = pooling(keys, values)
    assert_close(slots[0], keys.mean(-2), 1e-5)
    assert_close(slots[1], values.mean(-2), 1e-5)
    (slots[0].square().sum() + slots[1].square().sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in pooling.parameters())


def test_attention_pooling_is_known_by_its_name(example):
    assert COMPRESSORS["attention_pooling"] is example.AttentionPooling


def test_endless_generation_is_bounded_and_exact():
    pytest.importorskip("transformers", minversion="5.17", reason="needs transformers")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "endless_generation.py", "--turns", "4", "--tokens", "60"],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    turns = re.findall(r"(\d+) tokens seen, (\d+) bytes", done.stdout)
    assert [int(seen) for seen, _ in turns] == [159, 269, 379, 489]
    assert len({size for _, size in turns}) == 1
    assert float(re.search(r"text at once: (\S+)", done.stdout)[1]) < 1e-4
