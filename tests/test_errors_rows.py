"""Bad input of what is done with rows: lengths, resets, rewind, select, merge, copies; of a
KVMemory and of a layer's dict of tensors."""

import math
import types

import numpy as np
import pytest
import torch

import ctx
from bad_input import Bad, changed, with_rings

B, HKV, H, D, DV, T = 2, 2, 4, 6, 4, 3
SIZES = {"window": 4, "compressed": 3, "ratio": 2}
SCHEDULE = ctx.Schedule(4, 3, 2, 4, 1)


def memory(schedule=SCHEDULE, seen=23, batch=B, **options):
    """A KVMemory that has seen something."""
    options = {"max_rewind": 5, "compressor": "conv", **options}
    made = ctx.KVMemory(schedule, batch, HKV, D, DV, **options)
    made.step(*tokens(seen, batch, made.tensors["window_keys"].dtype))
    return made


def tokens(t=T, batch=B, dtype=torch.float32):
    """q, k, v of t tokens."""
    sizes = (H, D), (HKV, D), (HKV, DV)
    return tuple(torch.randn(batch, heads, t, width, dtype=dtype) for heads, width in sizes)


def ints(*values, **options):
    return torch.tensor(values, **{"dtype": torch.int64, **options})


def bools(*size, **options):
    return torch.zeros(size, **{"dtype": torch.bool, **options})


def bad(where, argument, error, call, got=""):
    return Bad(f"ctx.KVMemory.{where}", argument, error, call, got)


META = {"device": "meta"}
HUGE = 2**70

# what is wrong with the rows of a call: (argument, value, type of the error, what it was)
CALL_ROWS = {
    "too long": ("lengths", ints(1, T + 1), ValueError, "4 in row 1"),
    "negative": ("lengths", ints(-1, T), ValueError, "-1 in row 0"),
    "huge": ("lengths", ints(0, 2**62), ValueError, "4611686018427387904 in row 1"),
    "int32": ("lengths", ints(1, 2, dtype=torch.int32), TypeError, "Int"),
    "floats": ("lengths", torch.ones(B), TypeError, "Float"),
    "bools": ("lengths", bools(B), TypeError, "Bool"),
    "one for all": ("lengths", ints(1), ValueError, r"\[1\]"),
    "three": ("lengths", ints(1, 1, 1), ValueError, r"\[3\]"),
    "scalar": ("lengths", torch.tensor(1), ValueError, r"\[\]"),
    "column": ("lengths", ints(1, 1)[:, None], ValueError, r"\[2, 1\]"),
    "elsewhere": ("lengths", ints(1, 1, **META), ValueError, "meta"),
    "sparse": ("lengths", ints(1, 1).to_sparse(), ValueError, "Sparse"),
    "a list": ("lengths", [1, 2], TypeError, "list"),
    "a number": ("lengths", 2, TypeError, "int"),
    "reset: ints": ("reset_at", ints(0, 0), TypeError, "Long"),
    "reset: floats": ("reset_at", torch.zeros(B, T), TypeError, "Float"),
    "reset: per row": ("reset_at", bools(B), ValueError, r"\[2\]"),
    "reset: too short": ("reset_at", bools(B, T - 1), ValueError, r"\[2, 2\]"),
    "reset: too long": ("reset_at", bools(B, T + 1), ValueError, r"\[2, 4\]"),
    "reset: other rows": ("reset_at", bools(B + 1, T), ValueError, r"\[3, 3\]"),
    "reset: transposed": ("reset_at", bools(T, B), ValueError, r"\[3, 2\]"),
    "reset: 3 dimensions": ("reset_at", bools(B, T, 1), ValueError, r"\[2, 3, 1\]"),
    "reset: elsewhere": ("reset_at", bools(B, T, **META), ValueError, "meta"),
    "reset: sparse": ("reset_at", bools(B, T).to_sparse(), ValueError, "Sparse"),
    "reset: a list": ("reset_at", [[False] * T] * B, TypeError, "list"),
    "reset: True": ("reset_at", True, TypeError, "bool"),
}

