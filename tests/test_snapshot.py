"""Snapshots: a restored memory goes on exactly as the saved one, in every dtype and by every way;
files are whole or not there; and nothing of it depends on inference mode."""

import copy
import io
import itertools
import pickle
import threading

import pytest
import torch

import ctx
import snapshot_files
from strategies import COMPRESSORS, DTYPES, assert_same_bits

B, HKV, H, D, DV = 2, 2, 4, 6, 4
SCHEDULE = ctx.Schedule(5, 3, 2, 4, 1)
SETTINGS = {
    "batch_size": B,
    "kv_heads": HKV,
    "head_dim": D,
    "value_dim": DV,
    "window": 5,
    "compressed": 3,
    "ratio": 2,
    "segment": 4,
    "sinks": 1,
    "overlap": 0,
    "max_rewind": 7,
    "position": "rotary",
    "rotary_dim": 4,
    "rotary_base": 10000.0,
    "rotary_interleaved": 0,
    "attention_factor": 1.0,
    "keys": "plain",
    "mass": "none",
    "distance": "slot",
    "format": "ctx.KVMemory",
    "version": 2,
}


def fresh(compressor="conv", dtype=torch.float32, **options):
    """An empty memory; a compressor by name is the same every time."""
    options = {"max_rewind": 7, "rotary_dim": 4, **options}
    return ctx.KVMemory(SCHEDULE, B, HKV, D, DV, compressor=compressor, dtype=dtype, **options)


def tokens(first, count, dtype=torch.float32, seed=1):
    """q, k, v of some tokens of one stream."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (H, D), (HKV, D), (HKV, DV)
    whole = [torch.randn(B, h, 100, w, generator=generator).to(dtype) for h, w in sizes]
    return [x[:, :, first : first + count] for x in whole]


def streamed(compressor="conv", dtype=torch.float32, seen=37, **options):
    """A memory that has seen something; rows differ."""
    memory = fresh(compressor, dtype, **options)
    memory.step(*tokens(0, seen, dtype), lengths=torch.tensor([seen, seen - 8]))
    return memory


def assert_same_memory(got, want):
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, tensor in want.tensors.items():
        assert_same_bits(got.tensors[name], tensor)


def assert_goes_on_alike(got, want):
    """Bit for bit: outputs, and what is held afterwards."""
    assert_same_memory(got, want)
    dtype = want.tensors["window_keys"].dtype
    for first, count in ((40, 1), (41, 12), (53, 0), (53, 20)):
        piece = tokens(first, count, dtype)
        assert_same_bits(got.step(*piece), want.step(*piece))
    if not want.compressor.by_usage:
        got.rewind(3)
        want.rewind(3)
    assert_same_bits(got.step(*tokens(70, 9, dtype)), want.step(*tokens(70, 9, dtype)))
    assert_same_memory(got, want)


def by_state(memory, path):
    other = fresh(memory.compressor, memory.tensors["window_keys"].dtype)
    other.load_state_dict(memory.state_dict())
    return other


def by_file(memory, path):
    other = fresh(memory.compressor, memory.tensors["window_keys"].dtype)
    memory.save(path)
    other.load(path)
    return other


def by_torch_file(memory, path):
    other = fresh(memory.compressor, memory.tensors["window_keys"].dtype)
    torch.save(memory.state_dict(), path)
    other.load(path)
    return other


def by_safetensors(memory, path):
    other = fresh(memory.compressor, memory.tensors["window_keys"].dtype)
    memory.save(path)
    other.load_state_dict(snapshot_files.state(path.read_bytes()))
    return other


WAYS = {
    "state_dict": by_state,
    "save, load": by_file,
    "torch.save, load": by_torch_file,
    "save, safetensors": by_safetensors,
    "clone": lambda memory, path: memory.clone(),
    "copy": lambda memory, path: copy.copy(memory),
    "deepcopy": lambda memory, path: copy.deepcopy(memory),
    "pickle": lambda memory, path: pickle.loads(pickle.dumps(memory)),
    "select": lambda memory, path: memory.select([0, 1]),
    "merge": lambda memory, path: ctx.KVMemory.merge([memory.select(0), memory.select(1)]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_goes_on(compressor, dtype, way, tmp_path):
    memory = streamed(compressor, dtype)
    assert_goes_on_alike(WAYS[way](memory, tmp_path / "memory.ctx"), memory)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_one(way, tmp_path):
    """What is done to the copy is not done to the original, or the other way round."""
    memory = streamed()
    restored = WAYS[way](memory, tmp_path / "memory.ctx")
    before = {name: tensor.clone() for name, tensor in memory.tensors.items()}
    restored.step(*tokens(40, 11))
    restored.reset(1)
    for name, tensor in memory.tensors.items():
        assert_same_bits(tensor, before[name])
    assert memory.seen.tolist() == [37, 29]


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle"])
def test_settings_come_along(way, tmp_path):
    """Copies of the object know everything; states leave to the model what is the model's."""
    options = {
        "distance": "token",
        "position": None,
        "compressed_bias": [0.5, -1.0, 2.0, 0.0],
        "scale": 0.3,
        "rotary_dim": None,
    }
    memory = streamed("gated", torch.bfloat16, **options)
    with torch.no_grad():
        for parameter in memory.compressor.parameters():
            parameter.normal_()
    restored = WAYS[way](memory, tmp_path)
    assert repr(restored) == repr(memory)
    assert_goes_on_alike(restored, memory)


