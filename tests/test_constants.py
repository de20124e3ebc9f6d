"""Constants that follow from settings are right, however a module was built, cast or loaded.

Modules of every setting are walked: none may own a buffer that its state does not hold.
"""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch

import ctx
from pairwise import pairwise
from strategies import COMPRESSORS, POOLING, assert_close, assert_same_bits

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1}
POSITIONS = ["rotary", "relative", "alibi", None]
BIASES = ["none", "log_ratio", "learned"]
SETTINGS = [
    {"position": position, "compressed_bias": bias, "compressor": name, "memory_content": content}
    for position, bias, name, content in pairwise(
        *(POSITIONS, BIASES, COMPRESSORS, ["kv", "hidden"]),
        allowed=lambda _position, _bias, name, content: content == "kv" or name in POOLING,
    )
]


def name_of(settings):
    return "-".join(str(value) for value in settings.values())


def attention(device=None, **options):
    return ctx.CompressiveAttention(12, 6, 3, **{**SIZES, **options}, device=device)


def on_meta(twin, **options):
    """Built on meta, given memory that holds anything, and loaded."""
    made = attention("meta", **options).to_empty(device="cpu")
    for tensor in [*made.parameters(), *made.buffers()]:
        with torch.no_grad():
            tensor.fill_(float("nan"))
    result = made.load_state_dict(twin.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    return made


def assigned(twin, **options):
    made = attention("meta", **options)
    made.load_state_dict(twin.state_dict(), strict=True, assign=True)
    return made


def through(save):
    def copied(twin, **options):
        buffer = io.BytesIO()
        save(twin, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return copied


WAYS = {
    "meta": on_meta,
    "assign": assigned,
    "deepcopy": lambda twin, **options: copy.deepcopy(twin),
    "pickle": lambda twin, **options: pickle.loads(pickle.dumps(twin)),
    "save": through(torch.save),
    "cast": lambda twin, **options: copy.deepcopy(twin).to(torch.bfloat16).float(),
}


def outputs(attn, x):
    parallel, _ = attn(x)
    with torch.no_grad():
        parts, memory = [], attn.init_memory(len(x))
        for piece in x.split(5, 1):
            y, memory = attn(piece, memory)
            parts.append(y)
    return [parallel.detach(), *parts]


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_nothing_is_lost(settings):
    twin = attention(**settings)
    with torch.no_grad():
        for parameter in twin.parameters():  # no rounding when cast to bfloat16 and back
            parameter.copy_(torch.randn_like(parameter).bfloat16())
    assert [name for name, _ in twin.named_buffers() if name not in twin.state_dict()] == []
    x = torch.randn(2, 23, 12)
    want = outputs(twin, x)
    for way, made in WAYS.items():
        other = made(twin, **settings)
        if settings["position"] == "alibi":
            assert_same_bits(other.alibi_slopes, ctx.positions.alibi_slopes(6).float())
        if settings["compressed_bias"] == "log_ratio":
            assert_same_bits(other.compressed_bias, torch.full((6,), math.log(2)))
        for got, expected in zip(outputs(other, x), want, strict=True):
            try:
                assert_same_bits(got, expected)
            except AssertionError:
                raise AssertionError(way) from None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position, bias", [("alibi", "none"), ("rotary", "log_ratio")])
def test_follow_the_dtype(position, bias, dtype):
    """In the dtype that the module has now, and as exact as it can be."""
    attn = attention(position=position, compressed_bias=bias).bfloat16().to(dtype)
    want = attention(position=position, compressed_bias=bias).to(dtype)
    want.load_state_dict(attn.state_dict())
    if position == "alibi":
        assert_same_bits(attn.alibi_slopes, ctx.positions.alibi_slopes(6).to(dtype))
    else:
        assert_same_bits(attn.compressed_bias, torch.full((6,), math.log(2), dtype=dtype))
    x = torch.randn(2, 23, 12, dtype=dtype)
    assert_same_bits(attn(x)[0], want(x)[0])


def test_are_no_part_of_the_state():
    attn = attention(position="alibi", compressed_bias="log_ratio")
    assert list(attn.buffers()) == []
    for name in ("alibi_slopes", "compressed_bias"):
        assert name not in attn.state_dict() and name not in dict(attn.named_parameters())
    with torch.device("meta"):
        assert attention(position="alibi").alibi_slopes.is_meta
    learned = attention(compressed_bias="learned")
    assert isinstance(learned.compressed_bias, torch.nn.Parameter)
    assert learned.state_dict()["compressed_bias"].shape == (6,)
    learned.compressed_bias = torch.nn.Parameter(torch.ones(6))
    assert_same_bits(learned.compressed_bias.detach(), torch.ones(6))
    torch.nn.utils.parametrize.register_parametrization(
        learned, "compressed_bias", torch.nn.Softplus()
    )
    assert_close(learned.compressed_bias.detach(), torch.nn.functional.softplus(torch.ones(6)), 0)
    learned(torch.randn(1, 19, 12))[0].sum().backward()
    assert learned.parametrizations.compressed_bias.original.grad.abs().sum() > 0


def test_what_is_asked_for_may_be_written_to():
    """Layers share the constant that they compute with, and no caller gets that."""
    attn, x = attention(position="alibi", compressed_bias="log_ratio"), torch.randn(1, 19, 12)
    before = attn(x)[0]
    attn.alibi_slopes.fill_(7.0)
    attn.compressed_bias.fill_(7.0)
    assert_same_bits(attn.alibi_slopes, ctx.positions.alibi_slopes(6).float())
    assert_same_bits(attn(x)[0], before)


def test_made_in_inference_mode_they_serve_training():
    """The first call may be in inference mode; the constants that it makes are kept."""
    ctx.constants._MADE.clear()
    attn = attention(position="alibi", compressed_bias="log_ratio")
    x = torch.randn(1, 19, 12)
    with torch.inference_mode():
        attn(x)
    attn(x)[0].sum().backward()
    assert all(p.grad is not None for p in attn.parameters())
    assert len(ctx.constants._MADE) == 2


@pytest.mark.parametrize("grad", [True, False])
def test_compiled(grad):
    attn = attention(position="alibi", compressed_bias="log_ratio")
    ctx.constants._MADE.clear()
    x = torch.randn(2, 19, 12)
    with torch.set_grad_enabled(grad):
        got = torch.compile(attn, fullgraph=True, backend="aot_eager")(x)[0]
        assert ctx.constants._MADE == {}
        assert_close(got, attn(x)[0], 1e-6)


@pytest.mark.parametrize("position, bias", [*itertools.product(POSITIONS, BIASES)])
def test_a_model(position, bias):
    """The whole of it, as training programs build one: on meta, then loaded."""
    config = ctx.CompressiveTransformerConfig(
        vocab_size=20,
        embed_dim=12,
        num_layers=2,
        num_heads=6,
        position=position,
        compressed_bias=bias,
        **SIZES,
    )
    twin = ctx.CompressiveTransformer(config)
    with torch.device("meta"):
        made = ctx.CompressiveTransformer(config)
    made.to_empty(device="cpu")
    made.load_state_dict(twin.state_dict(), strict=True)
    assert {name for name, _ in made.named_buffers()} <= set(made.state_dict())
    tokens = torch.randint(0, 20, (2, 23))
    assert_same_bits(made(tokens)[0], twin(tokens)[0])