# rows that are not there, or are none
ROWS = {
    "past the end": (B, IndexError, "2"),
    "negative": (-1, IndexError, "-1"),
    "huge": (HUGE, IndexError, str(HUGE)),
    "one of several": ([0, 5], IndexError, "5"),
    "one of a tensor": (ints(1, 0, 7), IndexError, "7"),
    "NumPy's": (np.array([0, 9]), IndexError, "9"),
    "int32": (ints(0, dtype=torch.int32), TypeError, "[Ii]nt"),
    "uint8": (ints(0, dtype=torch.uint8), TypeError, "Byte|uint8"),
    "float": (1.0, TypeError, r"1\.0"),
    "floats": ([0.0, 1.0], TypeError, r"0\.0, 1\.0"),
    "tensor of floats": (torch.zeros(1), TypeError, "[Ff]loat"),
    "0 dimensions": (torch.tensor(1), ValueError, r"\[\]"),
    "2 dimensions": (ints(0, 1)[None], ValueError, r"\[1, 2\]"),
    "bools of another size": (bools(B + 1), ValueError, r"\[3\]"),
    "a bool of another size": ([True], ValueError, r"\[1\]"),
    "a bool": (True, TypeError, "True"),
    "bools and ints": ([True, 1], TypeError, "True, 1"),
    "a name": ("01", TypeError, "'01'"),
    "names": (["0"], TypeError, "'0'"),
    "a set": ({0}, TypeError, r"\{0\}"),
    "None inside": ([0, None], TypeError, "None"),
    "nested": ([[0], [1]], TypeError, r"\[\[0\]"),
    "elsewhere": (ints(0, 1, **META), ValueError, "meta"),
    "sparse": (ints(0, 1).to_sparse(), ValueError, "[Ss]parse"),
}
NO_ROWS = {
    "nothing": ([], ValueError, "none"),
    "nothing of a tensor": (ints(), ValueError, "none"),
    "no row of a mask": (bools(B), ValueError, "none"),
    "None": (None, TypeError, "None"),
}

# tokens that cannot be taken back
COUNTS = {
    "too many": (6, ValueError, "6"),
    "negative": (-1, ValueError, "-1"),
    "too many of one row": (ints(0, 6), ValueError, "6"),
    "negative of one row": (ints(-2, 0), ValueError, "-2"),
    "huge": (HUGE, ValueError, str(HUGE)),
    "a float": (1.0, TypeError, r"1\.0"),
    "NaN": (math.nan, TypeError, "nan"),
    "a bool": (True, TypeError, "True"),
    "None": (None, TypeError, "None"),
    "a name": ("1", TypeError, "'1'"),
    "a list": ([1, 1], TypeError, r"\[1, 1\]"),
    "int32": (ints(1, 1, dtype=torch.int32), TypeError, "Int|int32"),
    "floats": (torch.ones(B), TypeError, "[Ff]loat"),
    "one for all": (ints(1), ValueError, r"\[1\]"),
    "0 dimensions": (torch.tensor(1), ValueError, r"\[\]"),
    "2 dimensions": (ints(1, 1)[None], ValueError, r"\[1, 2\]"),
    "elsewhere": (ints(1, 1, **META), ValueError, "meta"),
}


def merged(*others):
    return lambda m: ctx.KVMemory.merge([m, *others])


def other(argument, error=ValueError, **options):
    """Merging with a memory of another setting."""
    schedule = {**vars(SCHEDULE), **{k: v for k, v in options.items() if k in vars(SCHEDULE)}}
    rest = {name: value for name, value in options.items() if name not in schedule}
    made = ctx.KVMemory(
        ctx.Schedule(**schedule),
        B,
        rest.pop("kv_heads", HKV),
        rest.pop("head_dim", D),
        rest.pop("value_dim", DV),
        **{"max_rewind": 5, "compressor": "conv", **rest},
    )
    return bad("merge", argument, error, merged(made))


MERGES = {
    "nothing": bad("merge", "memories", ValueError, lambda m: ctx.KVMemory.merge([]), "none"),
    "None": bad("merge", "memories", TypeError, lambda m: ctx.KVMemory.merge(None), "NoneType"),
    "one": bad("merge", "memories", TypeError, lambda m: ctx.KVMemory.merge(m), "KVMemory"),
    "a dict": bad("merge", "memories", TypeError, lambda m: ctx.KVMemory.merge({}), "dict"),
    "a number": bad("merge", "memories", TypeError, merged(3), "int"),
    "a state": bad("merge", "memories", TypeError, lambda m: merged(m.state_dict())(m), "dict"),
    "window": other("window", window=5),
    "compressed": other("compressed", compressed=2),
    "ratio": other("ratio", ratio=1),
    "segment": other("segment", segment=2),
    "sinks": other("sinks", sinks=0),
    "max_rewind": other("max_rewind", max_rewind=6),
    "kv_heads": other("kv_heads", kv_heads=1),
    "head_dim": other("head_dim", head_dim=8),
    "value_dim": other("value_dim", value_dim=6),
    "rotary_dim": other("rotary_dim", rotary_dim=4),
    "rotary_base": other("rotary_base", rotary_base=10000.0001),
    "rotary_interleaved": other("rotary_interleaved", rotary_interleaved=True),
    "distance": other("distance", distance="token"),
    "compressor": other("compressor", compressor="mean"),
    "dtype": other("dtype", TypeError, dtype=torch.float64),
}