def test_who_shares_the_compressor():
    """clone and copy share it, as layers share weights; deepcopy and pickle have their own."""
    memory = streamed()
    for other in (memory.clone(), copy.copy(memory), memory.select([0, 1])):
        assert other.compressor is memory.compressor
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        before = {name: tensor.clone() for name, tensor in other.tensors.items()}
        with torch.no_grad():
            memory.compressor.key_weight.add_(1.0)
        twin = streamed()
        assert_same_bits(other.step(*tokens(37, 20)), twin.step(*tokens(37, 20)))
        with torch.no_grad():
            memory.compressor.key_weight.sub_(1.0)
        assert before.keys() == other.tensors.keys()


@pytest.mark.parametrize("narrow, wide", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_other_dtype(narrow, wide, tmp_path):
    """Loading rounds; through a wider dtype and back it gives the same bits."""
    memory, there, back = streamed(dtype=narrow), fresh(dtype=wide), fresh(dtype=narrow)
    memory.save(tmp_path / "memory.ctx")
    there.load(tmp_path / "memory.ctx")
    for name, tensor in memory.tensors.items():
        assert_same_bits(there.tensors[name], tensor.to(there.tensors[name].dtype))
    assert_same_memory(there, memory.to(dtype=wide))
    there.save(tmp_path / "memory.ctx")
    back.load(tmp_path / "memory.ctx")
    if wide.itemsize > narrow.itemsize:
        assert_same_memory(back, memory)
    assert there.step(*tokens(37, 9, wide)).isfinite().all()


def test_documented_parts(tmp_path):
    """Exactly those that ctx/snapshot.h lists, readable without ctx and without trust."""
    memory = streamed()
    memory.save(tmp_path / "memory.ctx")
    held = snapshot_files.state((tmp_path / "memory.ctx").read_bytes())
    assert held.keys() == {*SETTINGS, "compressor", "inv_freq", *memory.tensors}
    assert torch.equal(held["inv_freq"], 10000.0 ** -torch.tensor([0.0, 0.5], dtype=torch.float64))
    plain = {name: part for name, part in held.items() if name in {*SETTINGS, "compressor"}}
    assert plain == {**SETTINGS, "compressor": "conv"}
    assert {name: type(part) for name, part in plain.items()} == {
        name: type(part) for name, part in {**SETTINGS, "compressor": "conv"}.items()
    }
    for name, tensor in memory.tensors.items():
        assert_same_bits(held[name], tensor)


def test_state_aliases_and_copies():
    """state_dict is a view; load_state_dict copies, from views and from itself, too."""
    memory = streamed()
    state = memory.state_dict()
    assert state["seen"].data_ptr() == memory.seen.data_ptr()
    before = memory.clone()
    memory.load_state_dict(state)
    assert_same_memory(memory, before)
    strided = {
        name: part.double().flip(0).flip(0).mT.contiguous().mT
        if isinstance(part, torch.Tensor) and part.dim() == 4
        else part
        for name, part in state.items()
    }
    other = fresh()
    other.load_state_dict(strided)
    assert_same_memory(other, before)


def test_torch_save_takes_the_memory_itself():
    """Trusting pickles; with tensors that need a device, map_location would be of use."""
    memory, file = streamed(), io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    assert_goes_on_alike(torch.load(file, weights_only=False), memory)


def test_save_while_another_thread_saves(tmp_path):
    """Every thread writes a file of its own; the last one wins, and it is whole."""
    path = tmp_path / "memory.ctx"
    memories = [streamed(seen=20 + i) for i in range(4)]
    failures = []

    def work(memory):
        try:
            for _ in range(25):
                memory.save(path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[memory]) for memory in memories]
    for thread in threads:
        thread.start()
    other = fresh()
    for _ in range(20):
        if path.exists():
            other.load(path)
            assert other.seen[0].item() in range(20, 24)
    for thread in threads:
        thread.join()
    assert not failures
    other.load(path)
    [same] = [memory for memory in memories if memory.seen[0] == other.seen[0]]
    assert_same_memory(other, same)
    assert list(tmp_path.iterdir()) == [path]


