"""ctx.Session: every stream as if it were alone, whoever else joins, leaves or steps."""

import dataclasses
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
import snapshot_files
from strategies import COMPRESSORS, assert_close, assert_same_bits, cases, memories

F32, F64 = torch.float32, torch.float64
CLOSE = {F32: 1e-6, F64: 1e-12}
D, HKV, H = 8, 2, 4


def layer(**options):
    schedule = ctx.Schedule(6, 4, 2, 4, sinks=1)
    return ctx.KVMemory(schedule, 1, HKV, D, **{"max_rewind": 5, "dtype": F64} | options)


def tokens(count, streams=1, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(streams, heads, count, D, generator=generator, dtype=F64).to(dtype)
        for heads in (H, HKV, HKV)
    ]


class Alone:
    """The same streams, each in memories of its own."""

    def __init__(self, setting, dtype, layers):
        self.setting, self.dtype = setting, dtype
        self.made = 0
        self.layers = [self.memory() for _ in range(layers)]
        self.streams = {}

    def memory(self):
        return self.setting.memory(ctx, self.dtype)

    def tokens(self, count):
        self.made += 1
        setting = dataclasses.replace(self.setting, seed=self.setting.seed + self.made)
        return [x[0] for x in setting.inputs(count, self.dtype)]


def step(session, alone, ids, counts, kind, data):
    """A tick of some streams, of ragged rows whose padding is not a number."""
    longest = max(counts, default=0) + data.draw(st.integers(0, 2))
    for number in range(session.layers):
        rows = [alone.tokens(count) for count in counts]
        shapes = [x.shape for x in alone.tokens(longest)]
        q, k, v = batch = [
            torch.full((len(ids), *shape), float("nan"), dtype=alone.dtype) for shape in shapes
        ]
        for i, row in enumerate(rows):
            for whole, part in zip(batch, row, strict=True):
                whole[i, :, : counts[i]] = part
        ragged = kind or any(count != longest for count in counts)
        out = session.step(ids, number, q, k, v, counts if ragged else None)
        for i, (id, row) in enumerate(zip(ids, rows, strict=True)):
            want = alone.streams[id][number].step(*(x[None] for x in row))
            assert_close(out[i : i + 1, :, : counts[i]], want, CLOSE[alone.dtype])
            assert not out[i, :, counts[i] :].any()


def check(session, alone):
    assert session.ids == sorted(alone.streams) and len(session) == len(alone.streams)
    for id, layers in alone.streams.items():
        for memory in layers:
            assert session.seen(id) == int(memory.seen)
            assert session.rewindable(id) == int(memory.rewindable)


OPERATIONS = ["join", "step", "step", "step", "step", "leave", "fork", "rewind", "restore"]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("compressor", COMPRESSORS)
@cases(20)
@given(data=st.data())
def test_streams_are_as_alone(compressor, dtype, data):
    """Random joins, leaves, steps of random subsets, forks, rewinds, snapshots and restores."""
    setting = data.draw(memories(compressor=compressor))
    setting = dataclasses.replace(setting, batch=1)
    alone = Alone(setting, dtype, data.draw(st.integers(1, 2)))
    session = ctx.Session(alone.layers, rows=4)
    size, given = session.nbytes, set()
    for _ in range(data.draw(st.integers(4, 14))):
        here = sorted(alone.streams)
        operation = data.draw(st.sampled_from(OPERATIONS)) if here else "join"
        full = len(here) == session.rows
        if operation == "step":
            ids = data.draw(st.permutations(here))[: data.draw(st.integers(1, len(here)))]
            counts = [data.draw(st.sampled_from([0, 1, 1, 2, 3, 5, 9, 30])) for _ in ids]
            step(session, alone, ids, counts, data.draw(st.booleans()), data)
        elif operation in ("join", "fork", "restore") and full:
            with pytest.raises(ValueError, match="rows = 4, got one more"):
                session.join() if operation == "join" else session.fork(here[0])
        elif operation == "join":
            alone.streams[session.join()] = [alone.memory() for _ in alone.layers]
        else:
            id = data.draw(st.sampled_from(here))
            layers = alone.streams[id]
            if operation == "leave":
                session.leave(id)
                del alone.streams[id]
            elif operation == "fork":
                alone.streams[session.fork(id)] = [memory.fork() for memory in layers]
            elif operation == "restore":
                other = session.restore(session.snapshot(id))
                alone.streams[other] = [memory.fork() for memory in layers]
            elif compressor != "most_used":
                count = data.draw(st.integers(0, session.rewindable(id)))
                session.rewind(id, count)
                for memory in layers:
                    memory.rewind(count)
        check(session, alone)
        given |= alone.streams.keys()
    assert session.nbytes == size
    assert session.join() > max(given) if len(session) < 4 else len(given) >= 4


