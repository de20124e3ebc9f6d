"""ctx.KVMemory: equal to the reference, the same for every cutting, constant in size."""

import dataclasses
import pickle
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import ctx
from ctx import reference
from strategies import (
    CLOSE,
    CLOSER,
    COMPRESSORS,
    DTYPES,
    assert_close,
    assert_same_bits,
    assume_clear,
    cases,
    cuts,
    lengths,
    memories,
    pieces,
    stream,
)

F64 = torch.float64
KINDS = st.integers(0, 3)  # of strides
RINGS = ["window_keys", "window_values", "sink_keys", "sink_values"]
SLOTS = ["compressed_keys", "compressed_values"]


def held(setting, name, tensor, seen):
    """The part of a ring that holds what a query of the next token, or of the last, may need.

    Indices are absolute positions modulo the capacity; what stands elsewhere is nobody's business.
    """
    law, capacity = setting.law(), tensor.shape[2]
    last = seen - 1
    if name.startswith("sink"):
        return tensor[:, :, : min(law.sinks, seen)]
    if name.startswith("window"):
        positions = range(law.window_begin(last), seen)
    else:
        positions = range(law.groups(last) - law.slots(last), law.groups(last))
    return tensor[:, :, [p % capacity for p in positions]]


def assert_same_memory(setting, got, want, dtype, tolerance, exact_window=False):
    """Bookkeeping equal, held pairs close (or, exact_window, equal bit for bit)."""
    seen = int(want.seen[0]) if want.seen.numel() else 0
    assert_same_bits(got.seen, want.seen)
    mine, yours = got.tensors, want.tensors
    assert list(mine) == list(yours)
    for name in ["attention_received", "slot_positions"]:
        assert mine[name].shape == yours[name].shape and mine[name].dtype == yours[name].dtype
        if mine[name].shape[2]:
            region = "window" if name == "attention_received" else "compressed"
            a, b = (held(setting, region, x[name], seen) for x in (mine, yours))
            assert_close(a, b, tolerance if name == "attention_received" else 0)
    for name in [*RINGS, *SLOTS]:
        assert mine[name].shape == yours[name].shape and mine[name].dtype == dtype
        a, b = held(setting, name, mine[name], seen), held(setting, name, yours[name], seen)
        assert_close(a, b, tolerance)
        if (name.endswith("values") and name in RINGS) or (exact_window and name in RINGS):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compressor", COMPRESSORS)
