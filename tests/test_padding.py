"""Padded and packed batches through the modules: every row, and every document of a row, gives what
it gives alone - values, gradients and memory.
"""

import contextlib
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import ctx
from ctx import reference
from ragged import assert_same_row, marks, resets
from strategies import POOLING, assert_close, assert_same_bits, cases
from test_attention import layers

F64 = torch.float64
MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad}


@st.composite
def placements(draw, batch, most=16):
    """bool [B, T], true at tokens: padding on the left, on the right, anywhere, or nowhere."""
    tokens = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["left", "right", "anywhere", "nowhere"]))
    rows = []
    for _ in range(batch):
        total = draw(st.integers(0, tokens))
        places = {
            "left": range(tokens - total, tokens),
            "right": range(total),
            "nowhere": range(tokens),
        }.get(kind) or draw(st.permutations(range(tokens)))[:total]
        rows.append(marks(1, tokens, [(0, i) for i in places]))
    return torch.cat(rows)


@st.composite
def spelled(draw, mask):
    """The arguments that say where tokens are: a mask, lengths, or nothing."""
    ways = [{"mask": mask}]
    lengths = mask.sum(1)
    if torch.equal(mask, ctx.padding.mask_of(lengths, mask.shape[1])):
        ways.append({"lengths": lengths})
    if mask.all():
        ways.append({})
    return draw(st.sampled_from(ways))


def documents_alone(model, x, mask, reset_at, memory):
    """(row, places, output [n, ...]) of every document by itself, and the rows' last memories."""
    outs, last = [], []
    for b in range(len(mask)):
        places = mask[b].nonzero()[:, 0].tolist()
        edges = [i for i, place in enumerate(places) if reset_at is not None and reset_at[b, place]]
        row = None if memory is None else ctx.rows.select(memory, b)
        for first, end in zip([0, *edges], [*edges, len(places)], strict=True):
            row = row if first == 0 and 0 not in edges else None
            y, row = model(x[b : b + 1, places[first:end]], row)
            outs.append((b, places[first:end], y[0]))
        last.append(row)
    return outs, last


def check(model, law, x, mask, arguments, reset_at, memory, mode, tolerance=1e-11):
    """One call on the batch against one call per document."""
    before = copy.deepcopy(memory)
    with MODES[mode]():
        passed = copy.deepcopy(memory)
        got, after = model(x, passed, reset_at=reset_at, **arguments)
        want, last = documents_alone(model, x, mask, reset_at, memory)
    assert_same_bits(got[~mask], torch.zeros_like(got[~mask]))
    for b, places, y in want:
        assert_close(got[b, places], y, tolerance)
    for b, row in enumerate(last):
        for mine, yours in zip(after, row, strict=True):
            assert_same_row(law, mine, b, yours, 0, tolerance, exact=False)
    if mode == "no_grad":
        assert memory is None or after is passed
        return
    leaves = [] if memory is None else pytree.tree_leaves(before)
    for one, other in zip(leaves, pytree.tree_leaves(passed), strict=False):
        assert_same_bits(other, one)
    cotangent = torch.randn_like(got)
    leaves = [*model.parameters(), *([x] if x.requires_grad else [])]
    mine = torch.autograd.grad(got, leaves, cotangent, allow_unused=True)
    loss = sum((y * cotangent[b, places]).sum() for b, places, y in want)
    yours = torch.autograd.grad(loss, leaves, allow_unused=True)
    for leaf, one, other in zip(leaves, mine, yours, strict=True):
        one = torch.zeros_like(leaf) if one is None else one
        assert_close(one, torch.zeros_like(leaf) if other is None else other, 10 * tolerance)
    if x.requires_grad:
        assert not mine[-1][~mask].any()


def carried(model, past, lengths):
    """A memory whose rows have come differently far; None for an empty one."""
    if not past.shape[1]:
        return None
    with torch.no_grad():
        return model(past, lengths=lengths)[1]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", MODES)
@cases(80)
@given(data=st.data())
def test_attention(mode, packed, data):
    """What stands at padding has no influence: garbage under grad, NaN as well when streaming."""
    layer, batch = data.draw(layers()), data.draw(st.integers(1, 3))
    attn, law = layer.module(), reference.Schedule(**layer.schedule)
    mask = data.draw(placements(batch))
    past = layer.x(batch, data.draw(st.sampled_from([0, 1, 25])))
    far = torch.tensor([data.draw(st.integers(0, past.shape[1])) for _ in range(batch)])
    x = layer.x(batch, mask.shape[1] + 30)[:, 30:].clone()
    x[~mask] = data.draw(st.sampled_from([1e3, float("nan")])) if mode == "no_grad" else 1e3
    x.requires_grad_(mode == "grad")
    reset_at = data.draw(resets(*mask.shape)) if packed else None
    arguments = data.draw(spelled(mask))
    check(attn, law, x, mask, arguments, reset_at, carried(attn, past, far), mode)