def test_what_a_stream_holds_is_that_of_a_memory():
    """Bit for bit, readable without ctx; other rows are untouched, what leaves is erased."""
    session = ctx.Session([layer(compressor="conv")] * 2, rows=3)
    first, second, third = (session.join() for _ in range(3))
    memories = [layer(compressor="conv") for _ in range(2)]
    before = session.snapshot(third)
    for seed, count in enumerate([3, 9, 1, 1, 20]):
        for number, memory in enumerate(memories):
            x = tokens(count, 2, 10 * seed + number)
            out = session.step([second, first], number, *x)
            assert_same_bits(out[:1], memory.step(*(part[:1] for part in x)))
    held = snapshot_files.state(session.snapshot(second))
    assert (held["format"], held["version"], held["layers"]) == ("ctx.Session", 1, 2)
    for number, memory in enumerate(memories):
        for name, part in memory.state_dict().items():
            mine = held[f"layer.{number}.{name}"]
            assert torch.equal(mine, part) if isinstance(part, torch.Tensor) else mine == part
    assert session.snapshot(third) == before
    session.leave(second)
    held = snapshot_files.state(session.snapshot(session.join()))
    parts = [part for name, part in held.items() if "inv_freq" not in name]
    assert not any(part.any() for part in parts if isinstance(part, torch.Tensor))


def test_fixed_size_snapshots(tmp_path):
    session = ctx.Session(layer(), rows=3)
    id = session.join()
    sizes = set()
    for count in (1, 7, 50):
        session.step([id], 0, *tokens(count))
        sizes.add(len(session.snapshot(id)))
    assert len(sizes) == 1
    session.save(id, tmp_path / "stream")
    assert (tmp_path / "stream").read_bytes() == session.snapshot(id)
    other = ctx.Session(layer(dtype=F32), rows=1)
    moved = other.load(tmp_path / "stream")
    assert other.seen(moved) == 58
    x = tokens(4, seed=5)
    want = session.step([id], 0, *x)
    assert_close(other.step([moved], 0, *(part.float() for part in x)), want.float(), 1e-5)
    with pytest.raises(OSError, match="nowhere"):
        session.save(id, tmp_path / "nowhere" / "stream")
    with pytest.raises(OSError, match="nothing"):
        session.load(tmp_path / "nothing")


def ended(session, id, count, seed=0):
    """The output of a whole tick of one stream."""
    for number in range(session.layers):
        out = session.step([id], number, *tokens(count, seed=seed + number))
    return out


@pytest.mark.parametrize("count", [3, 5])
def test_a_tick_that_does_not_end_has_not_happened(count):
    session, want = (ctx.Session([layer()] * 3, rows=2) for _ in range(2))
    id, same = session.join(), want.join()
    ended(session, id, 11), ended(want, same, 11)
    for number in range(2):
        session.step([id], number, *tokens(count, seed=7))
    assert session.seen(id) == 11 and session.rewindable(id) == 5 - count
    session.join()  # the tick is over
    with pytest.raises(ValueError, match=r"step: layer must be the tick's next = 0, got 2"):
        session.step([id], 2, *tokens(count, seed=7))
    assert_same_bits(ended(session, id, 6, 20), ended(want, same, 6, 20))


