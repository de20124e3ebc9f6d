"""Rows of a memory: ragged calls, resets inside a call, going back, and ctx.rows on any nesting."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
from ctx.memory_rows import leaves
from ctx.padding import from_right_padded, to_right_padded
from ctx.state import STATE
from ragged import (
    GARBAGE,
    assert_same_row,
    cuttings,
    feed,
    marks,
    sizes,
    streams_of,
)
from strategies import CLOSER, DTYPES, assert_close, assert_same_bits, cases, memories

F64 = torch.float64


@st.composite
def ragged(draw, most=40, by_usage=True):
    """A setting of up to three rows, and how long each row's stream is. What counts usage cannot go
    back."""
    setting = draw(memories(by_usage=by_usage))
    setting = dataclasses.replace(setting, batch=draw(st.integers(1, 3)))
    return setting, [draw(st.integers(0, most)) for _ in range(setting.batch)]


@st.composite
def beginnings(draw, totals):
    """Tokens of each row that begin a new stream: few, the first, neighbours."""
    places = [st.sets(st.integers(0, max(0, n - 1)), max_size=4) for n in totals]
    return [draw(place) for place in places]


def alone(setting, dtype):
    return dataclasses.replace(setting, batch=1).memory(ctx, dtype)


def documents(total, starts):
    """(first token, one past the last, begins anew) of each stream of a row, but empty ones."""
    edges = sorted({0, total, *(i for i in starts if i < total)})
    return [(a, b, a in starts) for a, b in itertools.pairwise(edges)]


def assert_same_memory(got, want):
    for name in STATE:
        assert_same_bits(got[name], want[name])


def assert_same_leaves(got, want):
    assert got.spec == want.spec
    for mine, yours in zip(leaves(got), leaves(want), strict=True):
        assert_same_bits(mine, yours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(60)
@given(data=st.data())
def test_row_of_a_ragged_batch_equals_row_alone(dtype, data):
    """Bookkeeping and exact tokens bit for bit, the rest to rounding; padding is garbage."""
    setting, totals = data.draw(ragged())
    streams = streams_of(setting, totals, dtype)
    memory = setting.memory(ctx, dtype)
    outs = feed(
        memory,
        streams,
        data.draw(cuttings(totals)),
        garbage=data.draw(st.sampled_from(GARBAGE)),
        extra=data.draw(st.integers(0, 3)),
        kind=data.draw(st.integers(0, 3)),
    )
    for b, total in enumerate(totals):
        single = alone(setting, dtype)
        want = single.step(*(x[None] for x in streams[b]))
        assert_close(outs[b], want[0], CLOSER[dtype])
        assert_same_row(setting.law(), memory.tensors, b, single.tensors, 0, CLOSER[dtype])
        assert single.seen.item() == total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(100)
@given(data=st.data())
def test_ragged_split_invariance(dtype, data):
    """The same streams, new ones beginning anywhere in them, cut in two different ragged ways."""
    setting, totals = data.draw(ragged())
    streams, starts = streams_of(setting, totals, dtype), data.draw(beginnings(totals))
    one, two = setting.memory(ctx, dtype), setting.memory(ctx, dtype)
    want = feed(one, streams, data.draw(cuttings(totals)), starts=starts)
    got = feed(two, streams, data.draw(cuttings(totals)), starts=starts, garbage=float("inf"))
    for b in range(setting.batch):
        assert_close(got[b], want[b], CLOSER[dtype])
        assert_same_row(setting.law(), two.tensors, b, one.tensors, b, CLOSER[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(60)
@given(data=st.data())
def test_stream_that_begins_inside_a_call_is_a_fresh_stream(dtype, data):
    """Every document gives what it gives alone; nothing of earlier ones is left, not even a NaN."""
    setting, totals = data.draw(ragged())
    streams, starts = streams_of(setting, totals, dtype), data.draw(beginnings(totals))
    carried = data.draw(st.integers(0, 20))
    past = streams_of(dataclasses.replace(setting, seed=setting.seed + 1), [carried], dtype)[0]
    memory, before = setting.memory(ctx, dtype), alone(setting, dtype)
    for one in (memory, before):
        one.step(*(x.expand(int(one.seen.numel()), -1, -1, -1) for x in past))
    poisoned = data.draw(st.booleans())
    for row, (total, anew) in enumerate(zip(totals, starts, strict=True)):
        first, *rest = documents(total, anew) or [(0, 0, False)]
        if poisoned and rest:
            for x in streams[row]:
                x[:, first[0] : first[1]] = float("nan")
    outs = feed(memory, streams, data.draw(cuttings(totals)), starts=starts)
    for b, total in enumerate(totals):
        single = before.clone()
        for first, last, anew in documents(total, starts[b]):
            single = alone(setting, dtype) if anew else single
            want = single.step(*(x[None, :, first:last] for x in streams[b]))
            if not want.isnan().any():
                assert_close(outs[b][:, first:last], want[0], CLOSER[dtype])
        if not any(x.isnan().any() for x in single.tensors.values()):
            assert_same_row(setting.law(), memory.tensors, b, single.tensors, 0, CLOSER[dtype])


@cases(60)
@given(st.data())
def test_left_padded_batch_equals_its_rows_alone(data):
    """ctx.padding brings any mask to the engine, and its outputs back."""
    setting, totals = data.draw(ragged(most=15))
    tokens = max(totals) + data.draw(st.integers(0, 3))
    kind = data.draw(st.sampled_from(["left", "right", "anywhere"]))
    mask = data.draw(masks(totals, tokens, kind))
    streams = streams_of(setting, totals, F64)
    batch = []
    for i in range(3):
        heads, _, width = streams[0][i].shape
        x = torch.full((setting.batch, tokens, heads, width), float("nan"), dtype=F64)
        for b in range(setting.batch):
            x[b, mask[b]] = streams[b][i].transpose(0, 1)
        batch.append(x)
    moved = [to_right_padded(x, mask) for x in batch]
    assert all(lengths.tolist() == totals for _, lengths in moved)
    memory = setting.memory(ctx, F64)
    out = memory.step(*(x.transpose(1, 2) for x, _ in moved), lengths=moved[0][1])
    back = from_right_padded(out.transpose(1, 2), mask)
    assert_same_bits(back[~mask], torch.zeros_like(back[~mask]))
    for b in range(setting.batch):
        single = alone(setting, F64)
        want = single.step(*(x[None] for x in streams[b]))
        assert_close(back[b, mask[b]], want[0].transpose(0, 1), 1e-12)
        assert_same_row(setting.law(), memory.tensors, b, single.tensors, 0, 1e-12)


@st.composite
def masks(draw, totals, tokens, kind):
    """bool [B, T] with so many tokens in each row."""
    rows = []
    for total in totals:
        places = {"left": range(tokens - total, tokens), "right": range(total)}.get(kind)
        if places is None:
            places = draw(st.permutations(range(tokens)))[:total]
        rows.append(marks(1, tokens, [(0, i) for i in places]))
    return torch.cat(rows)


@cases(80)
@given(st.data())
def test_rewindable_is_what_came_since(data):
    """min(max_rewind, tokens since the stream began), less what was taken back; never negative."""
    setting, _ = data.draw(ragged(by_usage=False))
    memory = setting.memory(ctx, F64)
    seen, back = [0] * setting.batch, [0] * setting.batch
    for call in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            counts = [data.draw(st.integers(0, most)) for most in back]
            memory.rewind(torch.tensor(counts))
            seen = [n - k for n, k in zip(seen, counts, strict=True)]
            back = [n - k for n, k in zip(back, counts, strict=True)]
        else:
            totals = [data.draw(sizes(12)) for _ in seen]
            anew = data.draw(beginnings(totals))
            streams = streams_of(dataclasses.replace(setting, seed=call), totals, F64)
            feed(memory, streams, data.draw(cuttings(totals)), starts=anew)
            for b, (total, starts) in enumerate(zip(totals, anew, strict=True)):
                begun = [i for i in starts if i < total]
                seen[b] = total - max(begun) if begun else seen[b] + total
                back[b] = min(seen[b] if begun else back[b] + total, setting.max_rewind)
        assert memory.seen.tolist() == seen
        assert memory.rewindable.tolist() == back
        assert all(0 <= k <= min(n, setting.max_rewind) for k, n in zip(back, seen, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(80)
@given(data=st.data())
def test_rewind_is_exact(dtype, data):
    """Tokens that were taken back never came: once, twice in a row, after the rings wrapped, with
    NaN for tokens, and at another distance in every row."""
    setting, totals = data.draw(ragged(most=60, by_usage=False))
    streams = streams_of(setting, totals, dtype)
    memory, never = setting.memory(ctx, dtype), setting.memory(ctx, dtype)
    for one in (memory, never):
        feed(one, streams, [totals])
    other = dataclasses.replace(setting, seed=setting.seed + 1)
    for _ in range(data.draw(st.integers(1, 3))):
        junk = [data.draw(st.integers(0, setting.max_rewind % 20)) for _ in totals]
        wrong = streams_of(other, junk, dtype)
        if data.draw(st.booleans()):
            wrong = [[torch.full_like(x, float("nan")) for x in row] for row in wrong]
        feed(memory, wrong, data.draw(cuttings(junk)))
        first = [data.draw(st.integers(0, n)) for n in junk]
        memory.rewind(torch.tensor(first))
        memory.rewind(torch.tensor(junk) - torch.tensor(first))
        assert_same_bits(memory.seen, never.seen)
        for b in range(setting.batch):
            rows = memory.tensors, b, never.tensors, b
            assert_same_row(setting.law(), *rows, CLOSER[dtype], rewindable=False)
    more = [data.draw(sizes(20)) for _ in totals]
    following = streams_of(dataclasses.replace(setting, seed=setting.seed + 2), more, dtype)
    got = feed(memory, following, data.draw(cuttings(more)))
    want = feed(never, following, data.draw(cuttings(more)))
    assert_same_bits(memory.seen, never.seen)
    for b in range(setting.batch):
        assert_close(got[b], want[b], CLOSER[dtype])
        rows = memory.tensors, b, never.tensors, b
        assert_same_row(setting.law(), *rows, CLOSER[dtype], rewindable=False)


@cases(60)
@given(st.data())
def test_a_memory_does_what_the_engine_does(data):
    """ctx.Memory, and ctx.rows by its older names, do what ctx.KVMemory does, bit for bit."""
    setting, totals = data.draw(ragged())
    memory = setting.memory(ctx, F64)
    feed(memory, streams_of(setting, totals, F64), data.draw(cuttings(totals)))
    held = memory.memory
    rows = data.draw(st.lists(st.integers(0, setting.batch - 1), min_size=1, max_size=4))
    assert_same_memory(ctx.rows.select(held, rows), memory.select(rows).tensors)
    mask = marks(1, setting.batch, [(0, row) for row in rows])[0]
    assert_same_memory(ctx.rows.select(held, mask), memory.select(mask).tensors)
    assert_same_memory(ctx.rows.clone(held), held)
    merged = ctx.KVMemory.merge([memory, memory.select(rows)])
    assert_same_memory(ctx.rows.merge([held, ctx.rows.select(held, rows)]), merged.tensors)
    counts = torch.tensor([data.draw(sizes(most)) for most in memory.rewindable.tolist()])
    mine, copied = memory.clone(), ctx.rows.clone(held)
    if setting.compressor == "most_used":
        for call in (mine.rewind, lambda n: ctx.rows.rewind(copied, n)):
            with pytest.raises(ValueError, match='follow from the tokens alone, got "most_used"'):
                call(counts)
    else:
        mine.rewind(counts), ctx.rows.rewind(copied, counts)
    assert_same_memory(copied, mine.tensors)
    chosen = data.draw(st.sampled_from([None, rows, rows[0], mask, torch.tensor(rows)]))
    mine.reset(chosen), ctx.rows.reset(copied, chosen)
    assert_same_memory(copied, mine.tensors)


def kv_memory(max_rewind=4, dtype=torch.float32):
    """Three rows of nine tokens."""
    law = ctx.Schedule(4, 3, 2, 4, 1)
    memory = ctx.KVMemory(law, 3, 1, 4, max_rewind=max_rewind, dtype=dtype)
    memory.step(*[torch.randn(3, 1, 9, 4, dtype=dtype)] * 3)
    return memory


def filled(layers=1, **options):
    """Layers of nine tokens in three rows on one clock, of different sizes."""
    parts = []
    for i in range(layers):
        law = ctx.Schedule(4, 3 + i, 2, 4, 1)
        memory = ctx.KVMemory(law, 3, 1, 4, **{"max_rewind": 4, **options})
        memory.step(*[torch.randn(3, 1, 9, 4, dtype=memory.tensors["window_keys"].dtype)] * 3)
        parts.append(memory.memory)
    spec = ctx.Spec(tuple(part.spec.layers[0] for part in parts))
    return ctx.Memory(spec, *parts[0].clock, [part.rings[0] for part in parts])


def test_several_layers():
    """Layers of different geometry on one clock: every row operation acts on all of them."""
    memory = filled(3)
    taken = memory.select([2, 0, 2])
    for got, layer in zip(taken, memory, strict=True):
        for name in STATE:
            assert_same_bits(got[name], layer[name][[2, 0, 2]])
    both = ctx.Memory.merge([memory, taken])
    assert both.spec == memory.spec and both.seen.tolist() == [9] * 6
    copied = memory.clone()
    copied.rewind(torch.tensor([0, 1, 2]))
    copied.reset(0)
    assert copied.rewindable.tolist() == [0, 3, 2]
    for layer in copied:
        assert layer.seen is copied.seen and layer["seen"].tolist() == [0, 8, 7]
        assert layer.rewindable is copied.rewindable
    assert memory.seen.tolist() == [9, 9, 9] and memory.rewindable.tolist() == [4, 4, 4]
    copied.reset()
    assert copied.seen.tolist() == [0, 0, 0] == copied.rewindable.tolist()


def test_one_layer_of_several():
    """A layer is a view: its tensors and its clock are the memory's."""
    memory = filled(2)
    assert len(memory) == memory.layers == 2 and memory.batch_size == 3
    for i, layer in enumerate(memory):
        assert layer.spec.layers == (memory.spec.layers[i],)
        assert layer["window_keys"] is memory.rings[i][0]
    assert memory[-1]["sink_keys"] is memory[1]["sink_keys"]
    assert memory["seen"] is memory.seen
    for bad in (2, -3):
        with pytest.raises(IndexError, match=rf"layer must be between 0 and 1, got {bad}"):
            memory[bad]
    with pytest.raises(KeyError, match="must be read from one layer"):
        memory["window_keys"]
    with pytest.raises(KeyError):
        memory[0]["keys"]


