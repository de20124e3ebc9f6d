"""Memories of layer inputs: what is theirs alone. Parity with the reference, gradients and losses
are in test_attention.py and test_losses.py, which draw both kinds.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ctx
from compiled import Compiled
from ctx.memory_rows import leaves
from strategies import CLOSE, DTYPES, assert_close, assert_same_bits, cases, cuts, schedules

F64 = torch.float64
SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1, "max_rewind": 8}


def attention(embed=8, heads=2, kv_heads=1, dtype=F64, **options):
    torch.manual_seed(2)
    settings = {**SIZES, "memory_content": "hidden", **options}
    attn = ctx.CompressiveAttention(embed, heads, kv_heads, dtype=F64, **settings)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return attn.to(dtype)


def test_what_is_stored():
    """One head of the layer's width, values of none; half of what pairs of all heads take."""
    attn = attention(8, 2, 2, sinks=2)
    memory = attn.init_memory(3)
    assert memory["window_keys"].shape == (3, 1, 4 + 3 + 2 - 1 + 8, 8)
    assert memory["sink_keys"].shape == (3, 1, 2, 8)
    assert all(memory[f"{region}_values"].numel() == 0 for region in ("window", "sink"))
    x = torch.randn(3, 5, 8, dtype=F64)
    with torch.no_grad():
        _, memory = attn(x, memory)
    assert_same_bits(memory["sink_keys"][:, 0], x[:, :2])
    assert_same_bits(memory["window_keys"][:, 0, 2:5], x[:, 2:])
    pairs = attention(8, 2, 2, sinks=2, memory_content="kv").init_memory(3)
    size = lambda held: sum(x.nbytes for x in leaves(held) if x.dim() == 4)  # noqa: E731
    assert 2 * size(memory) == size(pairs)


def test_parameters():
    """No compressor has parameters for values that are not there."""
    names = {
        "conv": {"key_weight": (1, 2, 8, 8)},
        "gated": {"key_gate": (1, 8), "key_position": (1, 2)},
        "mean": {},
        "max": {},
    }
    for name, shapes in names.items():
        compressor = attention(compressor=name).compressor
        assert {key: tuple(p.shape) for key, p in compressor.named_parameters()} == shapes
    biased = ctx.compression.Conv(1, 2, 8, 0, bias=True)
    assert {name for name, _ in biased.named_parameters()} == {"key_weight", "key_bias"}
    keys = torch.randn(2, 1, 3, 2, 8)
    slots, none = biased(keys, keys[..., :0])
    assert_close(slots, keys.mean(3), 1e-6)
    assert none.shape == (2, 1, 3, 0)


