"""Bad input of modules and functions: settings of every kind, inputs, the memories passed in, and
what is said about rows; with gradients and without."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree

import ctx
from bad_input import Bad, changed, with_rings
from ctx.memory_rows import leaves
from ctx.state import PLACE
from test_errors_rows import SCHEDULE, bools, ints

B, T, E = 2, 3, 8
SIZES = {"window": 4, "compressed": 3, "ratio": 2}
HUGE = 2**70
NAN, INF = math.nan, math.inf


def settings(where, make, table, note=""):
    """Entries of a table of (argument, value, type of the error, what it was)."""
    for argument, value, error, got in table:
        call = lambda argument=argument, value=value: make(**{argument: value})  # noqa: E731
        yield f"{where}{note}: {argument}={value!r}"[:90], Bad(where, argument, error, call, got)


def kv_memory(**options):
    sizes = {"schedule": SCHEDULE, "batch_size": 2, "kv_heads": 2, "head_dim": 6}
    return ctx.KVMemory(**{**sizes, **options})


KV_MEMORY = [
    *(
        (name, value, TypeError, got)
        for name in ("batch_size", "kv_heads", "head_dim", "value_dim", "max_rewind", "rotary_dim")
        for value, got in ((1.5, r"1\.5"), ("2", "'2'"), (True, "True"), (NAN, "nan"))
    ),
    *(
        (name, HUGE, ValueError, str(HUGE))
        for name in ("batch_size", "kv_heads", "head_dim", "value_dim", "max_rewind", "rotary_dim")
    ),
    *((name, None, TypeError, "None") for name in ("batch_size", "kv_heads", "head_dim")),
    ("batch_size", 2**31, ValueError, "2147483648"),
    ("max_rewind", 2**31, ValueError, "2147483648"),
    ("max_rewind", None, TypeError, "None"),
    ("schedule", None, TypeError, "NoneType"),
    ("schedule", (4, 3, 2, 4, 1), TypeError, "tuple"),
    ("compressor", None, TypeError, "None"),
    ("compressor", len, TypeError, "len"),  # a function whose name has no address in it
    ("compressor", ctx.compression.Mean, TypeError, "Mean"),
    ("position", 3, ValueError, "3"),
    ("position", "absolute", ValueError, "'absolute'"),
    ("position", ["rotary"], ValueError, "rotary"),
    ("alibi_slopes", [0.5, 0.25], ValueError, "position='rotary'"),
    ("relative", ctx.positions.Relative(2, 6, 8), ValueError, "position='rotary'"),
    ("rotary_base", "big", TypeError, "'big'"),
    ("rotary_base", None, TypeError, "None"),
    ("rotary_interleaved", None, TypeError, "None"),
    ("rotary_interleaved", 1, TypeError, "1"),
    ("distance", None, TypeError, "None"),
    ("scale", "small", TypeError, "'small'"),
    ("scale", 0.0, ValueError, r"0\.0"),
    ("scale", -INF, ValueError, "-inf"),
    ("compressed_bias", None, TypeError, "None"),
    ("compressed_bias", 3.0, TypeError, r"3\.0"),
    ("compressed_bias", ["a"], TypeError, "'a'"),
    ("compressed_bias", [INF], ValueError, "inf"),
    ("compressed_bias", torch.tensor([NAN, 0.0]), ValueError, "nan"),
    ("compressed_bias", torch.zeros(2, 2), ValueError, r"\[2, 2\]"),
    ("compressed_bias", torch.tensor(0.0), ValueError, r"\[\]"),
    ("compressed_bias", torch.zeros(3), ValueError, r"\[3\]"),
    ("compressed_bias", torch.zeros(2, dtype=torch.complex64), TypeError, "0"),
    ("compressed_bias", torch.zeros(2, device="meta"), TypeError, "meta"),
    ("dtype", None, TypeError, "None"),
    ("dtype", "float32", TypeError, "'float32'"),
    ("dtype", torch.float8_e4m3fn, TypeError, "Float8"),
    ("device", "nowhere", ValueError, "'nowhere'"),
    ("device", None, TypeError, "None"),
    ("device", 1.5, TypeError, r"1\.5"),
]

KV_ALIBI = [
    ("alibi_slopes", None, ValueError, "None"),
    ("alibi_slopes", 3.0, TypeError, r"3\.0"),
    ("alibi_slopes", "geometric", TypeError, "'geometric'"),
    ("alibi_slopes", ["a"], TypeError, "'a'"),
    ("alibi_slopes", [], ValueError, r"\[0\]"),
    ("alibi_slopes", [0.5, 0.25, 0.125], ValueError, r"\[3\]"),
    ("alibi_slopes", [0.5, INF], ValueError, "inf"),
    ("alibi_slopes", torch.tensor([NAN, 0.0]), ValueError, "nan"),
    ("alibi_slopes", torch.zeros(2, 2), ValueError, r"\[2, 2\]"),
    ("alibi_slopes", torch.tensor(0.5), ValueError, r"\[\]"),
    ("alibi_slopes", torch.zeros(2, dtype=torch.complex64), TypeError, "0"),
    ("alibi_slopes", torch.zeros(2, device="meta"), TypeError, "meta"),
    ("relative", ctx.positions.Relative(2, 6, 8), ValueError, "position='alibi'"),
]

KV_RELATIVE = [
    ("relative", None, ValueError, "None"),
    ("relative", [torch.zeros(2, 6)] * 5, TypeError, "list"),
    ("relative", ctx.positions.Relative, TypeError, "type"),
    ("relative", ctx.positions.Relative(3, 6, 8), ValueError, r"\[3, 6\]"),
    ("relative", ctx.positions.Relative(2, 4, 8), ValueError, r"\[2, 4\]"),
    ("relative", ctx.positions.Relative(2, 6, 8, device="meta"), ValueError, "meta"),
    ("alibi_slopes", [0.5, 0.25], ValueError, "position='relative'"),
]

SCHEDULES = [
    *((name, -1, ValueError, "-1") for name in ("window", "compressed", "ratio", "sinks")),
    *((name, 0, ValueError, "0") for name in ("ratio", "segment")),
    *(
        (name, value, error, got)
        for name in ("window", "compressed", "ratio", "segment", "sinks")
        for value, error, got in (
            (2**31, ValueError, "2147483648"),
            (HUGE, ValueError, str(HUGE)),
            (1.0, TypeError, r"1\.0"),
            (True, TypeError, "True"),
            ("1", TypeError, "'1'"),
        )
    ),
]

WIDTHS = ("rotary_dim", "relative_dim")
ATTENTION = [
    *(
        (name, value, TypeError, got)
        for name in ("embed_dim", "num_heads", "num_kv_heads", "max_rewind", *WIDTHS)
        for value, got in ((4.0, r"4\.0"), ("4", "'4'"), (True, "True"))
    ),
    *((name, None, TypeError, "None") for name in ("embed_dim", "num_heads", "max_rewind")),
    ("num_heads", -2, ValueError, "-2"),
    ("max_rewind", -1, ValueError, "-1"),
    ("compressor", None, TypeError, "None"),
    ("compressor", ["conv"], TypeError, "conv"),
    ("position", 3, ValueError, "3"),
    ("memory_content", "pairs", ValueError, "pairs"),
    ("memory_content", None, ValueError, "None"),
    ("distance", None, ValueError, "None"),
    ("compressed_bias", [0.0], ValueError, r"0\.0"),
    ("compressor_grad", True, ValueError, "True"),
    ("dropout", "0", TypeError, "'0'"),
    ("dropout", None, TypeError, "None"),
    ("rotary_base", "1", TypeError, "'1'"),
    ("rotary_base", NAN, ValueError, "nan"),
    ("rotary_base", INF, ValueError, "inf"),
    ("rotary_dim", -2, ValueError, "-2"),
    ("relative_dim", 0, ValueError, "0"),
    ("rotary_interleaved", "no", TypeError, "'no'"),
    ("bias", 1, TypeError, "1"),
    ("dtype", torch.int64, TypeError, "int64"),
    ("dtype", "float32", TypeError, "'float32'"),
    ("device", "nowhere", ValueError, "'nowhere'"),
    ("device", 1.5, TypeError, r"1\.5"),
]

INIT_MEMORY = [
    ("batch_size", 0, ValueError, "0"),
    ("batch_size", -1, ValueError, "-1"),
    ("batch_size", 1.0, TypeError, r"1\.0"),
    ("batch_size", None, TypeError, "None"),
    ("batch_size", True, TypeError, "True"),
    ("dtype", torch.int64, TypeError, "int64"),
    ("dtype", "float32", TypeError, "'float32'"),
    ("device", "nowhere", ValueError, "'nowhere'"),
]

COMPRESSORS = [
    *((name, 0, ValueError, "0") for name in ("kv_heads", "ratio", "head_dim")),
    ("value_dim", -1, ValueError, "-1"),
    *((name, 1.0, TypeError, r"1\.0") for name in ("kv_heads", "ratio", "head_dim", "value_dim")),
]


def attention(**options):
    sizes = {"embed_dim": E, "num_heads": 2, **SIZES}
    return ctx.CompressiveAttention(**{**sizes, **options})


def compressor(**options):
    sizes = {"kv_heads": 2, "ratio": 2, "head_dim": 4}
    return ctx.compression.Conv(**{**sizes, **options})


def settings_table():
    """Every entry of this file that is about a setting."""
    yield from settings("ctx.KVMemory", kv_memory, KV_MEMORY)
    alibi = {"position": "alibi", "alibi_slopes": [0.5, 0.25]}
    make = lambda **x: kv_memory(**{**alibi, **x})  # noqa: E731
    yield from settings("ctx.KVMemory", make, KV_ALIBI, ", alibi")
    relative = {"position": "relative", "relative": ctx.positions.Relative(2, 6, 8)}
    make_relative = lambda **x: kv_memory(**{**relative, **x})  # noqa: E731
    yield from settings("ctx.KVMemory", make_relative, KV_RELATIVE, ", relative")
    yield from settings("ctx.Schedule", lambda **x: ctx.Schedule(**{**SIZES, **x}), SCHEDULES)
    yield from settings("ctx.CompressiveAttention", attention, ATTENTION)
    odd = lambda **x: attention(position="relative", **x)  # noqa: E731
    table = [("relative_dim", 7, ValueError, "7"), ("relative_dim", -2, ValueError, "-2")]
    yield from settings("ctx.CompressiveAttention", odd, table, ", relative")
    init = lambda **x: attention().init_memory(**{"batch_size": 2, **x})  # noqa: E731
    yield from settings("ctx.CompressiveAttention.init_memory", init, INIT_MEMORY)
    yield from settings("ctx.compression.Conv", compressor, COMPRESSORS)


SETTINGS_TABLE = dict(settings_table())


@pytest.mark.parametrize("name", SETTINGS_TABLE)
def test_setting(name):
    SETTINGS_TABLE[name].refused()


def x(*size, **options):
    return torch.randn(size or (B, T, E), **options)


META = {"device": "meta"}
ROWS = {
    "int32": ("lengths", ints(1, 2, dtype=torch.int32), TypeError, "int32"),
    "floats": ("lengths", torch.ones(B), TypeError, "float32"),
    "a list": ("lengths", [1, 2], TypeError, "list"),
    "too long": ("lengths", ints(1, T + 1), ValueError, "4 in row 1"),
    "negative": ("lengths", ints(-1, 1), ValueError, "-1 in row 0"),
    "for one row": ("lengths", ints(1), ValueError, r"\[1\]"),
    "column": ("lengths", ints(1, 1)[:, None], ValueError, r"\[2, 1\]"),
    "elsewhere": ("lengths", ints(1, 1, **META), ValueError, "meta"),
    "sparse": ("lengths", ints(1, 1).to_sparse(), ValueError, "sparse"),
    "mask floats": ("mask", torch.ones(B, T), TypeError, "float32"),
    "mask ints": ("mask", torch.ones(B, T).long(), TypeError, "int64"),
    "mask a list": ("mask", [[True] * T] * B, TypeError, "list"),
    "mask per row": ("mask", bools(B), ValueError, r"\[2\]"),
    "mask too long": ("mask", bools(B, T + 1), ValueError, r"\[2, 4\]"),
    "mask transposed": ("mask", bools(T, B), ValueError, r"\[3, 2\]"),
    "mask elsewhere": ("mask", bools(B, T, **META), ValueError, "meta"),
    "mask sparse": ("mask", bools(B, T).to_sparse(), ValueError, "sparse"),
    "reset ints": ("reset_at", torch.zeros(B, T).long(), TypeError, "int64"),
    "reset a bool": ("reset_at", True, TypeError, "bool"),
    "reset per row": ("reset_at", bools(B), ValueError, r"\[2\]"),
    "reset too short": ("reset_at", bools(B, T - 1), ValueError, r"\[2, 2\]"),
    "reset elsewhere": ("reset_at", bools(B, T, **META), ValueError, "meta"),
}


def expanded(tensor):
    return tensor[:1].expand_as(tensor)


def strided(tensor):
    return tensor.mT.contiguous().mT


LAYERS = {
    "a list": (leaves, "memory", TypeError, "list"),
    "a dict": (lambda m: m[-1].tensors, "memory", TypeError, "dict"),
    "a number": (lambda m: 3, "memory", TypeError, "int"),
    "an iterator": (lambda m: iter([m]), "memory", TypeError, "iterator"),
    "a KVMemory": (lambda m: kv_memory(), "memory", TypeError, "KVMemory"),
    "a part too many": (
        with_rings(lambda rings: [*rings[:-1], [*rings[-1], rings[-1][0]]]),
        "rings",
        ValueError,
        "10",
    ),
    "a part less": (
        with_rings(lambda rings: [*rings[:-1], rings[-1][:7]]),
        "rings",
        ValueError,
        "7",
    ),
    "a layer more": (with_rings(lambda rings: [*rings, rings[0]]), "layers", ValueError, r"[23]"),
    "a layer less": (with_rings(lambda rings: rings[:-1]), "layers", ValueError, r"[01]"),
    "of more rows": (
        lambda m: pytree.tree_map(lambda part: torch.cat([part, part]), m),
        "x|tokens",
        ValueError,
        "2",
    ),
    "seen a list": (changed(seen=list), "seen", TypeError, "list"),
    "seen int32": (changed(seen=lambda s: s.int()), "seen", TypeError, "int32"),
    "seen 2 dimensions": (changed(seen=lambda s: s[None]), "seen", ValueError, r"\[1, 2\]"),
    "seen negative": (changed(seen=lambda s: s - 30), "seen", ValueError, "-7 in row 0"),
    "seen huge": (changed(seen=lambda s: s + 2**62), "seen", ValueError, r"\d+ in row 0"),
    "seen expanded": (changed(seen=expanded), "seen", ValueError, r"\(0,\)"),
    "rewindable negative": (
        changed(rewindable=lambda s: s - 30),
        "rewindable",
        ValueError,
        r"-\d+ in row 0",
    ),
    "rewindable beyond": (
        changed(rewindable=lambda s: s + 30),
        "rewindable",
        ValueError,
        r"\d+ in row 0",
    ),
    **{
        f"{name}: {what}": (changed(**{name: change}), name, error, got)
        for name in ("window_keys", "compressed_values")
        for what, change, error, got in (
            ("None", lambda s: None, TypeError, "NoneType"),
            ("expanded", expanded, ValueError, r"\(0, "),
            ("strided", strided, ValueError, r"\(\d+"),
            ("a capacity less", lambda s: s[:, :, 1:], ValueError, r"\[2, "),
            ("a rank less", lambda s: s[0], ValueError, r"\["),
            ("elsewhere", lambda s: s.to("meta"), ValueError, "meta"),
        )
    },
    "keys of another dtype": (
        changed(sink_keys=lambda s: s.half()),
        "sink_keys",
        TypeError,
        "float16",
    ),
}
INPUTS = {
    "None": (None, TypeError, "NoneType"),
    "a list": ([[0.0] * E], TypeError, "list"),
    "2 dimensions": (x(T, E), ValueError, r"\[3, 8\]"),
    "4 dimensions": (x(1, B, T, E), ValueError, r"\[1, 2, 3, 8\]"),
    "width": (x(B, T, E + 1), ValueError, r"\[2, 3, 9\]"),
    "rows": (x(B + 1, T, E), ValueError, "3"),
    "ints": (x().long(), TypeError, "int64"),
    "float64": (x().double(), TypeError, "float64"),
    "half": (x().half(), TypeError, "float16"),
    "complex": (x().to(torch.complex64), TypeError, "complex64"),
    "elsewhere": (x(**META), ValueError, "meta"),
    "sparse": (x().to_sparse(), ValueError, "sparse"),
}
TOKENS = {
    "None": (None, TypeError, "NoneType"),
    "a list": ([[1]], TypeError, "list"),
    "floats": (x(B, T), TypeError, "float32"),
    "int32": (ints(1, 2, dtype=torch.int32)[:, None], TypeError, "int32"),
    "1 dimension": (ints(1, 2), ValueError, r"\[2\]"),
    "3 dimensions": (ints(1, 2)[None, None], ValueError, r"\[1, 1, 2\]"),
    "no rows": (ints()[:, None], ValueError, r"\[0, 1\]"),
    "rows": (ints(1, 2, 3)[:, None], ValueError, "3"),
    "negative": (ints(1, -2)[:, None], IndexError, "-2"),
    "no such token": (ints(1, 11)[:, None], IndexError, "11"),
    "elsewhere": (ints(1, 2, **META)[:, None], ValueError, "meta"),
}


def calls(where, good, inputs, argument):
    """Entries of calls of a module(input, memory, ...); `first` of them is one layer's memory."""

    def entry(named, error, call, got):
        return Bad(where, named, error, call, got)

    for name, (value, error, got) in inputs.items():
        call = lambda run, m, value=value: run(value, m)  # noqa: E731
        yield f"{where}: {argument} {name}", entry(argument, error, call, got)
    for name, (named, value, error, got) in ROWS.items():
        rows = {named: value}
        call = lambda run, m, rows=rows: run(good(), m, **rows)  # noqa: E731
        yield f"{where}: rows {name}", entry(named, error, call, got)
    both = lambda run, m: run(good(), m, lengths=ints(1, 1), mask=bools(B, T))  # noqa: E731
    yield f"{where}: lengths and mask", entry("mask", ValueError, both, "both")
    masked = lambda run, m: run(  # noqa: E731
        good(), m, mask=bools(B, T), reset_at=bools(B, T, **META)
    )
    yield f"{where}: mask here, reset_at there", entry("reset_at", ValueError, masked, "meta")


