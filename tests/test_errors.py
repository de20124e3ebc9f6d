"""Bad input: the type of the error, the argument named in it, and a memory left as it was."""

import math

import pytest
import torch

import ctx
import test_errors_modules
import test_errors_rows
import test_errors_state
from bad_input import changed
from ctx.state import STATE
from strategies import assert_same_bits

B, HKV, H, D, DV, T = 2, 2, 4, 6, 4, 3
SCHEDULE = ctx.Schedule(4, 3, 2, 4, 1)


def memory(**options):
    options = {"max_rewind": 5, "compressor": "conv", **options}
    return ctx.KVMemory(SCHEDULE, B, HKV, D, DV, **options)


def q(b=B, h=H, t=T, d=D, **options):
    return torch.randn(b, h, t, d, **options)


def k(b=B, h=HKV, t=T, d=D, **options):
    return torch.randn(b, h, t, d, **options)


def v(b=B, h=HKV, t=T, d=DV, **options):
    return torch.randn(b, h, t, d, **options)


HALF, INT = {"dtype": torch.bfloat16}, {"dtype": torch.float64}
META = {"device": "meta"}

# what is wrong: (call, type of the error, argument named first, what the message says)
CALLS = {
    "q of 3 dimensions": (lambda m: m.step(q()[0], k(), v()), ValueError, "q", r"\[4, 3, 6\]"),
    "q of another batch": (lambda m: m.step(q(b=3), k(), v()), ValueError, "q", r"\[3, 4, 3, 6\]"),
    "q of another width": (lambda m: m.step(q(d=5), k(), v()), ValueError, "q", r"\[2, 4, 3, 5\]"),
    "heads not shared": (lambda m: m.step(q(h=3), k(), v()), ValueError, "q", "3"),
    "no heads": (lambda m: m.step(q(h=0), k(), v()), ValueError, "q", "0"),
    "q longer than k": (lambda m: m.step(q(t=4), k(), v()), ValueError, "q", "4"),
    "q shorter than k": (lambda m: m.step(q(t=0), k(), v()), ValueError, "q", "0"),
    "q of another dtype": (lambda m: m.step(q(**HALF), k(), v()), TypeError, "q", "BFloat16"),
    "q on another device": (lambda m: m.step(q(**META), k(), v()), ValueError, "q", "meta"),
    "k of 5 dimensions": (
        lambda m: m.step(q(), k()[None], v()),
        ValueError,
        "k",
        r"\[1, 2, 2, 3, 6\]",
    ),
    "k of another batch": (lambda m: m.step(q(), k(b=1), v()), ValueError, "k", r"\[1, 2, 3, 6\]"),
    "k of other heads": (lambda m: m.step(q(), k(h=4), v()), ValueError, "k", r"\[2, 4, 3, 6\]"),
    "k of another width": (lambda m: m.step(q(), k(d=4), v()), ValueError, "k", r"\[2, 2, 3, 4\]"),
    "k of another dtype": (lambda m: m.step(q(), k(**INT), v()), TypeError, "k", "[Dd]ouble"),
    "k on another device": (lambda m: m.step(q(), k(**META), v()), ValueError, "k", "meta"),
    "v of another batch": (lambda m: m.step(q(), k(), v(b=4)), ValueError, "v", r"\[4, 2, 3, 4\]"),
    "v of other heads": (lambda m: m.step(q(), k(), v(h=1)), ValueError, "v", r"\[2, 1, 3, 4\]"),
    "v of another width": (lambda m: m.step(q(), k(), v(d=6)), ValueError, "v", r"\[2, 2, 3, 6\]"),
    "v of another length": (lambda m: m.step(q(), k(), v(t=2)), ValueError, "v", "2"),
    "v of another dtype": (lambda m: m.step(q(), k(), v(**HALF)), TypeError, "v", "BFloat16"),
    "v on another device": (lambda m: m.step(q(), k(), v(**META)), ValueError, "v", "meta"),
    "q not a tensor": (lambda m: m.step(None, k(), v()), TypeError, "q", ""),
    "append: k": (lambda m: m.append(k(d=7), v()), ValueError, "k", r"\[2, 2, 3, 7\]"),
    "append: v": (lambda m: m.append(k(), v(t=4)), ValueError, "v", "4"),
    "append: dtype": (lambda m: m.append(k(), v(**INT)), TypeError, "v", "[Dd]ouble"),
    "attend: past max_rewind": (lambda m: m.attend(q(t=6)), ValueError, "q", "6"),
    "attend: width": (lambda m: m.attend(q(d=7)), ValueError, "q", r"\[2, 4, 3, 7\]"),
    "attend: dtype": (lambda m: m.attend(q(**HALF)), TypeError, "q", "BFloat16"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("seen", [0, 4, 23])
def test_bad_call(name, seen):
    call, error, argument, got = CALLS[name]
    used = memory()
    if seen:
        used.step(q(t=seen), k(t=seen), v(t=seen))
    before = {key: tensor.clone() for key, tensor in used.tensors.items()}
    with pytest.raises(error, match=rf"(?s)\b{argument}\b.*{got}") as caught:
        call(used)
    if argument != "q not a tensor" and "not a tensor" not in name:
        where = (
            "append"
            if name.startswith("append")
            else "attend"
            if name.startswith("attend")
            else "step"
        )
        start = str(caught.value).splitlines()[0]
        assert start.startswith(f"ctx.KVMemory.{where}: {argument} must"), start
    for key, tensor in used.tensors.items():
        assert_same_bits(tensor, before[key])


def test_attend_before_the_stream():
    used = memory()
    used.append(k(t=2), v(t=2))
    with pytest.raises(ValueError, match=r"ctx.KVMemory.attend: q must.*3"):
        used.attend(q(t=3))


def test_bias_of_other_heads():
    with pytest.raises(
        ValueError, match=r"compressed_bias must be \[H\], H a multiple of 2, got \[3\]"
    ):
        memory(compressed_bias=[0.0, 1.0, 2.0])
    used = memory(compressed_bias=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    with pytest.raises(ValueError, match=r"compressed_bias must be \[H\] = \[4\], got \[6\]"):
        used.step(q(), k(), v())
    assert used.seen.tolist() == [0, 0]


# what is wrong: (changed argument, value, type of the error)
OPTIONS = [
    ("schedule", (4, 3, 2), TypeError),
    ("batch_size", 0, ValueError),
    ("batch_size", -1, ValueError),
    ("batch_size", 1.5, TypeError),
    ("kv_heads", 0, ValueError),
    ("head_dim", 0, ValueError),
    ("value_dim", 0, ValueError),
    ("compressor", "median", ValueError),
    ("compressor", 3, TypeError),
    ("position", "absolute", ValueError),
    ("rotary_base", 0.0, ValueError),
    ("rotary_base", math.inf, ValueError),
    ("rotary_base", math.nan, ValueError),
    ("rotary_dim", 3, ValueError),
    ("rotary_dim", 8, ValueError),
    ("rotary_dim", -2, ValueError),
    ("distance", "far", ValueError),
    ("compressed_bias", "learned", ValueError),
    ("compressed_bias", [math.nan], ValueError),
    ("compressed_bias", [[0.0, 1.0]], (TypeError, ValueError)),
    ("scale", math.nan, ValueError),
    ("scale", math.inf, ValueError),
    ("max_rewind", 0, ValueError),
    ("max_rewind", -5, ValueError),
    ("dtype", torch.int64, TypeError),
    ("dtype", torch.complex64, TypeError),
]


@pytest.mark.parametrize("name, value, error", OPTIONS, ids=lambda x: str(x)[:20])
def test_bad_memory_option(name, value, error):
    good = {"schedule": SCHEDULE, "batch_size": B, "kv_heads": HKV, "head_dim": D}
    ctx.KVMemory(**good)
    with pytest.raises(error, match=rf"\b{name}\b"):
        ctx.KVMemory(**{**good, name: value})


def test_odd_head_dim_needs_rotary_dim():
    with pytest.raises(ValueError, match=r"rotary_dim"):
        ctx.KVMemory(SCHEDULE, B, HKV, 5)
    ctx.KVMemory(SCHEDULE, B, HKV, 5, rotary_dim=4)
    ctx.KVMemory(SCHEDULE, B, HKV, 5, position=None)


@pytest.mark.parametrize("sizes", [(1, 2, D, DV), (HKV, 3, D, DV), (HKV, 2, 4, DV), (HKV, 2, D, D)])
@pytest.mark.parametrize("kind", ["Conv", "Gated"])
def test_compressor_of_other_sizes(kind, sizes):
    """Sizes that the parameters show are compared with the memory's when it is made."""
    module = getattr(ctx.compression, kind)(*sizes)
    if kind == "Gated" and sizes == (HKV, 2, D, D):
        pytest.skip("gated pooling has no parameter of the width of values")
    with pytest.raises(ValueError, match=r"key_weight|value_weight|key_gate|ratio must be 2"):
        memory(compressor=module)


class TestCompressors:
    def test_sizes(self):
        for sizes, name in [((0, 2, 4), "kv_heads"), ((1, 0, 4), "ratio"), ((1, 2, 0), "head_dim")]:
            with pytest.raises(ValueError, match=name):
                ctx.compression.Mean(*sizes)
        with pytest.raises(ValueError, match=r"value_dim"):
            ctx.compression.Conv(1, 2, 4, -1)

    def test_groups(self):
        conv = ctx.compression.Conv(2, 3, 4, 5)
        keys, values = torch.randn(1, 2, 6, 3, 4), torch.randn(1, 2, 6, 3, 5)
        conv(keys, values)
        for bad in (keys[0], keys[:, :1], keys[:, :, :, :2], keys[..., :3], keys[:, :, :5]):
            with pytest.raises(ValueError, match=r"\b(keys|values|key_weight)\b"):
                conv(bad, values)
        with pytest.raises(ValueError, match=r"\b(values|value_weight)\b"):
            conv(keys, values[..., :4])


SIZES = {"window": 4, "compressed": 3, "ratio": 2}


class TestAttention:
    @pytest.mark.parametrize(
        "name, value, error",
        [
            ("window", -1, ValueError),
            ("compressed", -1, ValueError),
            ("ratio", 0, ValueError),
            ("segment", 0, ValueError),
            ("sinks", -1, ValueError),
            ("window", 1.5, TypeError),
            ("compressor", "median", ValueError),
            ("position", "absolute", ValueError),
            ("distance", "far", ValueError),
            ("compressed_bias", "learnt", ValueError),
            ("compressor_grad", "both", ValueError),
            ("dropout", 1.0, ValueError),
            ("dropout", -0.1, ValueError),
            ("dropout", math.nan, ValueError),
            ("rotary_base", -1.0, ValueError),
            ("rotary_dim", 3, ValueError),
            ("rotary_dim", 6, ValueError),
            ("max_rewind", 0, ValueError),
            ("num_kv_heads", 3, ValueError),
            ("num_kv_heads", 0, ValueError),
            ("num_heads", 3, ValueError),
            ("num_heads", 0, ValueError),
            ("embed_dim", 0, ValueError),
        ],
    )
    def test_option(self, name, value, error):
        arguments = {"embed_dim": 16, "num_heads": 4, "num_kv_heads": 2, **SIZES}
        ctx.CompressiveAttention(**arguments)
        with pytest.raises(error, match=rf"\b{name}\b"):
            ctx.CompressiveAttention(**{**arguments, name: value})

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize(
        "shape", [(3, 8), (1, 2, 3, 8), (2, 3, 7), (3, 3, 8)], ids=lambda shape: str(list(shape))
    )
    def test_input(self, shape, grad):
        attn = ctx.CompressiveAttention(8, 2, **SIZES)
        with torch.no_grad():
            _, carried = attn(torch.randn(2, 9, 8), attn.init_memory(2))
        before = carried.clone()
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"\b(x|k|q)\b must"):
            attn(torch.randn(shape), carried)
        for name, tensor in carried.tensors.items():
            assert_same_bits(tensor, before[name])

    @pytest.mark.parametrize("grad", [True, False])
    def test_memory_of_another_layer(self, grad):
        attn = ctx.CompressiveAttention(8, 2, **SIZES)
        x = torch.randn(2, 3, 8)
        other = ctx.CompressiveAttention(8, 2, **{**SIZES, "sinks": 3})
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=r"memory must be made for sinks=0, got .*sinks=3"):
                attn(x, other.init_memory(2))
            for name in STATE:
                missing = changed(**{name: lambda part: None})(attn.init_memory(2))
                with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
                    attn(x, missing)
                wrong = changed(**{name: torch.Tensor.half})(attn.init_memory(2))
                with pytest.raises(TypeError, match=r"must be"):
                    attn(x, wrong)

    def test_batch_size(self):
        attn = ctx.CompressiveAttention(8, 2, **SIZES)
        with pytest.raises(ValueError, match=r"batch_size"):
            attn.init_memory(0)


def test_how_many_ways():
    """At least 200 different ways of bad input, counted without those tried twice."""
    tables = [
        CALLS,
        OPTIONS,
        test_errors_rows.KV_TABLE,
        test_errors_rows.ROWS_TABLE,
        test_errors_state.STATE_TABLE,
        test_errors_state.FILE_TABLE,
        test_errors_state.PATH_TABLE,
        test_errors_state.PLACES,
        test_errors_modules.SETTINGS_TABLE,
        test_errors_modules.MODULE_TABLE,
        test_errors_modules.MODEL_TABLE,
        test_errors_modules.FUNCTION_TABLE,
    ]
    ways = sum(len(table) for table in tables)
    print(f"{ways} ways of bad input")
    assert ways >= 200
