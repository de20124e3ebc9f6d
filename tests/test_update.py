"""A call with `update=False` reads a memory and does not write it: the output is that of a call
that does, and every bit of the memory stays.
"""

import pytest
import torch

import ctx
from pairwise import pairwise
from strategies import COMPRESSORS, POOLING, assert_close, assert_same_bits

F64 = torch.float64
SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1, "max_rewind": 4}
POSITIONS = ["rotary", "relative", "alibi", None]
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
LAYERS = pairwise(
    *(COMPRESSORS, POSITIONS, ["slot", "token"], ["kv", "hidden"], MODES),
    allowed=lambda name, _position, _distance, content, _mode: content == "kv" or name in POOLING,
)


def attention(dtype=F64, **options):
    torch.manual_seed(3)
    attn = ctx.CompressiveAttention(8, 4, 2, dtype=F64, **SIZES, **options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.to(dtype)


def streamed(attn, x, **made):
    """A memory that has dropped slots, rows at different places."""
    with torch.no_grad():
        lengths = torch.tensor([x.shape[1], x.shape[1] - 4])
        return attn(x, attn.init_memory(2, **made), lengths=lengths)[1]


@pytest.mark.parametrize("compressor, position, distance, content, mode", LAYERS)
def test_reads_and_does_not_write(compressor, position, distance, content, mode):
    """Also of no memory, over padding and a new document, and for no tokens at all."""
    attn = attention(
        compressor=compressor, position=position, distance=distance, memory_content=content
    )
    x = torch.randn(2, 31, 8, dtype=F64)
    held = streamed(attn, x[:, :20])
    reset_at = torch.zeros(2, 11, dtype=torch.bool)
    reset_at[1, 5] = True
    for memory, tokens, rows in (
        (held, 11, {}),
        (held, 11, {"lengths": torch.tensor([7, 11])}),
        (held, 11, {"mask": torch.arange(11) >= torch.tensor([[3], [0]]), "reset_at": reset_at}),
        (held, 1, {}),
        (held, 0, {}),
        (None, 11, {"reset_at": reset_at}),
    ):
        chunk = x[:, 20 : 20 + tokens]
        before = None if memory is None else ctx.rows.clone(memory)
        with MODES[mode]():
            y, after, usage = attn(chunk, memory, update=False, return_region_weights=True, **rows)
            want, _, shares = attn(chunk, before, return_region_weights=True, **rows)
        assert after is memory
        assert_close(y, want, 1e-12)
        assert_close(usage, shares, 1e-12)
        assert y.requires_grad == (mode == "grad")
        if memory is not None:
            before = streamed(attn, x[:, :20])
            for name, tensor in memory.tensors.items():
                assert_same_bits(tensor, before[name])


@pytest.mark.parametrize(
    "compressor, content", [("conv", "kv"), ("most_used", "kv"), ("gated", "hidden")]
)
def test_gradients_are_those_of_a_call_that_writes(compressor, content):
    attn = attention(compressor=compressor, memory_content=content)
    x = torch.randn(2, 31, 8, dtype=F64)
    memory, leaf = streamed(attn, x[:, :20]), x[:, 20:].clone().requires_grad_()
    found = []
    for update in (False, True):
        y, _ = attn(leaf, memory, update=update)
        wanted = [leaf, *attn.parameters()]
        found.append(torch.autograd.grad(y.sin().sum(), wanted, materialize_grads=True))
    for mine, yours in zip(*found, strict=True):
        assert_same_bits(mine, yours)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slots", [torch.int8, torch.bfloat16])
def test_slots_are_rounded_as_they_would_be_written(slots, mode):
    """Where slots are stored in another dtype, what attends to them is what is stored."""
    attn = attention(torch.float32, compressor="mean")
    x = torch.randn(2, 31, 8)
    memory = streamed(attn, x[:, :20], compressed_dtype=slots)
    with MODES[mode]():
        y, after = attn(x[:, 20:], memory, update=False)
        want, _ = attn(x[:, 20:], ctx.rows.clone(memory))
    assert after is memory
    assert_same_bits(y.detach(), want.detach())


def test_nothing_is_copied():
    """The rings are read where they lie: no tensor of their size is made."""
    attn = ctx.CompressiveAttention(8, 2, window=4096, compressed=4096, ratio=2, compressor="mean")
    memory = attn.init_memory(1)
    ring = memory["window_keys"].nbytes
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        attn(torch.randn(1, 1, 8), memory, update=False)
    most = max(event.self_cpu_memory_usage for event in profile.events())
    assert most < ring / 4


def test_compiled():
    attn = attention(compressor="conv")
    x = torch.randn(2, 31, 8, dtype=F64)
    memory = streamed(attn, x[:, :20])
    before = ctx.rows.clone(memory)
    step = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            y, after = step(x[:, 20:], memory, update=False)
            want, _ = attn(x[:, 20:], memory, update=False)
        assert_close(y, want, 1e-12)
        for name, tensor in before.tensors.items():
            assert_same_bits(memory[name], tensor)
            assert_same_bits(after[name], tensor)


@pytest.mark.parametrize("update", [None, 0, 1, "no", torch.tensor(False)])
def test_is_a_bool(update):
    attn = attention()
    with pytest.raises(TypeError, match=r"^ctx.CompressiveAttention: update must be a bool, got "):
        attn(torch.randn(2, 3, 8, dtype=F64), attn.init_memory(2), update=update)