def test_rows_are_the_methods():
    for name in ctx.rows.__all__:
        assert getattr(ctx.rows, name) is getattr(ctx.Memory, name)


ERRORS = {
    "row below": (lambda m: ctx.rows.reset(m, -1), IndexError, "rows must be between"),
    "row above": (lambda m: ctx.rows.select(m, [0, 3]), IndexError, "rows must be between"),
    "mask": (lambda m: ctx.rows.reset(m, torch.ones(2, dtype=torch.bool)), ValueError, "bool"),
    "float": (lambda m: ctx.rows.reset(m, torch.zeros(1)), TypeError, "rows must be int64"),
    "shape": (lambda m: ctx.rows.select(m, torch.zeros(1, 1, dtype=torch.int64)), ValueError, "N"),
    "none selected": (lambda m: ctx.rows.select(m, []), ValueError, "rows must be at least one"),
    "too far": (lambda m: ctx.rows.rewind(m, 5), ValueError, "take back = 4, got 5"),
    "one row too far": (
        lambda m: ctx.rows.rewind(m, torch.tensor([1, 5, 1])),
        ValueError,
        "row 1 can take back",
    ),
    "forward": (lambda m: ctx.rows.rewind(m, -1), ValueError, "got -1"),
    "counts": (lambda m: ctx.rows.rewind(m, torch.tensor([1, 1])), ValueError, "tokens must be"),
    "count type": (lambda m: ctx.rows.rewind(m, torch.ones(3)), TypeError, "int64"),
    "no memory": (lambda m: ctx.rows.merge([]), ValueError, "at least one"),
    "layers": (lambda m: ctx.rows.merge([m, m[0]]), ValueError, "must have 2 layers, got 1"),
    "sizes": (
        lambda m: ctx.rows.merge([m[0], m[1]]),
        ValueError,
        "made for compressed=3, got one made for compressed=4",
    ),
    "geometry": (
        lambda m: ctx.rows.merge([m, m.to(dtype=F64)]),
        ValueError,
        "window_keys must be .*float32 .*float64",
    ),
    "not a memory": (lambda m: ctx.rows.reset(m[0].tensors), TypeError, "memory must be a ctx.M"),
    "word": (lambda m: ctx.rows.select(m, "0"), TypeError, "rows must be an index"),
    "nothing": (lambda m: ctx.rows.merge([m, None]), TypeError, "NoneType"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_touch_nothing(name):
    memory = filled(2)
    before = memory.clone()
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        call(memory)
    assert_same_leaves(memory, before)


def test_a_memory_s_own_counters_as_arguments():
    """`seen` and `rewindable` alias the memory, and may be handed to it."""
    memory, lengths = kv_memory(max_rewind=20), torch.tensor([9, 4, 0])
    memory.rewind(9 - lengths)
    tensors = [torch.randn(3, 1, 9, 4)] * 3
    for name in ("seen", "rewindable"):
        used, held = memory.clone(), memory.clone().memory
        used.step(*tensors, lengths=used.tensors[name])
        assert used.seen.tolist() == used.rewindable.tolist() == [18, 8, 0]
        used.rewind(used.tensors[name])
        ctx.rows.rewind(held, held[name])
        for counters in (used.tensors, held):
            assert counters["seen"].tolist() == counters["rewindable"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("tokens", [1.5, True, None, "1", [1, 1, 1]])
def test_rewind_takes_integers_only(tokens):
    memory = kv_memory()
    for call in (memory.rewind, lambda n: ctx.rows.rewind(memory.memory, n)):
        with pytest.raises(TypeError, match="tokens must be an int"):
            call(tokens)
        with pytest.raises(ValueError, match="tokens must fit into 64 bits"):
            call(2**70)
    assert memory.seen.tolist() == [9, 9, 9]


SLOTS = [None, torch.int8, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", ["mean", "most_used"])
@pytest.mark.parametrize("slots", SLOTS, ids=str)
@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_to(dtype, slots, name):
    """Counts, usage and packed slots keep what they must be; a stream goes on as it would."""
    attn = ctx.CompressiveAttention(8, 4, 2, window=4, compressed=3, ratio=2, compressor=name)
    x = torch.randn(2, 30, 8)
    with torch.no_grad():
        _, memory = attn(x[:, :21], attn.init_memory(2, compressed_dtype=slots))
    before = ctx.rows.clone(memory)
    moved = ctx.rows.to(memory, dtype=dtype)
    assert moved.spec == memory.spec
    pairs = dtype or torch.float32
    stored = pairs if slots is None or pairs == torch.float64 else slots
    for key, tensor in moved.tensors.items():
        assert_same_bits(memory[key], before[key])
        want = {torch.int64: torch.int64}.get(tensor.dtype, pairs)
        if key.startswith("compressed"):
            want = stored
        if key in ("attention_received", "slot_mass"):
            want = torch.float64 if pairs == torch.float64 else torch.float32
        assert tensor.dtype == want, key
        assert tensor.numel() == 0 or tensor.data_ptr() != memory[key].data_ptr()
    want = attn.init_memory(2, dtype=pairs, compressed_dtype=None if stored == pairs else stored)
    assert [x.shape for x in leaves(moved)] == [x.shape for x in leaves(want)]
    with torch.no_grad():
        expected, _ = attn(x[:, 21:], before)
        got, _ = attn(x[:, 21:], moved)
        assert_close(got, expected, 3e-2 if name == "mean" else 1.0)
        assert got.isfinite().all()


@pytest.mark.parametrize(
    "options, error, argument",
    [
        ({"dtype": torch.int8}, TypeError, "dtype"),
        ({"dtype": "float32"}, TypeError, "dtype"),
        ({"device": "nowhere"}, ValueError, "device"),
    ],
)
def test_to_refuses(options, error, argument):
    attn = ctx.CompressiveAttention(8, 2, window=4, compressed=3, ratio=2)
    with pytest.raises(error, match=rf"ctx.Memory.to: {argument} must be .*got"):
        ctx.rows.to(attn.init_memory(1), **options)
    assert ctx.rows.to(attn.init_memory(1), device="meta")["seen"].is_meta