COPIES = {
    "to ints": ({"dtype": torch.int64}, "dtype", TypeError, "Long"),
    "to a name": ({"dtype": "float32"}, "dtype", TypeError, "'float32'"),
    "to meta": ({"device": "meta"}, "device", ValueError, "meta"),
    "to no device": ({"device": "nowhere"}, "device", ValueError, "'nowhere'"),
    "to a number": ({"device": 1.5}, "device", TypeError, r"1\.5"),
}


def kv_table():
    """Every entry of this file that is about a KVMemory."""
    for name, (argument, value, error, got) in CALL_ROWS.items():
        rows = {argument: value}

        def step(m, rows=rows):
            return m.step(*tokens(), **rows)

        def append(m, rows=rows):
            return m.append(*tokens()[1:], **rows)

        yield f"step: {name}", bad("step", argument, error, step, got)
        yield f"append: {name}", bad("append", argument, error, append, got)
    for name, (rows, error, got) in {**ROWS, **NO_ROWS}.items():
        if name not in NO_ROWS:  # resetting no row, or with None every row, is fine
            call = lambda m, rows=rows: m.reset(rows)  # noqa: E731
            yield f"reset: {name}", bad("reset", "rows", error, call, got)
        call = lambda m, rows=rows: m.select(rows)  # noqa: E731
        yield f"select: {name}", bad("select", "rows", error, call, got)
    for name, (count, error, got) in COUNTS.items():
        call = lambda m, count=count: m.rewind(count)  # noqa: E731
        yield f"rewind: {name}", bad("rewind", "tokens", error, call, got)
    for name, entry in MERGES.items():
        yield f"merge: {name}", entry
    for name, (options, argument, error, got) in COPIES.items():
        where = "ctx.KVMemory" if name in ("to ints", "to meta") else "ctx.KVMemory.to"
        where = "ctx" if name == "to meta" else where
        call = lambda m, options=options: m.to(**options)  # noqa: E731
        yield name, Bad(where, argument, error, call, got)


KV_TABLE = dict(kv_table())


@pytest.mark.parametrize("name", KV_TABLE)
def test_kv_memory(name):
    used = memory()
    KV_TABLE[name].refused(used, memory=used.tensors)


def layer(batch=B, **options):
    """A layer's memory that has seen something."""
    attention = ctx.CompressiveAttention(8, 2, **SIZES, max_rewind=5, **options)
    held = attention.init_memory(batch)
    with torch.no_grad():
        attention(torch.randn(batch, 23, 8), held)
    return held


# what is wrong with a layer's memory: (what is made of it, argument, type of error, what it was)
LAYERS = {
    "None": (lambda m: None, "memory", TypeError, "NoneType"),
    "a number": (lambda m: 3, "memory", TypeError, "int"),
    "a tensor": (lambda m: m["seen"], "memory", TypeError, "Tensor"),
    "a list": (lambda m: [m, m], "memory", TypeError, "list"),
    "a KVMemory": (lambda m: memory(), "memory", TypeError, "KVMemory"),
    "a dict": (lambda m: m.tensors, "memory", TypeError, "dict"),
    "no layer": (with_rings(lambda rings: []), "layers", ValueError, "0"),
    "a layer too many": (with_rings(lambda rings: rings * 2), "layers", ValueError, "2"),
    "a part too many": (
        with_rings(lambda rings: [[*rings[0], rings[0][0]]]),
        "rings",
        ValueError,
        "10",
    ),
    "a part missing": (with_rings(lambda rings: [rings[0][1:]]), "rings", ValueError, "8"),
    "no tensor": (changed(window_keys=lambda x: None), "window_keys", TypeError, "NoneType"),
    "seen a list": (changed(seen=lambda x: x.tolist()), "seen", TypeError, "list"),
    "seen int32": (changed(seen=lambda x: x.int()), "seen", TypeError, "int32"),
    "seen floats": (changed(seen=lambda x: x.float()), "seen", TypeError, "float32"),
    "seen 2 dimensions": (changed(seen=lambda x: x[None]), "seen", ValueError, r"\[1, 2\]"),
    "rewindable of one": (changed(rewindable=lambda x: x[:1]), "rewindable", ValueError, r"\[1\]"),
    "keys of one row": (
        changed(compressed_keys=lambda x: x[:1]),
        "compressed_keys",
        ValueError,
        r"\[1, ",
    ),
    "keys of 3 dimensions": (changed(sink_keys=lambda x: x[0]), "sink_keys", ValueError, r"\["),
    "keys ints": (changed(window_values=lambda x: x.long()), "window_values", TypeError, "int64"),
}


def rows_bad(where, argument, error, call, got=""):
    return Bad(f"ctx.Memory.{where}", argument, error, call, got)


def pair(change):
    """Merging a layer's memory with a changed one."""
    return lambda m: ctx.rows.merge([m, change(m)])


