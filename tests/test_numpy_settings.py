"""NumPy's numbers are taken wherever a model and its generation take numbers, and kept as plain
ones."""

import dataclasses
import json

import numpy
import pytest
import torch

import ctx
from ctx.generation import Sampling

PLAIN = {"vocab_size": 11, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
         "window": 4, "compressed": [3, 2], "ratio": 2, "segment": 4, "sinks": 1, "max_rewind": 8,
         "mlp_dim": 24, "rotary_dim": 4, "relative_dim": 6, "compressor_kernel": 3,
         "rotary_base": 100.0, "dropout": 0.25, "compressed_bias_init": -4.0}  # fmt: skip


def numpys(value):
    if isinstance(value, list):
        return [numpy.int32(one) for one in value]
    return numpy.int64(value) if isinstance(value, int) else numpy.float32(value)


@pytest.mark.parametrize("name", PLAIN)
def test_a_setting(name):
    plain = ctx.CompressiveTransformerConfig(**PLAIN)
    made = ctx.CompressiveTransformerConfig(**{**PLAIN, name: numpys(PLAIN[name])})
    assert made == plain and hash(made) == hash(plain)
    assert json.loads(json.dumps(made.to_dict())) == plain.to_dict()
    assert {type(x) for x in dataclasses.asdict(made).values()} <= {
        int, float, str, bool, tuple, type(None),
    }  # fmt: skip


def test_sizes_of_all_layers_in_an_array():
    plain = ctx.CompressiveTransformerConfig(**PLAIN)
    sizes = {**PLAIN, "compressed": numpy.array([3, 2])}
    assert ctx.CompressiveTransformerConfig(**sizes) == plain
    twin = ctx.CompressiveTransformer(plain).with_memory(compressed=numpy.array([1, 2]))
    assert twin.config.compressed == (1, 2)
    for bad, error in ((numpy.array([3, 2, 1]), ValueError), (numpy.array([0.5, 2]), TypeError)):
        with pytest.raises(error, match=r"compressed must be .* got"):
            ctx.CompressiveTransformerConfig(**{**PLAIN, "compressed": bad})


def test_a_model_and_its_counts():
    made = ctx.CompressiveTransformerConfig(**{k: numpys(v) for k, v in PLAIN.items()})
    built = ctx.CompressiveTransformer(made).eval()
    tokens = torch.randint(0, 11, (2, 5))
    memory = built.init_memory(numpy.int64(2))
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 1, "stop": 3}
    wanted = built.generate(tokens, 4, **options)
    numbers = {name: numpys(value) for name, value in options.items()}
    assert torch.equal(built.generate(tokens, numpy.int64(4), memory=memory, **numbers), wanted)
    assert torch.equal(torch.stack(list(built.stream(tokens, numpy.int8(4), **numbers)), 1), wanted)
    twin = built.with_memory(window=numpy.int64(6), compressed=[numpy.int64(1), 0])
    assert [s.numbers[:2] for s in twin.schedules] == [(6, 1), (6, 0)]


def test_sampling_keeps_plain_numbers():
    made = Sampling(numpy.float32(0.5), numpy.int64(3), numpy.float64(0.5), numpy.uint8(1))
    assert [type(x) for x in dataclasses.astuple(made)[:4]] == [float, int, float, int]


@pytest.mark.parametrize("name", ["vocab_size", "dropout", "window", "compressed_bias_init"])
@pytest.mark.parametrize("bad", [True, "3", None.__class__, 1 + 1j])
def test_what_is_no_number_is_refused(name, bad):
    with pytest.raises(TypeError, match=name):
        ctx.CompressiveTransformerConfig(**{**PLAIN, name: bad})
