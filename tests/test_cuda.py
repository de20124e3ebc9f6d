"""The memory on a GPU against the memory on the CPU, and what holds there alone: graphs, no
waiting, counters that the host does not read.

    pytest -m cuda tests/test_cuda.py
    CTX_REQUIRE_CUDA=1 pytest ...       fails where there is no GPU, or no kernels in the build
    CTX_TEST_DEVICE=cpu pytest ...      tries the tests themselves: another device stands in
    CTX_CUDA_CASES=20 pytest ...        fewer random cases
"""

import contextlib
import copy
import os
import pickle

import pytest
import torch
from torch.library import opcheck
from torch.utils import _pytree as pytree

import ctx
import test_ops
from benchmarks._device import captured
from ctx import _load
from ctx.state import TENSORS
from device_cases import Case, differences
from device_streams import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    SIZES,
    STREAMS,
    VOCAB,
    WIDTH,
    B,
    kv_stream,
    layer_stream,
    model_stream,
    rows_of,
    trained,
)
from strategies import CLOSE, assert_close, assert_same_bits

pytestmark = pytest.mark.cuda

ASKED = torch.device(os.environ.get("CTX_TEST_DEVICE", "cuda:0"))
REQUIRED = os.environ.get("CTX_REQUIRE_CUDA") == "1"
CASES = int(os.environ.get("CTX_CUDA_CASES", "160"))


def missing():
    """Why there is nothing to test; None where there is."""
    if ASKED.type != "cuda":
        return None
    if not _load.build_info["cuda"]:
        return "this build has no CUDA kernels"
    return None if torch.cuda.is_available() else "torch finds no GPU"


@pytest.fixture
def device():
    why = missing()
    if why is not None:
        (pytest.fail if REQUIRED else pytest.skip)(why)
    return ASKED


def moved(arguments, device):
    """Arguments of an operator with every tensor on the device, leaves of a graph as they were."""

    def move(x):
        return x.detach().to(device, copy=True).requires_grad_(x.requires_grad)

    return pytree.tree_map_only(torch.Tensor, move, arguments)


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(CASES))
def test_parity(device, seed):
    """Streams and differentiable calls: rows of unequal length, documents, reads, rewinds, int8."""
    case = Case(seed)
    wrong = differences(case, case.run(), case.run(device))
    assert not wrong, (str(case), *wrong)


# Sizes at which kernels take the ways that tiny cases do not: tensor cores, several splits, blocks
# of queries. (heads, kv_heads, head_dim, dtype, dtype of slots)
REAL = [
    (8, 8, 64, torch.float32, None),
    (9, 3, 64, torch.bfloat16, None),
    (8, 2, 128, torch.bfloat16, torch.int8),
    (8, 1, 128, torch.float16, None),
    (16, 1, 64, torch.float16, torch.int8),
    (4, 4, 80, torch.bfloat16, None),
    (4, 1, 256, torch.float32, torch.int8),
    (4, 2, 64, torch.float64, None),
]