def rows_table():
    """Every entry of this file that is about ctx.rows."""
    for name, (rows, error, got) in {**ROWS, **NO_ROWS}.items():
        if name not in NO_ROWS:
            call = lambda m, rows=rows: ctx.rows.reset(m, rows)  # noqa: E731
            yield f"reset: {name}", rows_bad("reset", "rows", error, call, got)
        call = lambda m, rows=rows: ctx.rows.select(m, rows)  # noqa: E731
        yield f"select: {name}", rows_bad("select", "rows", error, call, got)
    for name, (count, error, got) in COUNTS.items():
        call = lambda m, count=count: ctx.rows.rewind(m, count)  # noqa: E731
        yield f"rewind: {name}", rows_bad("rewind", "tokens", error, call, got)
    for name, (change, argument, error, got) in LAYERS.items():
        for where, function in {
            "reset": ctx.rows.reset,
            "rewind": lambda m: ctx.rows.rewind(m, 0),
            "select": lambda m: ctx.rows.select(m, 0),
            "clone": ctx.rows.clone,
            "merge": lambda m: ctx.rows.merge([m]),
        }.items():

            def call(m, function=function, change=change):
                return function(change(m))

            yield f"{where}: {name}", rows_bad(where, argument, error, call, got)

    def entry(argument, error, call, got=""):
        return rows_bad("merge", argument, error, call, got)

    yield "merge: nothing", entry("memories", ValueError, lambda m: ctx.rows.merge([]), "none")
    yield "merge: None", entry("memories", TypeError, lambda m: ctx.rows.merge(None), "NoneType")
    yield "merge: one", entry("memories", TypeError, ctx.rows.merge, "Memory")
    yield (
        "merge: an iterator",
        entry("memories", TypeError, lambda m: ctx.rows.merge(iter([m])), "iterator"),
    )

    def two(m):
        spec, rings = ctx.Spec(m.spec.layers * 2), [*m.rings, *m.clone().rings]
        return ctx.Memory(spec, *m.clock, rings)

    yield "merge: other layers", entry("memory", ValueError, pair(two), "2")
    shorter = pair(changed(window_keys=lambda x: x[:, :, 1:]))
    yield "merge: window", entry("window_keys", ValueError, shorter, r"\[2, 2, 11, 4\]")
    one = pair(changed(sink_keys=lambda x: x.double()))
    yield "merge: dtype of one", entry("sink_keys", TypeError, one, "float64")
    wider = pair(lambda m: m.to(dtype=torch.float64))
    yield "merge: dtype", entry("window_keys", ValueError, wider, "float64")
    elsewhere = pair(lambda m: m.to(device="meta"))
    yield "merge: device", entry("window_keys", ValueError, elsewhere, "meta")
    clock = pair(changed(seen=lambda x: x.to("meta")))
    yield "merge: device of the clock", entry("window_keys", ValueError, clock, "cpu")


ROWS_TABLE = dict(rows_table())


@pytest.mark.parametrize("name", ROWS_TABLE)
def test_rows(name):
    held = layer()
    ROWS_TABLE[name].refused(held, memory=held)


def test_a_later_layer_is_checked_before_the_first_is_written():
    one, other = layer(), layer()
    spec = ctx.Spec(one.spec.layers * 2)
    held = ctx.Memory(spec, *one.clock, [*one.rings, *other.rings])
    held.rewindable.zero_()
    Bad("ctx.Memory.rewind", "tokens", ValueError, lambda m: ctx.rows.rewind(m, 1), "1").refused(
        held, memory=held
    )
    held = ctx.Memory(spec, *one.clock, [*one.rings, *layer(1).rings])
    Bad("ctx.Memory.reset", "window_keys", ValueError, lambda m: ctx.rows.reset(m, 1), "1").refused(
        held, memory=held
    )


@pytest.mark.parametrize("rows", [np.int64(1), (1,), range(1, 2), np.array([1]), [np.int32(1)]])
def test_what_stands_for_rows(rows):
    """Not only ints and lists: what Python takes for an index will do."""
    used, held = memory(), layer()
    used.reset(rows)
    ctx.rows.reset(held, rows)
    assert used.seen.tolist() == held["seen"].tolist() == [23, 0]
    assert used.select(rows).seen.tolist() == [0]
    used.rewind(np.int64(0))


def test_layers_stand_in_one_memory():
    """Not in sequences or mappings, which would each have a clock of their own."""
    for held in ([layer()], (layer(), [layer()]), types.MappingProxyType(layer().tensors)):
        with pytest.raises(TypeError, match=r"ctx.Memory.select: memory must be a ctx.Memory"):
            ctx.rows.select(held, [1, 0])
        with pytest.raises(TypeError, match=r"ctx.Memory.clone: memory must be a ctx.Memory"):
            ctx.rows.clone(held)