def module_table():
    """Every entry of this file that is about a call of a module; each is tried in two ways."""
    where = "ctx.CompressiveAttention"
    yield from calls(where, x, INPUTS, "x")
    for name, (change, named, error, got) in LAYERS.items():
        call = lambda run, m, change=change: run(x(), change(m))  # noqa: E731
        yield f"{where}: memory {name}", Bad(where, named, error, call, got)


def model_table():
    """Every entry of this file that is about a call of a model."""
    where = "ctx.CompressiveTransformer.forward"

    def good():
        return torch.randint(11, (B, T))

    yield from calls(where, good, TOKENS, "tokens")
    for name, (change, named, error, got) in LAYERS.items():
        # The first layer's rings are good, and must not be written before the second's are checked.
        call = lambda run, m, change=change: run(good(), change(m))  # noqa: E731
        at = f"{where}: memory[1]" if named in PLACE or named == "rings" else where
        yield f"{where}: memory {name}", Bad(at, named, error, call, got)
    for name, change, error, got in (
        ("its first layer", lambda m: m[0], ValueError, "1"),
        ("layers in a list", list, TypeError, "list"),
    ):
        call = lambda run, m, change=change: run(good(), change(m))  # noqa: E731
        yield f"{where}: memory {name}", Bad(where, "memory", error, call, got)