@cases(60)
@given(st.data())
def test_a_mean_of_inputs_is_a_mean_of_pairs(data):
    """Projections are affine, so a mean may be taken on either side of them: same numbers, and in
    one call (where nothing is a carried constant) the same gradients.
    """
    options = {
        **data.draw(schedules()),
        "compressor": "mean",
        "distance": data.draw(st.sampled_from(["slot", "token"])),
        "position": data.draw(st.sampled_from(["rotary", None])),
        "compressor_grad": "task",
        "bias": data.draw(st.booleans()),
    }
    hidden = attention(**options)
    pairs = attention(**{**options, "memory_content": "kv"})
    pairs.load_state_dict(hidden.state_dict())
    x = torch.randn(2, data.draw(st.integers(1, 50)), 8, dtype=F64)
    sizes = data.draw(cuts(x.shape[1]))
    ours, theirs = hidden(x)[0], pairs(x)[0]
    assert_close(ours, theirs, 1e-11)
    cotangent = torch.randn_like(ours)
    wanted = [list(one.parameters()) for one in (hidden, pairs)]
    grads = [
        torch.autograd.grad(y, leaves, cotangent, allow_unused=True)
        for y, leaves in zip((ours, theirs), wanted, strict=True)
    ]
    for one, two in zip(*grads, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert_close(one, two, 1e-10)
    held = [one.init_memory(2) for one in (hidden, pairs)]
    with torch.no_grad():
        for piece in x.split(sizes, 1):
            (one, _), (two, _) = (
                attn(piece, memory) for attn, memory in zip((hidden, pairs), held, strict=True)
            )
            assert_close(one, two, 1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(40)
@given(data=st.data())
def test_any_cutting_of_ragged_rows_and_documents(dtype, data):
    """Streams in place, differentiable calls, and every row alone: the same, in every dtype."""
    attn = attention(
        **data.draw(schedules()),
        dtype=dtype,
        compressor=data.draw(st.sampled_from(["conv", "gated", "max"])),
        max_rewind=data.draw(st.sampled_from([1, 3, 64])),
    )
    seed, sizes = data.draw(st.integers(0, 1000)), data.draw(cuts(30))
    torch.manual_seed(seed)
    x = torch.randn(2, 30, 8, dtype=F64).to(dtype)
    resets = torch.rand(2, 30) < data.draw(st.sampled_from([0.0, 0.1]))
    ragged = data.draw(st.booleans())
    ends = list(itertools.accumulate(sizes))
    counts = [torch.randint(0, n + 1, (2,)) if ragged else torch.full((2,), n) for n in sizes]
    memories = [attn.init_memory(2), None]
    parts = [[[], []], [[], []]]
    for size, end, count in zip(sizes, ends, counts, strict=True):
        piece = slice(end - size, end)
        rows = {"lengths": count, "reset_at": resets[:, piece]}
        for way, grad in enumerate((False, True)):
            with torch.set_grad_enabled(grad):
                y, memories[way] = attn(x[:, piece], memories[way], **rows)
            for row, n in enumerate(count.tolist()):
                assert not y[row, n:].any()
                parts[way][row].append(y[row, :n].detach())
    for name, tensor in memories[0].tensors.items():
        assert_close(memories[1][name], tensor, CLOSE[dtype])
    for row in range(2):
        place = [
            torch.arange(end - size, end - size + int(count[row]))
            for size, end, count in zip(sizes, ends, counts, strict=True)
        ]
        kept = torch.cat([torch.empty(0, dtype=torch.int64), *place])
        with torch.no_grad():
            alone, _ = attn(x[row : row + 1, kept], reset_at=resets[row : row + 1, kept])
        for way in range(2):
            got = torch.cat([x.new_empty(0, 8), *parts[way][row]])
            assert_close(got, alone[0], 3 * CLOSE[dtype])


def test_mask_is_lengths():
    attn = attention()
    x = torch.randn(2, 20, 8, dtype=F64)
    mask = torch.arange(20) >= torch.tensor([[5], [0]])
    padded = x.masked_fill(~mask[..., None], float("nan"))
    with torch.no_grad():
        y, memory = attn(padded, mask=mask)
        want, _ = attn(x[:1, 5:])
    assert memory["seen"].tolist() == [15, 20]
    assert_close(y[:1, 5:], want, 1e-12)
    assert not y[:1, :5].any()


def test_projections_learn_through_the_memory():
    """The point of it: what was carried over is constant, the weights that project it are not."""
    x = torch.randn(1, 30, 8, dtype=F64)
    reached = {}
    for content in ("hidden", "kv"):
        attn = attention(memory_content=content, compressor="mean")
        with torch.no_grad():
            _, memory = attn(x[:, :29])
        now = x[:, 29:].clone().requires_grad_()
        attn(now, memory)[0].square().sum().backward()
        weight = attn.v_proj.weight.grad
        reached[content] = torch.linalg.matrix_rank(weight)
        assert now.grad.abs().sum() > 0
    assert reached["kv"] == 1  # of the one new token
    assert reached["hidden"] > 1


def test_weights_that_changed_are_used():
    """A memory holds no trace of the weights it was streamed with."""
    attn, other = attention(), attention()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.compressor.load_state_dict(attn.compressor.state_dict())
    x = torch.randn(2, 33, 8, dtype=F64)
    with torch.no_grad():
        _, memory = attn(x[:, :30])
        got, _ = other(x[:, 30:], memory)
        want, _ = other(x)
    assert_close(got, want[:, 30:], 1e-12)


@pytest.mark.parametrize("how", ["rewind", "reset"])
def test_nothing_that_was_taken_back_is_felt(how):
    """Not even a NaN, by no number and by no gradient."""
    attn = attention(compressor="conv", sinks=0)
    good, bad = torch.randn(1, 13, 8, dtype=F64), torch.full((1, 7, 8), float("nan"), dtype=F64)
    with torch.no_grad():
        _, memory = attn(good)
        _, memory = attn(bad, memory)
        if how == "rewind":
            ctx.rows.rewind(memory, 7)
        else:
            ctx.rows.reset(memory)
            good = good[:, :0]
    more = torch.randn(1, 9, 8, dtype=F64)
    for grad in (True, False):
        for parameter in attn.parameters():
            parameter.grad = None
        held = ctx.rows.clone(memory)
        with torch.set_grad_enabled(grad):
            y, _ = attn(more, held)
            want, _ = attn(torch.cat([good, more], 1))
        assert_close(y, want[:, good.shape[1] :], 1e-12)
        if grad:
            y.square().sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in attn.parameters())


class Attending(nn.Module):
    """Any module: pools a group by a learned direction. Never asks how wide it is."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width, dtype=F64))

    def forward(self, keys, values):
        share = (keys @ self.gate).softmax(-1)[..., None]
        return (share * keys).sum(-2), (share * values).sum(-2)


def test_a_module_of_ones_own():
    """It is the built-in gate by another way; it learns, and streams as it trains."""
    theirs = attention(compressor="gated")
    ours = attention(compressor=Attending(8))
    assert ours.compressor.module.gate.requires_grad
    state = {k: v for k, v in theirs.state_dict().items() if "compressor" not in k}
    ours.load_state_dict(state, strict=False)
    with torch.no_grad():
        theirs.compressor.key_position.zero_()
        theirs.compressor.key_gate.copy_(ours.compressor.module.gate[None])
    x = torch.randn(2, 30, 8, dtype=F64)
    y, _ = ours(x)
    assert_close(y, theirs(x)[0], 1e-12)
    y.square().sum().backward()
    assert ours.compressor.module.gate.grad.abs().sum() > 0
    memory, parts = ours.init_memory(2), []
    with torch.no_grad():
        for piece in x.split([1, 10, 19], 1):
            out, memory = ours(piece, memory)
            parts.append(out)
    assert_close(torch.cat(parts, 1), y.detach(), 1e-12)


@pytest.mark.parametrize("grad, rows", [(True, "uniform"), (True, "reset_at"), (False, "lengths")])
def test_one_graph(grad, rows):
    """torch.compile(fullgraph=True), also over a carried memory."""
    attn = attention(16, 4, 2, aux_loss="reconstruction")
    compiled = Compiled(attn, "aot_eager", dynamic=rows == "uniform")
    options = {
        "uniform": {},
        "lengths": {"lengths": torch.tensor([3, 11])},
        "reset_at": {"reset_at": torch.arange(11) == torch.tensor([[3], [9]])},
    }[rows]
    held = [attn.init_memory(2), attn.init_memory(2)]
    with torch.set_grad_enabled(grad):
        for step in range(4):
            x = torch.randn(2, 11 + step if rows == "uniform" else 11, 16, dtype=F64)
            got, held[0] = compiled.run(x, held[0], **options)
            want, held[1] = attn(x, held[1], **options)
            assert_close(got.detach(), want.detach(), 1e-12)
            assert_same_bits(held[0]["seen"], held[1]["seen"])
    assert compiled.graphs == 1


def model(**options):
    torch.manual_seed(4)
    sizes = {**SIZES, "memory_content": "hidden", **options}
    config = ctx.CompressiveTransformerConfig(
        vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, **sizes
    )
    built = ctx.CompressiveTransformer(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def test_model_generates_as_it_trains():
    built, prompt = model(), torch.randint(0, 40, (2, 70))
    out = built.generate(prompt, 30, temperature=0)
    logits, _ = built(torch.cat([prompt, out], 1))
    assert torch.equal(out, logits[:, 69:-1].argmax(-1))


def test_rows_and_sizes_of_a_model():
    """What is done with whole memories, by what the rows are."""
    built, text = model(), torch.randint(0, 40, (3, 50))
    twin = built.with_memory(compressed=[1, 3])
    with torch.no_grad():
        _, memory = built(text[:, :40])
        smaller = ctx.rows.resized(memory, twin.schedules)
        _, wanted = twin(text[:, :40])
        for name, tensor in wanted[0].tensors.items():
            assert_same_bits(smaller[0][name], tensor)
        picked = ctx.rows.select(memory, [2, 0])
        got, _ = built(text[[2, 0], 40:], picked)
        whole, _ = built(text)
    torch.testing.assert_close(got, whole[[2, 0], 40:])


def test_configuration_round_trip():
    config = model().config
    assert config.to_dict()["memory_content"] == "hidden"
    assert ctx.CompressiveTransformerConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="memory_content must be one of 'kv', 'hidden', got 'x'"):
        model(memory_content="x")


def test_a_memory_of_pairs_is_refused():
    hidden, pairs = attention(), attention(memory_content="kv")
    x = torch.randn(1, 3, 8, dtype=F64)
    with pytest.raises(ValueError, match=r"must be .*content=hidden.*, got .*content=kv"):
        hidden(x, pairs.init_memory(1))
    with pytest.raises(ValueError, match=r"must be .*content=kv.*, got .*content=hidden"):
        pairs(x, hidden.init_memory(1))


def test_other_dtype_of_the_memory():
    """The memory rounds what it keeps, whichever call brought it."""
    attn = attention(dtype=torch.float32)
    x = torch.randn(2, 40, 8)
    whole, parts, memory = attn.init_memory(2, dtype=torch.bfloat16), [], None
    memory = ctx.rows.clone(whole)
    with torch.no_grad():
        want, whole = attn(x, whole)
        for piece in x.split([3, 8, 29], 1):
            y, memory = attn(piece, memory)
            parts.append(y)
    assert want.dtype == torch.float32 and whole["window_keys"].dtype == torch.bfloat16
    assert_close(torch.cat(parts, 1), want, 2e-5)