@pytest.mark.parametrize("compressor", ["mean", "most_used"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, dtype, slots", REAL)
def test_parity_at_real_sizes(device, heads, kv_heads, head_dim, dtype, slots, compressor):
    if compressor == "most_used" and (dtype.itemsize == 2 or slots is not None):
        pytest.skip("near-equal counts of rounded numbers may choose another token")
    schedule = ctx.Schedule(200, 180, 4, 4, 4)
    options = {"compressor": compressor, "dtype": dtype, "compressed_dtype": slots}
    places = ("cpu", device)
    memories = [
        ctx.KVMemory(schedule, 2, kv_heads, head_dim, device=place, **options) for place in places
    ]
    tolerance = max(CLOSE[dtype], 0 if slots is None else 2e-2)
    for tokens in (700, 301, 1, 1, 1, 1, 17):
        given = [torch.randn(2, n, tokens, head_dim) for n in (heads, kv_heads, kv_heads)]
        want, got = (
            memory.step(*(x.to(place, dtype) for x in given))
            for memory, place in zip(memories, places, strict=True)
        )
        assert_close(got.cpu(), want, tolerance)


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative"])
def test_gradients_at_real_sizes(device, position):
    layer = ctx.CompressiveAttention(
        embed_dim=256,
        num_heads=4,
        num_kv_heads=2,
        position=position,
        window=64,
        compressed=48,
        ratio=4,
        segment=16,
        sinks=4,
    )
    x = torch.randn(2, 3, 200, 256)
    made = []
    for place in ("cpu", device):
        mine, carried = copy.deepcopy(layer).to(place), None
        given = x.to(place, copy=True).requires_grad_()
        for part in given.unbind(1):
            y, carried = mine(part, carried)
            y.square().sum().backward()
        grads = [given.grad, *(parameter.grad for parameter in mine.parameters())]
        made.append([y.detach(), *grads])
    for want, got in zip(*made, strict=True):
        assert_close(got.cpu(), want, 1e-4)


# --- operators ------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", test_ops.ROWS)
@pytest.mark.parametrize("name", test_ops.MUTATING)
def test_opcheck_streaming(device, name, rows, dtype):
    operator, made = test_ops.MUTATING[name]
    with torch.no_grad():
        arguments = moved(made(dtype, rows, False), device)
        opcheck(getattr(torch.ops.ctx, operator).default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", test_ops.FUNCTIONAL)
def test_opcheck_functional(device, name, dtype):
    operator, made = test_ops.FUNCTIONAL[name]
    opcheck(getattr(torch.ops.ctx, operator).default, moved(made(dtype, True), device))


@pytest.mark.parametrize("name", ["attend_backward", "evicted_groups_backward"])
def test_opcheck_backward(device, name):
    arguments = moved(getattr(test_ops, name)(torch.float32), device)
    opcheck(getattr(torch.ops.ctx, name).default, arguments)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("rows", test_ops.ROWS)
def test_opcheck_plan(device, rows, carried):
    """And a plan has the same numbers whatever device makes it."""
    arguments = test_ops.planned(rows, carried)
    there = moved(arguments, device)
    opcheck(torch.ops.ctx.plan.default, there)
    want, got = torch.ops.ctx.plan(*arguments), torch.ops.ctx.plan(*there)
    assert torch.equal(got.cpu(), want)
    clocks = test_ops.clock(carried)
    clocks_there = moved(clocks, device)
    opcheck(torch.ops.ctx.advance_.default, (*moved(clocks, device), got, 5))
    torch.ops.ctx.advance_(*clocks, want, 5)
    torch.ops.ctx.advance_(*clocks_there, got, 5)
    assert torch.equal(torch.stack(clocks_there).cpu(), torch.stack(clocks))


# --- a token's step -------------------------------------------------------------------------------


def streamed(name, device, tokens=30):
    """A stream in its middle, and a generator of what comes next."""
    stream, generator = STREAMS[name](device), torch.Generator().manual_seed(1)
    for _ in range(tokens):
        stream.feed(stream.draw(generator))
        stream.call()
    return stream, generator


@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_graph_equals_eager(device, name):
    """Fifty tokens, bit for bit, and the memory after them."""
    stream, generator = streamed(name, device)
    begin, tokens = stream.held(), [stream.draw(generator) for _ in range(50)]
    eager = []
    for drawn in tokens:
        stream.feed(drawn)
        eager.append(stream.call().clone())
    end = stream.held()
    step = captured(stream.call, device)
    stream.restore(begin)
    for drawn, want in zip(tokens, eager, strict=True):
        stream.feed(drawn)
        assert_same_bits(step(), want)
    for part, want in stream.held().items():
        if torch.is_tensor(want):
            assert torch.equal(want, end[part]), part


@contextlib.contextmanager
def no_waiting(device):
    """An error where the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["plain", "lengths", "reset_at"])
@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_step_waits_for_nothing(device, name, kind):
    stream, _ = streamed(name, device, 3)
    rows = rows_of(kind, device)
    stream.call(**rows)  # the first use of a law's frequencies may wait
    with no_waiting(device):
        stream.call(**rows)


@torch.no_grad()
def test_calls_of_many_tokens_wait_for_nothing(device):
    """Prefill and its padding, appending, reading; and calls under grad with their backward."""
    memory = kv_stream(device, "conv").memory
    q, k, v = (torch.randn(B, n, 40, HEAD_DIM).to(device) for n in (HEADS, KV_HEADS, KV_HEADS))
    rows = [rows_of(kind, device, 40) for kind in ("plain", "lengths", "reset_at")]

    def run():
        for given in rows:
            memory.step(q, k, v, **given, return_region_weights=True)
            memory.append(k, v, **given)
        memory.attend(q[:, :, -1:])
        memory.reset()

    run()
    with no_waiting(device):
        run()


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative"])
def test_training_waits_for_nothing(device, position):
    layer = layer_stream(device, position=position).step
    x = torch.randn(B, 40, WIDTH).to(device)
    trained(layer, x)
    with no_waiting(device):
        trained(layer, x)


# --- devices that do not fit ----------------------------------------------------------------------


def elsewhere(device):
    return "cpu" if device.type == "cuda" else "meta"


@pytest.mark.parametrize("name", ["q", "k", "v", "lengths", "reset_at"])
def test_memory_refuses_another_device(device, name):
    stream = kv_stream(device)
    given = dict(zip("qkv", stream.inputs, strict=True))
    given |= rows_of("lengths", device) | rows_of("reset_at", device)
    given[name] = given[name].to(elsewhere(device))
    with pytest.raises(ValueError, match=rf"step: {name} must be on {device}.*, got"):
        stream.memory.step(*given.values())
    assert stream.memory.seen.tolist() == [0, 0]


@pytest.mark.parametrize("made", [layer_stream, model_stream])
@pytest.mark.parametrize("name", ["input", "memory", "lengths", "reset_at"])
@torch.no_grad()
def test_modules_refuse_another_device(device, made, name):
    stream, there = made(device), elsewhere(device)
    begin, given = stream.held(), [*stream.inputs, stream.memory]
    rows, match = {}, f"{name} must be on .*"
    if name == "input":
        given[0], match = given[0].to(there), "(x|tokens) must be on .* as the parameters"
    elif name == "memory":
        given[1] = given[1].to(device=there)
    else:
        rows = {name: rows_of(name, device)[name].to(there)}
    with pytest.raises(ValueError, match=f"{match}, got {there}"):
        stream.step(*given, **rows)
    for part, held in stream.held().items():
        assert not torch.is_tensor(held) or torch.equal(held, begin[part])


def test_device_without_an_index(device):
    """ "cuda" is the current one, also where the engine compares devices."""
    memory = ctx.KVMemory(
        ctx.Schedule(**SIZES), B, 2, 32, compressor="conv", compressed_bias="log_ratio",
        device=device.type,
    )  # fmt: skip
    stream = kv_stream(device)
    memory.step(*stream.inputs)
    assert memory.to(device=device.type).seen.device == memory.seen.device


# --- rows -----------------------------------------------------------------------------------------


def assert_same_memory(got, want):
    """Every tensor bit for bit; those of `got` are on the device."""
    names = ("seen", "rewindable", *TENSORS) if isinstance(want, ctx.KVMemory) else None
    if names:
        pairs = [(got.tensors[name], want.tensors[name]) for name in names]
    else:
        pairs = [*zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)]
    for mine, other in pairs:
        assert mine.device == ASKED
        assert_same_bits(mine.cpu(), other)


def kv_memory(slots):
    stream = kv_stream("cpu", dtype=torch.bfloat16, compressed_dtype=slots)
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        stream.feed(stream.draw(generator))
        stream.call(lengths=torch.randint(0, 2, (B,), generator=generator))
    return stream.memory


def model_memory(slots):
    del slots
    return streamed("model", torch.device("cpu"), 30)[0].memory


ROWS = {
    "clone": lambda memory: memory.clone(),
    "select": lambda memory: memory.select([1, 1, 0]),
    "select by mask": lambda memory: memory.select(
        torch.tensor([False, True]).to(memory.seen.device)
    ),
    "merge": lambda memory: type(memory).merge([memory, memory.select(1)]),
    "to": lambda memory: memory.to(dtype=torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": lambda memory: pickle.loads(pickle.dumps(memory)),
}
IN_PLACE = {
    "reset": lambda memory: memory.reset(),
    "reset a row": lambda memory: memory.reset(1),
    "rewind": lambda memory: memory.rewind(1),
    "rewind rows": lambda memory: memory.rewind(torch.tensor([2, 0])),
}


@pytest.mark.parametrize("operation", [*ROWS, *IN_PLACE])
@pytest.mark.parametrize("slots", [None, torch.int8], ids=str)
@pytest.mark.parametrize("made", [kv_memory, model_memory])
@torch.no_grad()
def test_rows(device, made, slots, operation):
    if made is model_memory and slots is not None:
        pytest.skip("as those of a KVMemory")
    memory = made(slots)
    there = memory.to(device=device)
    assert_same_memory(there, memory)
    if operation in ROWS:
        memory, there = ROWS[operation](memory), ROWS[operation](there)
    else:
        IN_PLACE[operation](memory)
        IN_PLACE[operation](there)
    assert_same_memory(there, memory)
    assert_same_memory(there.to(device="cpu").to(device=device), memory)


@pytest.mark.parametrize("made", [kv_memory, model_memory])
@torch.no_grad()
def test_files(device, made, tmp_path):
    """A file knows no device: written on one, it is read on the other."""
    memory = made(None)
    there = memory.to(device=device)
    there.save(tmp_path / "there")
    memory.save(tmp_path / "here")
    if isinstance(memory, ctx.Memory):
        assert_same_memory(ctx.Memory.load(tmp_path / "here", device), memory)
        assert_same_memory(ctx.Memory.load(tmp_path / "there", device), memory)
        loaded = ctx.Memory.load(tmp_path / "there")
    else:
        there.reset()
        there.load(tmp_path / "here")
        assert_same_memory(there, memory)
        loaded = memory.clone()
        loaded.reset()
        loaded.load(tmp_path / "there")
    assert_same_memory(loaded.to(device=device), memory)


@torch.no_grad()
def test_generation(device):
    """A model that moved goes on with the same tokens."""
    config = ctx.CompressiveTransformerConfig(
        vocab_size=VOCAB, embed_dim=WIDTH, num_layers=2, num_heads=4, **SIZES
    )
    model = ctx.CompressiveTransformer(config).eval()
    prompt = torch.randint(0, VOCAB, (B, 20))
    lengths = torch.tensor([20, 7])
    want = model.generate(prompt, 30, lengths=lengths, temperature=0.0)
    got = copy.deepcopy(model).to(device).generate(
        prompt.to(device), 30, lengths=lengths.to(device), temperature=0.0
    )  # fmt: skip
    assert torch.equal(got.cpu(), want)


# --- counters that do not fit ---------------------------------------------------------------------

# Last: what is written out of bounds would be the end of every test after it.

MARGIN = 2048


def guarded(x, canary):
    """A tensor of the same numbers in the middle of a larger one, and what stands around it."""
    whole = torch.full((x.numel() + 2 * MARGIN,), canary, dtype=x.dtype, device=x.device)
    middle = whole[MARGIN : MARGIN + x.numel()].view(x.shape)
    middle.copy_(x)
    return middle, (whole[:MARGIN], whole[MARGIN + x.numel() :])


@pytest.mark.parametrize("seen", [-1, -(2**63), 2**62, 2**63 - 1])
@pytest.mark.parametrize("compressor", ["mean", "conv", "most_used"])
@torch.no_grad()
def test_damaged_counter(device, compressor, seen):
    """The host does not read it, and the kernels write nowhere but into the memory, which is as new
    once its rows have been reset."""
    layer = ctx.CompressiveAttention(
        embed_dim=WIDTH, num_heads=4, compressor=compressor, device=device, **SIZES
    )
    memory, canary = layer.init_memory(B), 77
    rings, margins = [], []
    for ring in memory.rings[0]:
        middle, around = guarded(ring, canary)
        rings.append(middle)
        margins += around
    memory = ctx.Memory(memory.spec, *memory.clock, [rings])
    xs = [torch.randn(B, tokens, WIDTH).to(device) for tokens in (1, 9, 70)]
    for x in xs:
        memory.seen[1] = seen
        if device.type == "cpu":
            with pytest.raises(ValueError, match="seen must be between 0 and"):
                layer(x, memory)
        else:
            layer(x, memory)
            layer(x, memory, reset_at=torch.zeros(x.shape[:2], dtype=torch.bool, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert all((margin == canary).all() for margin in margins)
    memory.reset()
    fresh = layer.init_memory(B)
    for x in xs:
        assert_same_bits(layer(x, memory)[0], layer(x, fresh)[0])