MODES = {"inference": torch.inference_mode, "no grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("used", MODES)
def test_inference_mode(made, used, tmp_path):
    """A memory works where it was made, and elsewhere; so does what comes out of it."""
    want = streamed()
    with MODES[made]():
        memory = streamed()
        state, copied, chosen = memory.state_dict(), memory.clone(), memory.select([1, 0])
        memory.save(tmp_path / "memory.ctx")
    with MODES[used]():
        for other in (
            memory,
            copied,
            by_state(memory, None),
            by_safetensors(memory, tmp_path / "x"),
        ):
            assert_goes_on_alike(other, want.clone())
        loaded = fresh()
        loaded.load(tmp_path / "memory.ctx")
        assert_goes_on_alike(loaded, want.clone())
        memory.load_state_dict(loaded.state_dict())
        memory.load_state_dict(by_file(copied, tmp_path / "y").state_dict())
        memory.reset(0)
        memory.reset()
        memory.rewind(0)
        memory.append(*tokens(0, 5)[1:])
        memory.attend(tokens(0, 5)[0])
        merged = ctx.KVMemory.merge([chosen, memory])
        assert merged.seen.tolist() == [29, 37, 5, 5]
        memory.load_state_dict(
            {**state, "seen": torch.tensor([1, 2]), "rewindable": state["seen"] * 0}
        )
    memory.step(*tokens(0, 3))
    assert memory.seen.tolist() == [4, 5]


@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("used", MODES)
def test_inference_mode_of_a_layer(made, used):
    """The same of a layer's dict of tensors."""
    layer = ctx.CompressiveAttention(8, 2, window=5, compressed=3, ratio=2, sinks=1)
    x = torch.randn(2, 60, 8)
    with torch.no_grad():
        want, _ = layer(x, layer.init_memory(2))
    with MODES[made]():
        held = layer.init_memory(2)
        first, held = layer(x[:, :30], held)
    with MODES[used]():
        second, held = layer(x[:, 30:40], held)
        copied = ctx.rows.merge([ctx.rows.select(held, [0]), ctx.rows.select(held, [1])])
        ctx.rows.rewind(held, 4)
        third, held = layer(x[:, 36:], held)
        again, _ = layer(x[:, 40:], ctx.rows.clone(copied))
        ctx.rows.reset(copied, 1)
    got = torch.cat([first, second, third[:, 4:]], 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, want[:, 40:], atol=1e-5, rtol=1e-5)
    assert held["seen"].tolist() == [60, 60] and copied["seen"].tolist() == [40, 0]