@cases(25)
@given(data=st.data())
def test_equals_reference(compressor, dtype, data):
    """Outputs and all that is stored, over random settings, lengths, cuttings and strides."""
    setting = data.draw(memories(compressor=compressor))
    length = data.draw(lengths(setting))
    sizes = data.draw(cuts(length))
    tensors = setting.inputs(length, dtype, data.draw(KINDS))
    ours, theirs = setting.memory(ctx, dtype), setting.memory(reference, dtype)
    got, want = stream(ours, tensors, sizes), stream(theirs, tensors, [length])
    assume_clear(theirs, CLOSE[dtype])
    assert_same_memory(setting, ours, theirs, dtype, CLOSE[dtype])
    assert_close(got, want, CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(150)
@given(data=st.data())
def test_split_invariance(dtype, data):
    """Any ragged cutting: bookkeeping and exact tokens bit-equal, the rest to rounding."""
    setting = data.draw(memories())
    length = data.draw(lengths(setting, most=120))
    tensors = setting.inputs(length, dtype, data.draw(KINDS))
    whole, cut = setting.memory(ctx, dtype), setting.memory(ctx, dtype)
    want = stream(whole, tensors, [length])
    got = stream(cut, tensors, data.draw(cuts(length)))
    assert_same_memory(setting, cut, whole, dtype, CLOSER[dtype], exact_window=True)
    for name in RINGS:  # every token was written once, in order
        assert_same_bits(cut.tensors[name], whole.tensors[name])
    assert_close(got, want, CLOSER[dtype])


@cases(100)
@given(st.data())
def test_headroom_changes_nothing(data):
    """A call longer than max_rewind is walked in blocks."""
    setting = data.draw(memories())
    length = data.draw(lengths(setting, most=120))
    tensors = setting.inputs(length, F64)
    tight, wide = (setting.memory(ctx, F64, max_rewind=h) for h in (1, length + 1))
    assert_close(stream(tight, tensors, [length]), stream(wide, tensors, [length]), 1e-12)
    assert_same_bits(tight.seen, wide.seen)


@cases(100)
@given(st.data())
def test_step_is_append_then_attend(data):
    """Also when the queries of several calls to append come late, as far as max_rewind allows."""
    setting = data.draw(memories(by_usage=False))
    length = data.draw(lengths(setting).filter(lambda n: n > 0))
    q, k, v = setting.inputs(length, F64, data.draw(KINDS))
    one, two = setting.memory(ctx, F64), setting.memory(ctx, F64)
    want = stream(one, [q, k, v], [length])
    for _, key, value in pieces([q, k, v], data.draw(cuts(length))):
        two.append(key, value)
        late = min(setting.max_rewind, int(two.seen[0]))
        last = slice(int(two.seen[0]) - late, int(two.seen[0]))
        before = {name: tensor.clone() for name, tensor in two.tensors.items()}
        assert_close(two.attend(q[:, :, last]), want[:, :, last], 1e-12)
        for name, tensor in two.tensors.items():
            assert_same_bits(tensor, before[name])
    assert_same_memory(setting, two, one, F64, 1e-12, exact_window=True)


@cases(60)
@given(st.data())
def test_rows_are_independent(data):
    """Row i of a batch equals row i alone, even beside a row of NaN."""
    setting = dataclasses.replace(data.draw(memories()), batch=3)
    length = data.draw(lengths(setting).filter(lambda n: n > 0))
    tensors = setting.inputs(length, F64)
    for x in tensors:
        x[1] = float("nan")
    sizes = data.draw(cuts(length))
    batch = setting.memory(ctx, F64)
    out = stream(batch, tensors, sizes)
    assert out[1].isnan().all()
    for row in (0, 2):
        alone = dataclasses.replace(setting, batch=1).memory(ctx, F64)
        single = stream(alone, [x[row : row + 1] for x in tensors], sizes)
        assert_close(out[row : row + 1], single, 1e-12)
        for name, tensor in alone.tensors.items():
            if name in RINGS:
                want = held(setting, name, tensor, length)
                assert_same_bits(
                    held(setting, name, batch.tensors[name][row : row + 1], length), want
                )


@cases(60)
@given(st.data())
def test_reset_is_fresh(data):
    """Nothing of the first stream is left: not even where it was NaN."""
    setting = data.draw(memories())
    length = data.draw(lengths(setting).filter(lambda n: n > 0))
    sizes = data.draw(cuts(length))
    tensors = setting.inputs(length, F64)
    used, fresh = setting.memory(ctx, F64), setting.memory(ctx, F64)
    stream(used, [torch.full_like(x, float("nan")) for x in tensors], [length])
    used.reset()
    assert used.seen.tolist() == [0] * setting.batch
    assert_same_bits(stream(used, tensors, sizes), stream(fresh, tensors, sizes))
    assert_same_memory(setting, used, fresh, F64, 0.0, exact_window=True)


def turned(setting, x):
    """x [B, heads, T, D] with token t turned to t."""
    options = setting.options
    if options["position"] != "rotary":
        return x
    rotary = reference.Rotary(
        options["rotary_base"], options["rotary_dim"], options["rotary_interleaved"]
    )
    return rotary.rotate(x, list(range(x.shape[2])))


def torch_mask(setting, mask, dtype):
    """The mask, and what ALiBi takes from scores, as torch's own attention takes both."""
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask.logical_not(), -torch.inf)
    slopes = setting.scheme(ctx, dtype).get("alibi_slopes", [0.0] * setting.heads)
    place = torch.arange(len(mask), dtype=dtype)
    return added - torch.tensor(slopes, dtype=dtype)[:, None, None] * (place[:, None] - place)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@cases(60)
