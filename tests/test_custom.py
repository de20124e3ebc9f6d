"""Compressors that users bring: training and streams treat them like the built-in ones."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ctx
from ctx import compression
from strategies import assert_close, assert_same_bits, cases, cuts

F64 = torch.float64


class First(compression.Compressor):
    """Keeps the first token of a group, scaled."""

    name = "first"

    def parameter_shapes(self):
        return {"scale": (self.kv_heads,)}

    def reset_parameters(self):
        with torch.no_grad():
            self.scale.fill_(1.0)

    def forward(self, keys, values):
        scale = self.scale[:, None, None]
        return scale * keys[..., 0, :], scale * values[..., 0, :]


class Twin(nn.Module):
    """The gated pooling of ctx.compression, by another way: any module will do."""

    def __init__(self, gated):
        super().__init__()
        self.gated = gated

    def forward(self, keys, values):
        def share(gate, position):
            content = (keys * gate[:, None, None]).sum(-1) + position[:, None]
            return content.softmax(-1)[..., None]

        parts = self.gated
        key_share = share(parts.key_gate, parts.key_position)
        value_share = share(parts.value_gate, parts.value_position)
        return (key_share * keys).sum(-2), (value_share * values).sum(-2)


def gated(*sizes):
    module = compression.Gated(*sizes, dtype=F64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def drawn(heads, tokens, dtype=F64):
    return [torch.randn(2, h, tokens, 4, dtype=dtype) for h in (2 * heads, heads, heads)]


@cases(60)
@given(st.data())
def test_a_module_equals_the_built_in_it_copies(data):
    """Streams: every cutting, ragged rows and documents, beside the engine's own compressor."""
    heads, ratio = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    schedule = ctx.Schedule(
        data.draw(st.integers(0, 8)),
        data.draw(st.integers(0, 5)),
        ratio,
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(0, 3)),
    )
    options = {
        "distance": data.draw(st.sampled_from(["slot", "token"])),
        "max_rewind": data.draw(st.sampled_from([1, 3, 64])),
        "dtype": F64,
    }
    module = gated(heads, ratio, 4)
    ours = ctx.KVMemory(schedule, 2, heads, 4, compressor=Twin(module), **options)
    theirs = ctx.KVMemory(schedule, 2, heads, 4, compressor=module, **options)
    length = data.draw(st.integers(1, 60))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    tensors = drawn(heads, length)
    resets = torch.rand(2, length) < data.draw(st.sampled_from([0.0, 0.1]))
    ragged = data.draw(st.booleans())
    begin = 0
    for size in data.draw(cuts(length)):
        piece = [x[:, :, begin : begin + size] for x in tensors]
        rows = {}
        if ragged:
            rows["lengths"] = torch.randint(0, size + 1, (2,))
        if resets.any():
            rows["reset_at"] = resets[:, begin : begin + size]
        assert_close(ours.step(*piece, **rows), theirs.step(*piece, **rows), 1e-11)
        assert_same_bits(ours.seen, theirs.seen)
        begin += size


class Longer(nn.Module):
    """The convolution of ctx.compression with a kernel above the ratio, by another way."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.overlap = conv.overlap

    def forward(self, keys, values):
        weights = self.conv.key_weight, self.conv.value_weight
        return tuple(
            torch.einsum("bhgkd,hkde->bhge", x, weight)
            for x, weight in zip((keys, values), weights, strict=True)
        )


@cases(60)
@given(st.data())
def test_a_module_reads_left_of_its_groups(data):
    """An `overlap` of one's own: streams and gradients are those of the engine's convolution."""
    ratio, longer = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    options = {
        "window": data.draw(st.integers(0, 8)),
        "compressed": data.draw(st.integers(0, 5)),
        "ratio": ratio,
        "segment": data.draw(st.integers(1, 9)),
        "sinks": data.draw(st.integers(0, 3)),
        "distance": data.draw(st.sampled_from(["slot", "token"])),
        "max_rewind": data.draw(st.sampled_from([1, 3, 64])),
        "dtype": F64,
    }
    module = compression.Conv(2, ratio, 4, kernel=ratio + longer, dtype=F64)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    theirs = ctx.CompressiveAttention(16, 4, 2, compressor=module, **options)
    ours = ctx.CompressiveAttention(16, 4, 2, compressor=Longer(module), **options)
    weights = {k: v for k, v in theirs.state_dict().items() if "compressor" not in k}
    ours.load_state_dict(weights, strict=False)
    length, mine, yours = data.draw(st.integers(1, 40)), None, None
    x = torch.randn(2, length, 16, dtype=F64)
    resets = torch.rand(2, length) < data.draw(st.sampled_from([0.0, 0.1]))
    begin = 0
    for size in data.draw(cuts(length)):
        piece = slice(begin, begin + size)
        rows = {"reset_at": resets[:, piece]} if resets.any() else {}
        with torch.set_grad_enabled(data.draw(st.booleans())):
            y, mine = ours(x[:, piece], mine, **rows)
            expected, yours = theirs(x[:, piece], yours, **rows)
        assert_close(y, expected, 1e-10)
        begin += size
    for name in ctx.state.STATE:
        assert_close(mine[name], yours[name], 1e-10)


@pytest.mark.parametrize("overlap, kind", [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_overlap(overlap, kind):
    module = nn.Identity()
    module.overlap = overlap
    with pytest.raises(kind, match=r"ctx.compression.Custom: overlap must be"):
        ctx.KVMemory(ctx.Schedule(4, 2, 2), 1, 1, 4, compressor=module)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["uniform", "lengths", "reset_at"])
def test_attention(grad, how):
    """Both paths of the module, and gradients of the user's parameters."""
    options = {"window": 5, "compressed": 4, "ratio": 3, "segment": 4, "sinks": 1, "dtype": F64}
    module = gated(2, 3, 4)
    theirs = ctx.CompressiveAttention(16, 4, 2, compressor=module, **options)
    ours = ctx.CompressiveAttention(16, 4, 2, compressor=Twin(module), **options)
    weights = {k: v for k, v in theirs.state_dict().items() if "compressor" not in k}
    ours.load_state_dict(weights, strict=False)
    rows = {
        "uniform": {},
        "lengths": {"lengths": torch.tensor([17, 30])},
        "reset_at": {"reset_at": torch.arange(30) == torch.tensor([[3], [25]])},
    }[how]
    mine = yours = None
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            x = torch.randn(2, 30, 16, dtype=F64)
            y, mine = ours(x, mine, **rows)
            expected, yours = theirs(x, yours, **rows)
            assert_close(y, expected, 1e-11)
    if grad:
        leaves = list(module.parameters())
        pairs = [torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected)]
        for one, two in zip(*pairs, strict=True):
            assert one.abs().sum() > 0
            assert_close(one, two, 1e-9)


