"""NumPy's integers and floats are taken wherever ints and floats are, as plain numbers."""

import pytest
import torch

import ctx
from strategies import assert_same_bits

np = pytest.importorskip("numpy")

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1}
I64, F32 = np.int64, np.float32
NUMPY = {name: I64(size) for name, size in SIZES.items()}


def same(one, other):
    for name, tensor in one.items():
        assert_same_bits(tensor, other[name])


@pytest.mark.parametrize("position", ["rotary", "relative", "alibi"])
@pytest.mark.parametrize("content", ["kv", "hidden"])
def test_a_layer(position, content):
    """Built, compiled, and its memory made; both paths."""
    plain = {"position": position, "memory_content": content, "compressor_kernel": 5}
    ours, theirs = (
        ctx.CompressiveAttention(
            i(8), i(4), i(2), **sizes, **plain, **rotary, relative_dim=i(6), max_rewind=i(5),
            dropout=f(0.0), rotary_base=f(100.0), compressor="conv", aux_loss="autoencoding",
        )
        for i, f, sizes, rotary in (
            (I64, F32, NUMPY, {"rotary_dim": I64(2)} if position == "rotary" else {}),
            (int, float, SIZES, {"rotary_dim": 2} if position == "rotary" else {}),
        )
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    for value in vars(ours).values():
        assert not isinstance(value, np.generic)
    x = torch.randn(2, 19, 8)
    memories = ours.init_memory(I64(2)), theirs.init_memory(2)
    assert memories[0].spec == memories[1].spec
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same_bits(ours(x, memories[0])[0], theirs(x, memories[1])[0])
    torch.compile(ours, fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize("name", list(ctx.compression.COMPRESSORS))
def test_compressors_and_positions(name):
    made = ctx.compression.make_compressor(
        name, I64(2), I64(2), I64(4), I64(3), kernel=I64(5) if name == "conv" else None
    )
    want = ctx.compression.make_compressor(name, 2, 2, 4, 3, kernel=5 if name == "conv" else None)
    same(made.state_dict(), want.state_dict())
    assert type(made.overlap) is int and not any(
        isinstance(value, np.generic) for value in vars(made).values()
    )
    relative = ctx.positions.Relative(I64(2), I64(4), I64(6))
    assert type(relative.width) is int and relative.key_bias.shape == (2, 4)
    assert_same_bits(ctx.positions.alibi_slopes(I64(6)), ctx.positions.alibi_slopes(6))


def test_a_memory_and_its_rows():
    schedule = ctx.Schedule(**NUMPY)
    assert schedule == ctx.Schedule(**SIZES) and type(schedule.window) is int
    made = {
        "position": "alibi",
        "alibi_slopes": np.array([0.5, 0.25], dtype=F32),
        "compressed_bias": [F32(0.5), F32(0.25)],
    }
    used = ctx.KVMemory(
        schedule, I64(3), I64(1), I64(4), I64(3), **made, scale=F32(0.5), max_rewind=I64(8)
    )
    plain = {**made, "alibi_slopes": [0.5, 0.25], "compressed_bias": [0.5, 0.25], "scale": 0.5}
    want = ctx.KVMemory(ctx.Schedule(**SIZES), 3, 1, 4, 3, **plain, max_rewind=8)
    q, k, v = (torch.randn(3, heads, 11, width) for heads, width in ((2, 4), (1, 4), (1, 3)))
    assert_same_bits(used.step(q, k, v), want.step(q, k, v))
    used.rewind(I64(2)), want.rewind(2)
    used.reset(I64(1)), want.reset(1)
    used, want = used.select(np.array([0, 2])), want.select([0, 2])
    same(used.resized(compressed=I64(2)).tensors, want.resized(compressed=2).tensors)
    state = {
        name: I64(x) if type(x) is int else F32(x) if type(x) is float else x
        for name, x in want.state_dict().items()
    }
    used.load_state_dict(state)
    same(used.tensors, want.tensors)
    rows = ctx.rows.select(used.memory, [I64(1), I64(0)])
    ctx.rows.rewind(rows, I64(1))
    ctx.rows.reset(rows, np.array([True, False]))
    assert rows["seen"].tolist() == [0, 8]