@given(data=st.data())
def test_no_slots_is_a_masked_window(dtype, data):
    """C = 0 is a sliding window; A + M >= length is full causal attention: torch agrees."""
    setting = data.draw(
        memories({"compressed": 0}, positions=["rotary", "rotary", "alibi", None], plain=True)
    )
    law = setting.law()
    if law.sinks:  # slot distances close the gap behind the sinks
        setting.options["distance"] = "token"
    length = data.draw(lengths(setting).filter(lambda n: n > 0))
    q, k, v = setting.inputs(length, dtype, data.draw(KINDS))
    mask = torch.tensor(
        [
            [j <= t and (j < law.sinks or j >= law.window_begin(t)) for j in range(length)]
            for t in range(length)
        ]
    )
    if length <= law.sinks + law.window:
        assert torch.equal(mask, torch.ones_like(mask).tril())
    want = scaled_dot_product_attention(
        turned(setting, q),
        turned(setting, k),
        v,
        torch_mask(setting, mask, dtype),
        scale=setting.options["scale"],
        enable_gqa=True,
    )
    memory = setting.memory(ctx, dtype)
    assert_close(stream(memory, [q, k, v], data.draw(cuts(length))), want, CLOSE[dtype])


@cases(60)
@given(st.data())
def test_full_window_is_causal_attention(data):
    """A + M >= length with a compressive memory standing by, unused."""
    setting = data.draw(memories(positions=["rotary", "rotary", None], plain=True))
    law = setting.law()
    length = data.draw(st.integers(1, max(1, law.sinks + law.window)))
    room = dataclasses.replace(setting, schedule={**setting.schedule, "window": law.window + 1})
    tensors = setting.inputs(length, F64, data.draw(KINDS))
    q, k = turned(setting, tensors[0]), turned(setting, tensors[1])
    want = scaled_dot_product_attention(
        q, k, tensors[2], is_causal=True, scale=setting.options["scale"], enable_gqa=True
    )
    assert_close(stream(room.memory(ctx, F64), tensors, data.draw(cuts(length))), want, 1e-12)


@cases(60)
@given(st.data())
def test_identity_slots_are_window(data):
    """c = 1 with an identity compressor and token distance is a window of M + C tokens."""
    schemes = ["rotary", "rotary", "alibi", None]  # relative positions tell slots from tokens
    setting = data.draw(memories({"ratio": 1}, "mean", "none", schemes, plain=True))
    setting.options["distance"] = "token"
    wide = dict(setting.schedule)
    wide["window"], wide["compressed"] = wide["window"] + wide["compressed"], 0
    length = data.draw(lengths(setting))
    tensors = setting.inputs(length, F64)
    slots = setting.memory(ctx, F64)
    window = dataclasses.replace(setting, schedule=wide).memory(ctx, F64)
    sizes = data.draw(cuts(length))
    assert_close(stream(slots, tensors, sizes), stream(window, tensors, sizes), 1e-12)


def small(**options):
    options = {"max_rewind": 5, "dtype": F64, **options}
    return ctx.KVMemory(ctx.Schedule(4, 3, 2, 4, 1), 2, 1, 4, **options)


def drawn(tokens, dtype=F64, heads=2):
    q = torch.randn(2, heads, tokens, 4, dtype=dtype)
    return [q, torch.randn(2, 1, tokens, 4, dtype=dtype), torch.randn(2, 1, tokens, 4, dtype=dtype)]