MODULE_TABLE, MODEL_TABLE = dict(module_table()), dict(model_table())
STREAM = torch.randn(B, 23, E)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", MODULE_TABLE)
def test_attention(name, grad):
    module = attention()
    held = module.init_memory(B)
    with torch.no_grad():
        module(STREAM, held)
    with torch.set_grad_enabled(grad):
        MODULE_TABLE[name].refused(module, held, memory=held)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", MODEL_TABLE)
def test_transformer(name, grad):
    config = {"vocab_size": 11, "embed_dim": E, "num_layers": 2, "num_heads": 2, **SIZES}
    model = ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**config))
    held = model.init_memory(B)
    with torch.no_grad():
        model(torch.randint(11, (B, 23)), held)
    with torch.set_grad_enabled(grad):
        MODEL_TABLE[name].refused(model, held, memory=held)


def function_table():
    """Every entry of this file that is about a function."""
    for function in ("to_right_padded", "from_right_padded"):
        where, run = f"ctx.padding.{function}", getattr(ctx.padding, function)
        for name, (value, mask, argument, error, got) in {
            "x a list": ([[1, 2]], bools(1, 2), "x", TypeError, "list"),
            "x 1 dimension": (x(T), bools(T), "x", ValueError, r"\[3\]"),
            "mask None": (x(), None, "mask", TypeError, "NoneType"),
            "mask ints": (x(), torch.ones(B, T).long(), "mask", TypeError, "int64"),
            "mask of other rows": (x(), bools(B + 1, T), "mask", ValueError, r"\[3, 3\]"),
            "mask of other tokens": (x(), bools(B, T + 1), "mask", ValueError, r"\[2, 4\]"),
            "mask elsewhere": (x(), bools(B, T, **META), "mask", ValueError, "meta"),
        }.items():
            call = lambda run=run, value=value, mask=mask: run(value, mask)  # noqa: E731
            yield f"{where}: {name}", Bad(where, argument, error, call, got)
    keys, values = torch.randn(1, 2, 3, 2, 4), torch.randn(1, 2, 3, 2, 4)
    for name, (where, argument, error, pair, got) in {
        "keys None": ("ctx.compression.Conv", "keys", TypeError, (None, values), "NoneType"),
        "values a list": ("ctx.compression.Conv", "values", TypeError, (keys, [1]), "list"),
        "keys rank": ("ctx.compress", "keys", ValueError, (keys[0], values), r"\[2, 3, 2, 4\]"),
        "values rank": ("ctx.compress", "values", ValueError, (keys, values[0]), r"\[2, 3, 2, 4\]"),
        "values dtype": ("ctx.compress", "values", TypeError, (keys, values.half()), "Half"),
        "ints": ("ctx.compress", "keys", TypeError, (keys.long(), values.long()), "Long"),
        "ratio": (
            "ctx.compress",
            "key_weight",
            ValueError,
            (keys[:, :, :, :1], values[:, :, :, :1]),
            "2",
        ),
        "elsewhere": (
            "ctx.compress",
            "key_weight",
            ValueError,
            (keys.to("meta"), values.to("meta")),
            "cpu",
        ),
    }.items():
        call = lambda pair=pair: compressor()(*pair)  # noqa: E731
        yield f"compress: {name}", Bad(where, argument, error, call, got)


FUNCTION_TABLE = dict(function_table())


@pytest.mark.parametrize("name", FUNCTION_TABLE)
def test_function(name):
    FUNCTION_TABLE[name].refused()
