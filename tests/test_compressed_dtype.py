"""Compressed slots in a storage of their own: another floating dtype, or int8 with a scale each."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
import strategies
from bad_input import changed
from ctx import reference
from strategies import CLOSE, assert_close, assert_same_bits, cases, stream

NARROW = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = [*NARROW, torch.int8]
# A slot that rounds the other way moves by a 127th of its largest number.
TOLERANCE = {**CLOSE, torch.int8: 2e-2}


@pytest.mark.parametrize("slots", SLOTS, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@cases(25)
@given(data=st.data())
def test_equal_to_the_reference(data, dtype, slots):
    """However a stream is cut, and whatever else a memory may be."""
    setting = data.draw(strategies.memories())
    length = data.draw(strategies.lengths(setting))
    tensors = setting.inputs(length, dtype, data.draw(st.integers(0, 3)))
    ours, theirs = (
        setting.memory(module, dtype, compressed_dtype=slots) for module in (ctx, reference)
    )
    assert ours.tensors["compressed_keys"].dtype == slots
    got = stream(ours, tensors, data.draw(strategies.cuts(length)))
    want = stream(theirs, tensors, [length])
    close = max(TOLERANCE[dtype], TOLERANCE[slots])
    strategies.assume_clear(theirs, close)
    assert_close(got, want, close)


def streams(length=600, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(2, heads, length, 64) for heads in (8, 2, 2)]


def memory(slots, dtype=torch.float32, **changes):
    schedule = ctx.Schedule(32, 64, 4, 16)
    settings = {"compressor": "mean", "max_rewind": 32, "dtype": dtype, **changes}
    return ctx.KVMemory(schedule, 2, 2, 64, compressed_dtype=slots, **settings)


@pytest.mark.parametrize("distance", ["slot", "token"])
def test_int8_is_close_to_float32(distance):
    """Relative error of the outputs, of which most of the weight lies on compressed slots."""
    tensors = streams()
    exact, narrow = (
        stream(memory(slots, distance=distance, compressed_bias="log_ratio"), tensors, [600])
        for slots in (None, torch.int8)
    )
    error = (narrow - exact).norm() / exact.norm()
    assert 0 < error < 1e-2, error


def test_int8_takes_a_quarter():
    wide, narrow = memory(None), memory(torch.int8)
    sizes = [
        m.tensors["compressed_keys"].nbytes / m.tensors["compressed_keys"].shape[2]
        for m in (wide, narrow)
    ]
    assert sizes == [2 * 2 * 64 * 4, 2 * 2 * (64 + 4)]


@pytest.mark.parametrize("slots", SLOTS, ids=str)
def test_differentiable_calls_read_them(slots):
    """A call under grad sees what the memory holds, and goes on filling it."""
    attn = ctx.CompressiveAttention(32, 4, 2, window=6, compressed=5, ratio=2, compressor="mean")
    x = torch.randn(2, 60, 32)
    with torch.no_grad():
        memories = [attn.init_memory(2, compressed_dtype=slots) for _ in range(2)]
        for held in memories:
            attn(x[:, :40], held)
        want, streamed = attn(x[:, 40:], memories[0])
    got, after = attn(x[:, 40:], memories[1])
    assert_close(got.detach(), want, TOLERANCE[slots])
    assert after["compressed_keys"].dtype == streamed["compressed_keys"].dtype == slots
    assert_same_bits(after["compressed_keys"], streamed["compressed_keys"])


@pytest.mark.parametrize("slots", SLOTS, ids=str)
def test_copies_and_snapshots(slots, tmp_path):
    tensors = streams(300)
    held = memory(slots)
    stream(held, tensors, [300])
    held.save(tmp_path / "memory.ctx")
    loaded = memory(slots)
    loaded.load(tmp_path / "memory.ctx")
    others = [held.clone(), held.select([0, 1]), pickle.loads(pickle.dumps(held)), loaded]
    others += [copy.deepcopy(held), ctx.KVMemory.merge([held.select(0), held.select(1)])]
    q, k, v = streams(9, seed=1)
    want = held.step(q, k, v)
    for other in others:
        assert_same_bits(other.step(q, k, v), want)
        for name, tensor in held.tensors.items():
            assert_same_bits(other.tensors[name], tensor)


def test_a_wider_memory_keeps_the_numbers():
    held = memory(torch.int8)
    stream(held, streams(300), [300])
    wide = held.to(dtype=torch.float64)
    assert wide.tensors["compressed_keys"].dtype == torch.float64
    q, k, v = streams(3, seed=1)  # before the next eviction, whose slots only one rounds
    assert_close(wide.step(*(x.double() for x in (q, k, v))).float(), held.step(q, k, v), 1e-5)
    assert held.to(dtype=torch.bfloat16).tensors["compressed_keys"].dtype == torch.int8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad):
    held = memory(torch.int8)
    tensors = streams(100)
    tensors[2][0, 0, 3] = bad
    out = stream(held, tensors, [100])
    assert not out[0, :4, -1].isfinite().any()
    assert out[1].isfinite().all() and out[0, 4:].isfinite().all()


class TestErrors:
    @pytest.mark.parametrize("slots", [torch.float64, torch.int32, torch.bool])
    def test_no_such_storage(self, slots):
        with pytest.raises(TypeError, match="compressed_dtype must be"):
            memory(slots)

    @pytest.mark.parametrize("slots", SLOTS, ids=str)
    def test_float64_has_its_own(self, slots):
        with pytest.raises(TypeError, match="compressed_dtype must be float64"):
            memory(slots, dtype=torch.float64)

    def test_no_dtype(self):
        with pytest.raises(TypeError, match=r"compressed_dtype must be a torch\.dtype, got 'int8'"):
            memory("int8")

    def test_snapshots_of_another_storage(self):
        held = memory(torch.int8)
        for one, other in ((held, memory(None)), (memory(None), held)):
            with pytest.raises(ValueError, match="compressed_keys must be"):
                one.load_state_dict(other.state_dict())

    def test_merged_with_another_storage(self):
        with pytest.raises(TypeError, match="one compressed_dtype"):
            ctx.KVMemory.merge([memory(torch.int8), memory(None)])

    def test_modules(self):
        attn = ctx.CompressiveAttention(32, 4, window=4, compressed=4, ratio=2)
        with pytest.raises(TypeError, match=r"compressed_dtype must be one of torch\.float32"):
            attn.init_memory(1, compressed_dtype=torch.int32)
        held = attn.init_memory(1)
        held = changed(compressed_keys=torch.Tensor.int)(held)
        with pytest.raises(TypeError, match="compressed_keys must be one of"), torch.no_grad():
            attn(torch.randn(1, 3, 32), held)