@pytest.mark.parametrize("compressor, count", [("mean", 6), ("most_used", 1)])
def test_an_interrupted_stream_is_refused_by_name(compressor, count):
    session = ctx.Session([layer(compressor=compressor)] * 2, rows=3)
    id, other = session.join(), session.join()
    ended(session, id, 11)
    kept = session.snapshot(id)
    session.step([id], 0, *tokens(count, seed=3))
    calls = [
        lambda: ended(session, id, 1),
        lambda: session.snapshot(id),
        lambda: session.fork(id),
        lambda: session.rewind(id, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"interrupted .*: {id}$"):
            call()
    ended(session, other, 2)
    session.leave(id)
    back = session.restore(kept)
    assert session.seen(back) == 11 and session.ids == [other, back]
    ended(session, back, 2)


def test_layers_of_a_tick_go_together():
    session = ctx.Session([layer()] * 2, rows=3)
    one, two = session.join(), session.join()
    x = tokens(2, 2)
    session.step([one, two], 0, *x)
    for ids, lengths in [([two, one], None), ([one, two], [2, 1])]:
        with pytest.raises(ValueError, match="must be those of layer 0, got others"):
            session.step(ids, 1, *x, lengths)
    with pytest.raises(ValueError, match=r"q must be .*= \[2, 4, 2, 8\]|T|q must have"):
        session.step([one, two], 1, x[0][:, :, :1], x[1], x[2])
    session.step([one, two], 1, *x)  # none of them ended the tick
    assert session.seen(one) == session.seen(two) == 2


def errors(session, id):
    q, k, v = tokens(3)
    pair = tokens(3, 2)
    return {
        "unknown id": (IndexError, "id must be of a stream", lambda: session.seen(99)),
        "unknown in step": (IndexError, "got 99", lambda: session.step([99], 0, q, k, v)),
        "left twice": (IndexError, "leave: id must be", lambda: session.leave(99)),
        "same id": (ValueError, f"got {id} twice", lambda: session.step([id, id], 0, *pair)),
        "layer": (IndexError, "between 0 and 0, got 1", lambda: session.step([id], 1, q, k, v)),
        "batch": (ValueError, "k must be", lambda: session.step([id], 0, *pair)),
        "heads": (ValueError, "q must have", lambda: session.step([id], 0, q[:, :3], k, v)),
        "dtype": (TypeError, "q must be", lambda: session.step([id], 0, q.float(), k, v)),
        "long": (ValueError, "lengths must be", lambda: session.step([id], 0, q, k, v, [4])),
        "lengths": (ValueError, "lengths must be", lambda: session.step([id], 0, q, k, v, [1, 1])),
        "no int": (TypeError, "ids must be", lambda: session.step([0.5], 0, q, k, v)),
        "no tensor": (TypeError, "q must be", lambda: session.step([id], 0, None, k, v)),
        "rewind": (ValueError, "take back = 5, got 6", lambda: session.rewind(id, 6)),
        "negative": (ValueError, "got -1", lambda: session.rewind(id, -1)),
        "damaged": (ValueError, "damaged", lambda: session.restore(session.snapshot(id)[:-9])),
        "no bytes": (TypeError, "must be bytes", lambda: session.restore("x")),
        "tick ids": (IndexError, "got 99", lambda: session.tick([99], [q], lambda *a: q)),
        "tick x": (ValueError, "x must be", lambda: session.tick([id], [], lambda *a: q)),
        "tick layer": (TypeError, "must be callable", lambda: session.tick([id], [q], 3)),
    }


@pytest.mark.parametrize("what", errors(None, 0))
def test_an_error_changes_nothing(what):
    session = ctx.Session(layer(), rows=2)
    id = session.join()
    ended(session, id, 11)
    before = session.snapshot(id), session.ids, session.rewindable(id)
    error, message, call = errors(session, id)[what]
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("ctx.Session")
    assert (session.snapshot(id), session.ids, session.rewindable(id)) == before


OTHERS = {
    "window must be": layer,
    "compressor must be": lambda: layer(compressor="max"),
    "distance must be": lambda: layer(distance="token"),
    "max_rewind must be": lambda: layer(max_rewind=6),
    "layers must be": lambda: [layer()] * 2,
    "head_dim must be": lambda: ctx.KVMemory(ctx.Schedule(6, 4, 2, 4, 1), 1, HKV, 4, max_rewind=5),
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_snapshot_of_another_spec_is_refused(message):
    made = OTHERS[message]()
    there = ctx.Session(made, rows=1)
    own = layer()
    if message.startswith("window"):
        own = ctx.KVMemory(ctx.Schedule(7, 4, 2, 4, 1), 1, HKV, D, max_rewind=5, dtype=F64)
    session = ctx.Session(own, rows=2)
    with pytest.raises(ValueError, match=f"ctx.Session.restore: {message}"):
        session.restore(there.snapshot(there.join()))
    assert session.ids == []


def test_damaged_bytes_are_refused_or_equal():
    session = ctx.Session(layer(), rows=2)
    id = session.join()
    ended(session, id, 30)
    good = session.snapshot(id)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        bad = bytearray(good)
        place = int(torch.randint(len(bad), (1,), generator=generator))
        bad[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        said, back = None, None
        try:
            back = session.restore(bytes(bad))
        except (ValueError, TypeError) as error:
            said = str(error)
        assert said is None or said.startswith("ctx.Session.restore: ")
        if back is not None:
            assert session.snapshot(back) == good
            session.leave(back)
    assert session.ids == [id]


class Model(torch.nn.Module):
    """Residual layers of random projections."""

    def __init__(self, layers):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = [
            [torch.randn(H * D, n * D, generator=generator, dtype=F64) / 6 for n in (H, HKV, HKV)]
            for _ in range(layers)
        ]

    def layer(self, number, x, attend):
        heads = [
            (x @ weight).unflatten(-1, (-1, D)).transpose(1, 2) for weight in self.weights[number]
        ]
        return x + attend(*heads).transpose(1, 2).flatten(2)

    def alone(self, memories, x):
        for number, memory in enumerate(memories):
            x = self.layer(number, x, memory.step)
        return x


@pytest.mark.parametrize("compressor", ["mean", "conv", "most_used"])
def test_tick_runs_a_model_over_ragged_streams(compressor):
    """Streams with 1 token beside one with 60, in batches that pad none to twice its tokens."""
    layers = [layer(compressor=compressor) for _ in range(3)]
    session, model = ctx.Session(layers, rows=8), Model(3)
    ids = [session.join() for _ in range(7)]
    memories = {id: [layer(compressor=compressor) for _ in range(3)] for id in ids}
    generator = torch.Generator().manual_seed(2)
    for counts in ([60, 1, 1, 5, 7, 0, 1], [1, 1, 1, 1, 1, 1, 1], [2, 33, 0, 40, 1, 1, 9]):
        order = [ids[i] for i in torch.randperm(7, generator=generator).tolist()]
        x = [torch.randn(count, H * D, generator=generator, dtype=F64) for count in counts]
        batches = []

        def run(number, hidden, attend, batches=batches):
            batches.append(hidden.shape[:2])
            return model.layer(number, hidden, attend)

        out = session.tick(order, x, run)
        assert sum(n * t for n, t in batches) < 2 * 3 * max(1, sum(counts))
        for id, mine, got in zip(order, x, out, strict=True):
            assert_close(got, model.alone(memories[id], mine[None])[0], 1e-12)
            assert session.seen(id) == int(memories[id][0].seen)


def test_a_tick_that_fails_has_not_happened():
    session, model = ctx.Session([layer()] * 2, rows=3), Model(2)
    ids = [session.join(), session.join()]
    x = [torch.randn(count, H * D, dtype=F64) for count in (1, 4)]
    kept = []

    def fails(number, hidden, attend):
        kept.append(attend)
        if number == 1 and hidden.shape[1] == 4:
            raise RuntimeError("mine")
        return model.layer(number, hidden, attend)

    def twice(number, hidden, attend):
        model.layer(number, hidden, attend)
        return model.layer(number, hidden, attend)

    def leaves(number, hidden, attend):
        session.leave(session.join())
        return model.layer(number, hidden, attend)

    with pytest.raises(RuntimeError, match="mine"):
        session.tick(ids, x, fails)
    with pytest.raises(ValueError, match="must be called inside of layer"):
        kept[0](*tokens(1))
    with pytest.raises(ValueError, match="attend once, got more in layer 0"):
        session.tick(ids, x, twice)
    with pytest.raises(ValueError, match="attend once, got not at all"):
        session.tick(ids, x, lambda number, hidden, attend: hidden)
    with pytest.raises(ValueError, match="must leave the session as it is"):
        session.tick(ids, x, leaves)
    with pytest.raises(ValueError, match=r"must return \[N, T, ...\]"):
        session.tick(ids, x, lambda *a: model.layer(*a)[:, :0])
    assert [session.seen(id) for id in ids] == [0, 0]
    out = session.tick(ids, x, model.layer)
    for mine, got in zip(x, out, strict=True):
        assert_close(got, model.alone([layer(), layer()], mine[None])[0], 1e-12)


def test_a_compressor_of_ones_own():
    module = _LastOfGroup()
    session = ctx.Session(layer(compressor=module), rows=3)
    ids = [session.join() for _ in range(3)]
    memories = {id: layer(compressor=module) for id in ids}
    for seed, some in enumerate([[2, 0], [1], [0, 1, 2], [2], [1, 2]] * 4):
        x = tokens(3, len(some), seed)
        out = session.step([ids[i] for i in some], 0, *x)
        for row, i in enumerate(some):
            want = memories[ids[i]].step(*(part[row : row + 1] for part in x))
            assert_close(out[row : row + 1], want, 1e-12)


class _LastOfGroup(torch.nn.Module):
    def forward(self, keys, values):
        return keys[..., -1, :], values[..., -1, :]


def test_sessions_in_threads_of_their_own():
    def serve(results, place):
        session = ctx.Session(layer(), rows=4)
        ids = [session.join() for _ in range(4)]
        for seed in range(30):
            some = ids[seed % 3 :]
            out = session.step(some, 0, *tokens(2, len(some), seed))
        results[place] = out

    results = [None] * 4
    threads = [threading.Thread(target=serve, args=(results, i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in results[1:]:
        assert_same_bits(out, results[0])


def test_constructor_says_what_does_not_fit():
    with pytest.raises(TypeError, match=r"layers must be a ctx.KVMemory or a list"):
        ctx.Session("x", rows=1)
    with pytest.raises(TypeError, match=r"layers must be ctx.KVMemory, got str"):
        ctx.Session(["x"], rows=1)
    with pytest.raises(ValueError, match="layers must be at least one"):
        ctx.Session([], rows=1)
    with pytest.raises(ValueError, match="rows must be between 1"):
        ctx.Session(layer(), rows=0)
    with pytest.raises(ValueError, match="layers must have one max_rewind = 5, got 6"):
        ctx.Session([layer(), layer(max_rewind=6)], rows=1)
    assert repr(ctx.Session(layer(), rows=2)).startswith("Session(layers=1, rows=2, streams=0, ")