def test_empty_call_is_nothing():
    memory = small()
    memory.step(*drawn(9))
    before = {name: tensor.clone() for name, tensor in memory.tensors.items()}
    assert memory.step(*drawn(0)).shape == (2, 2, 0, 4)
    assert memory.attend(drawn(0)[0]).shape == (2, 2, 0, 4)
    memory.append(*drawn(0)[1:])
    for name, tensor in memory.tensors.items():
        assert_same_bits(tensor, before[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_size_is_constant(dtype):
    """nbytes counts every tensor; a long stream moves and grows none of them."""
    memory = small(dtype=dtype)
    tensors = memory.tensors
    window, slots = 4 + 4 + 2 - 1 + 5, 3 + 2
    assert tensors["window_keys"].shape == (2, 1, window, 4)
    assert tensors["compressed_values"].shape == (2, 1, slots, 4)
    assert tensors["sink_keys"].shape == (2, 1, 1, 4)
    pairs = 2 * 2 * (window + slots + 1) * 4
    assert memory.nbytes == pairs * dtype.itemsize + 2 * 2 * 8
    assert memory.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for _ in range(50):
        memory.step(*drawn(7, dtype))
    assert {name: tensor.data_ptr() for name, tensor in memory.tensors.items()} == places
    assert memory.nbytes == pairs * dtype.itemsize + 2 * 2 * 8
    assert memory.seen.tolist() == [350, 350]


def test_far_down_the_stream():
    """A bounded memory forgets: after a long stream only what is within reach has an effect."""
    law = ctx.Schedule(4, 3, 2, 4)
    old, young = (ctx.KVMemory(law, 2, 1, 4, dtype=F64) for _ in range(2))
    tensors = drawn(5000 * 4)
    recent = [x[:, :, -60:] for x in tensors]
    long = stream(old, tensors, [20000])
    short = stream(young, recent, [60])
    assert_close(long[:, :, -20:], short[:, :, -20:], 1e-9)


def test_compressor_is_read_at_every_call():
    """Training the module between calls changes the slots made from then on."""
    module = ctx.compression.Conv(1, 2, 4).double()
    memory, twin = small(compressor=module), small(compressor="conv")
    before, after = drawn(11), drawn(30)
    assert_close(memory.step(*before), twin.step(*before), 1e-12)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3)
    memory.append(*after[1:]), twin.append(*after[1:])
    assert_close(held_slots(memory), 3 * held_slots(twin), 1e-12)


def held_slots(memory):
    """The value slots that the last token could see."""
    last = int(memory.seen[0]) - 1
    law = memory.schedule
    groups = range(law.groups(last) - law.slots(last), law.groups(last))
    ring = memory.tensors["compressed_values"]
    return ring[:, :, [g % ring.shape[2] for g in groups]]


def test_output_is_fresh_and_carries_no_grad():
    memory = small()
    q, k, v = drawn(3)
    q.requires_grad_()
    out = memory.step(q, k, v)
    assert not out.requires_grad
    kept = out.clone()
    memory.step(*drawn(6))
    assert torch.equal(out, kept)


def test_inputs_are_not_changed_nor_kept():
    memory, twin = small(position=None), small(position=None)
    tensors = drawn(6)
    copies = [x.clone() for x in tensors]
    assert_same_bits(memory.step(*tensors), twin.step(*copies))
    for x, copy in zip(tensors, copies, strict=True):
        assert_same_bits(x, copy)
        x.zero_()
    following = drawn(4)
    assert_same_bits(memory.step(*following), twin.step(*following))


def test_threads_change_nothing():
    """One and two threads give the same bits, and two memories can be used at the same time."""
    q, k, v = drawn(200, heads=4)
    alone = small().step(q, k, v)
    torch.set_num_threads(2)
    try:
        assert_same_bits(small().step(q, k, v), alone)
    finally:
        torch.set_num_threads(1)
    outs = {}

    def run(name):
        memory = small()
        outs[name] = torch.cat([memory.step(*piece) for piece in pieces([q, k, v], [1] * 200)], 2)

    workers = [threading.Thread(target=run, args=(name,)) for name in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name in range(3):
        assert_close(outs[name], alone, 1e-12)


class TestBias:
    """A tensor of biases is followed, as parameters of compressors are."""

    def step(self, memory):
        q, k, v = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
        return memory.step(q, k, v)

    def memory(self, bias):
        memory = ctx.KVMemory(ctx.Schedule(2, 4, 2), 1, 1, 4, compressed_bias=bias)
        torch.manual_seed(1)
        for _ in range(9):
            self.step(memory)
        return memory

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("how", ["in place", "data", "strides", "no longer"])
    def test_is_followed(self, how, dtype):
        closed = torch.tensor([-3.0, 1.5], dtype=dtype)
        bias = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        memory = self.memory(bias)
        if how == "in place":
            with torch.no_grad():
                bias.copy_(closed)
        elif how == "strides":
            bias.data = torch.stack([closed, closed], 1)[:, 0]
        else:
            bias.data = closed
        expected = self.memory(closed.tolist())
        if how == "no longer":  # a copy has the numbers of the time at which it was made
            memory = pickle.loads(pickle.dumps(memory))
            bias.data = torch.zeros(2, dtype=dtype)
        others = [memory, expected, memory.clone(), memory.resized(window=2), memory.to()]
        results = []
        for one in others[: 3 if how == "no longer" else 5]:
            torch.manual_seed(2)
            results.append(self.step(one))
        assert all(torch.equal(result, results[0]) for result in results)

    @pytest.mark.parametrize(
        "make",
        [
            lambda memory: memory.clone(),
            lambda memory: memory.select([0]),
            lambda memory: memory.resized(compressed=4),
            lambda memory: memory.to(dtype=torch.float64).to(dtype=torch.float32),
            lambda memory: ctx.KVMemory.merge([memory]),
        ],
        ids=["clone", "select", "resized", "to", "merge"],
    )
    def test_is_followed_by_what_was_made_of_it_before(self, make):
        bias = torch.zeros(2)
        memory, expected = make(self.memory(bias)), self.memory([-3.0, 1.5])
        bias.copy_(torch.tensor([-3.0, 1.5]))
        results = []
        for one in (memory, expected):
            torch.manual_seed(2)
            results.append(self.step(one))
        assert torch.equal(*results)

    def test_another_shape_is_refused(self):
        bias = torch.nn.Parameter(torch.zeros(2))
        memory = self.memory(bias)
        before = {name: x.clone() for name, x in memory.tensors.items()}
        bias.data = torch.zeros(2, 2)
        with pytest.raises(ValueError, match=r"compressed_bias must be \[H\]"):
            self.step(memory)
        assert all(torch.equal(x, before[name]) for name, x in memory.tensors.items())


def test_tokens_that_lie_in_the_memory_itself():
    """Views of a memory's own rings are read as they were before the call."""
    memories = [ctx.KVMemory(ctx.Schedule(4, 2, 2), 1, 1, 4) for _ in range(2)]
    x = torch.randn(3, 1, 1, 9, 4)
    for memory in memories:
        memory.step(*x)
    k, v = (memories[0].tensors[f"window_{part}"][:, :, 1:4] for part in ("keys", "values"))
    expected = memories[1].step(x[0, :, :, :3], k.clone(), v.clone())
    assert torch.equal(memories[0].step(x[0, :, :, :3], k, v), expected)
    for name, part in memories[0].tensors.items():
        assert torch.equal(part, memories[1].tensors[name])


def test_device_as_tensors_name_it():
    """ "cpu:0" is where tensors of "cpu" are, as "cuda" is where those of the current GPU are."""
    memory = ctx.KVMemory(
        ctx.Schedule(4, 2, 2), 1, 1, 4, compressor="conv", compressed_bias=[0.5], device="cpu:0"
    )
    assert memory.seen.device == memory.to(device="cpu:0").seen.device == torch.device("cpu")