@pytest.fixture
def registered():
    compression.register(First)
    yield First
    del compression.COMPRESSORS["first"]


def test_registered_by_name(registered):
    """A class of one's own in a whole model, by its name, as a configuration can hold it."""
    sizes = {"window": 8, "compressed": 6, "ratio": 4, "segment": 8}
    config = ctx.CompressiveTransformerConfig(
        vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, compressor="first", **sizes
    )
    model = ctx.CompressiveTransformer(config)
    tokens = torch.randint(0, 50, (2, 70))
    parallel, _ = model(tokens)
    memory, parts = model.init_memory(2), []
    with torch.no_grad():
        for chunk in tokens.split([1, 30, 39], 1):
            logits, memory = model(chunk, memory)
            parts.append(logits)
    assert_close(torch.cat(parts, 1), parallel, 1e-5)
    parallel.square().mean().backward()
    assert model.blocks[0].attention.compressor.scale.grad.abs().sum() > 0


def test_registered_again(registered):
    """A notebook's cell that runs again makes the class anew: the later one takes its place."""
    again = type("First", (First,), {"__module__": First.__module__, "__qualname__": "First"})
    assert again is not First and compression.register(again) is again
    assert compression.COMPRESSORS["first"] is again
    sizes = {"window": 4, "compressed": 3, "ratio": 2}
    assert type(ctx.CompressiveAttention(8, 2, compressor="first", **sizes).compressor) is again
    for other in ({"__qualname__": "Second"}, {"__module__": "elsewhere"}):
        names = {"__module__": First.__module__, "__qualname__": "First", **other}
        with pytest.raises(ValueError, match="name must be a new one, got 'first'"):
            compression.register(type("First", (First,), names))
    assert compression.COMPRESSORS["first"] is again


class TestErrors:
    def test_a_taken_name(self):
        class Mean(compression.Compressor):
            name = "mean"

        with pytest.raises(ValueError, match="name must be a new one, got 'mean'"):
            compression.register(Mean)
        with pytest.raises(TypeError, match="kind must be a Compressor class"):
            compression.register(nn.Linear)

    @pytest.mark.parametrize(
        "made, error, message",
        [
            (lambda k, v: (k[..., 0, :], v[..., 0, :-1]), ValueError, "value slots must be"),
            (lambda k, v: (k, v), ValueError, "key slots must be"),
            (lambda k, v: k[..., 0, :], TypeError, "forward must return"),
        ],
    )
    def test_wrong_slots(self, made, error, message):
        """Found before anything is written."""

        class Wrong(nn.Module):
            def forward(self, keys, values):
                return made(keys, values)

        memory = ctx.KVMemory(ctx.Schedule(4, 3, 2), 2, 1, 4, compressor=Wrong(), dtype=F64)
        before = {name: tensor.clone() for name, tensor in memory.tensors.items()}
        with pytest.raises(error, match=message):
            memory.step(*drawn(1, 20))
        for name, tensor in memory.tensors.items():
            assert_same_bits(tensor, before[name])

    def test_its_own_error_comes_through(self):
        class Broken(nn.Module):
            def forward(self, keys, values):
                raise KeyError("mine")

        memory = ctx.KVMemory(ctx.Schedule(4, 3, 2), 2, 1, 4, compressor=Broken(), dtype=F64)
        with pytest.raises(KeyError, match="mine"):
            memory.step(*drawn(1, 20))
        assert memory.seen.tolist() == [0, 0]

    def test_not_a_module(self):
        with pytest.raises(TypeError, match="compressor must be a name or a module"):
            ctx.KVMemory(ctx.Schedule(4, 3, 2), 1, 1, 4, compressor=len)
        with pytest.raises(TypeError, match="compressor must be a name or a module"):
            ctx.CompressiveAttention(8, 2, window=4, compressed=3, ratio=2, compressor=3)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()]
)
def test_copies_continue(copied):
    """A deep copy or an unpickled memory has a compressor of its own; a clone shares it."""
    memory = ctx.KVMemory(ctx.Schedule(4, 3, 2), 2, 1, 4, compressor=First(1, 2, 4), dtype=F64)
    memory.step(*drawn(1, 11))
    other = copied(memory)
    following = drawn(1, 20)
    assert_same_bits(other.step(*following), memory.step(*following))
    with torch.no_grad():
        memory.compressor.scale.fill_(5.0)
    shared = other.compressor is memory.compressor
    same = torch.equal(other.step(*following), memory.step(*following))
    assert same == shared
    buffer = io.BytesIO()
    torch.save(memory.state_dict(), buffer)
    buffer.seek(0)
    held = torch.load(buffer, weights_only=True)
    assert held["compressor"] == "custom"