SIZES = {"window": 3, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1, "max_rewind": 4}


def transformer(**changed):
    settings = {"vocab_size": 20, "embed_dim": 8, "num_layers": 2, "num_heads": 2, **SIZES}
    config = ctx.CompressiveTransformerConfig(**{**settings, **changed})
    model = ctx.CompressiveTransformer(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def law_of(model):
    return reference.Schedule(*model.schedule.numbers)


@pytest.mark.parametrize("mode", MODES)
@cases(60)
@given(data=st.data())
def test_transformer(mode, data):
    """Padded and packed, through several layers."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    compressor = data.draw(st.sampled_from(["conv", "gated", "max"]))
    model = transformer(compressor=compressor, num_kv_heads=data.draw(st.sampled_from([1, 2])))
    batch = data.draw(st.integers(1, 3))
    mask = data.draw(placements(batch))
    past = torch.randint(20, (batch, data.draw(st.sampled_from([0, 1, 25]))))
    far = torch.tensor([data.draw(st.integers(0, past.shape[1])) for _ in range(batch)])
    x = torch.randint(20, mask.shape)
    reset_at = data.draw(st.none() | resets(*mask.shape))
    arguments = data.draw(spelled(mask))
    memory = carried(model, past, far)
    check(model, law_of(model), x, mask, arguments, reset_at, memory, mode)


@pytest.mark.parametrize("mode", MODES)
@cases(60)
@given(data=st.data())
def test_rewound_memory_goes_on(mode, data):
    """ctx.rows.rewind: what came in between, even NaN, has left nothing behind; in both paths."""
    pooling = layers().filter(lambda layer: layer.options["compressor"] in POOLING)
    layer, batch = data.draw(pooling), data.draw(st.integers(1, 3))
    attn = layer.module()
    past, x = layer.x(batch, data.draw(st.integers(1, 40))), layer.x(batch, 12)
    far = torch.tensor([data.draw(st.integers(0, past.shape[1])) for _ in range(batch)])
    memory = carried(attn, past, far)
    most = min(layer.max_rewind, 12)
    junk = torch.tensor([data.draw(st.integers(0, most)) for _ in range(batch)])
    with torch.no_grad():
        wrong = torch.full_like(x[:, :most], data.draw(st.sampled_from([7.0, float("nan")])))
        _, other = attn(wrong, ctx.rows.clone(memory), lengths=junk)
    ctx.rows.rewind(other, junk)
    with MODES[mode]():
        want, after = attn(x, memory)
        got, rewound = attn(x, other)
    assert_close(got, want, 1e-11)
    law = reference.Schedule(**layer.schedule)
    for b in range(batch):
        assert_same_row(law, rewound, b, after, b, 1e-11, exact=False, rewindable=False)


def test_slots_of_tokens_taken_back_are_not_read():
    """The tightest ring: the newest slot of NaN stands where one that is no longer seen stood."""
    sizes = {"window": 0, "compressed": 2, "ratio": 1, "segment": 1, "max_rewind": 3}
    attn = ctx.CompressiveAttention(4, 1, compressor="mean", dtype=F64, **sizes)
    x = torch.randn(1, 15, 4, dtype=F64)
    memory = carried(attn, x[:, :12], None)
    other = ctx.rows.clone(memory)
    with torch.no_grad():
        attn(torch.full((1, 3, 4), float("nan"), dtype=F64), other)
    ctx.rows.rewind(other, 3)
    assert other["compressed_keys"].isnan().any()
    assert_close(attn(x[:, 12:], other)[0], attn(x[:, 12:], memory)[0], 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_selected_and_merged_model_memories_go_on(mode):
    """Rows of a model's memory, in another order and in company, continue their streams."""
    model = transformer()
    one = carried(model, torch.randint(20, (3, 30)), torch.tensor([30, 4, 17]))
    two = carried(model, torch.randint(20, (2, 11)), torch.tensor([0, 11]))
    x, rows = torch.randint(20, (5, 9)), [4, 1, 1, 3]
    with MODES[mode]():
        want = torch.cat(
            [model(x[:3], ctx.rows.clone(one))[0], model(x[3:], ctx.rows.clone(two))[0]]
        )
        both = ctx.rows.merge([one, two])
        got, after = model(x[rows], ctx.rows.select(both, rows))
        ctx.rows.reset(both, [1, 2])
        again, _ = model(x, both)
        fresh, _ = model(x[1:3])
    assert_close(got, want[rows], 1e-11)
    assert after[0]["seen"].tolist() == [20, 13, 13, 9]
    assert_close(again[1:3], fresh, 1e-11)
    assert_close(again[[0, 3, 4]], want[[0, 3, 4]], 1e-11)
