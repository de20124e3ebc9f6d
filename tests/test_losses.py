"""Auxiliary losses: equal to the reference boundary by boundary, and reach only what they may."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
from ctx import losses, reference
from ctx.reference.attention import inputs_compressor
from strategies import POOLING, assert_close, cases, schedules

F64 = torch.float64
SIZES = {"window": 5, "compressed": 4, "ratio": 3, "segment": 6, "sinks": 1}


def attention(compressor="conv", **options):
    torch.manual_seed(3)
    settings = {**SIZES, "compressor": compressor, "dtype": F64, **options}
    attn = ctx.CompressiveAttention(16, 4, 2, **settings)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return attn


def expected(attn, x, seen, counts):
    """The reference's loss of the tokens seen ... seen + counts[b] - 1 of every row."""
    weights = {k: v.detach() for k, v in attn.named_parameters() if "compressor" not in k}
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2}

    def part(name, inputs):  # [..., n, E]
        made = inputs @ weights[f"{name}.weight"].T
        return made.unflatten(-1, (heads[name], 4)).transpose(-2, -3)

    parts = [part(name, x) for name in heads]
    own = dict(attn.compressor.named_parameters())
    compressor = partial(reference.COMPRESSORS[attn.compressor.name], **own)
    project = None
    if attn.memory_content == "hidden":
        parts[1:] = x[:, None], x[:, None, :, :0]
        compress = inputs_compressor(attn.compressor.name, own)

        def compressor(keys, values):
            slots = torch.stack([compress(group)[:, 0] for group in keys[0, 0][:, None]], 1)
            return slots[:, None], values[..., 0, :]

        compressor.overlap = attn.compressor.overlap

        def project(inputs):
            return part("k_proj", inputs), part("v_proj", inputs)

    law = reference.Schedule(*attn.schedule.numbers)
    errors = []
    for row, count in enumerate(counts):
        tokens = [part[row, :, : seen + count] for part in parts]
        errors += reference.attention_reconstruction(*tokens, law, compressor, seen, project)
    return torch.stack(errors).mean() if errors else torch.zeros((), dtype=F64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("compressor", POOLING)
@cases(20)
@given(data=st.data())
def test_reconstruction_equals_reference(compressor, grad, data):
    """Any phase of the memory, any length, ragged rows; values and gradients."""
    drawn = data.draw(schedules())
    if compressor == "conv":
        drawn["compressor_kernel"] = drawn["ratio"] + data.draw(st.integers(0, 6))
    drawn["memory_content"] = data.draw(st.sampled_from(["kv", "hidden"]))
    attn = attention(compressor, aux_loss="reconstruction", **drawn)
    seen, length = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 20))
    counts = data.draw(st.none() | st.lists(st.integers(0, length), min_size=2, max_size=2))
    lengths = None if counts is None else torch.tensor(counts)
    x = torch.randn(2, seen + length, 16, dtype=F64)
    memory = None
    with torch.no_grad():
        if seen:
            _, memory = attn(x[:, :seen])
    with torch.set_grad_enabled(grad):
        _, after, got = attn(x[:, seen:], memory, lengths=lengths, return_aux=True)
    want = expected(attn, x, seen, counts or [length] * 2)
    assert_close(got.detach(), want.detach(), 1e-11)
    assert after["seen"].tolist() == [seen + count for count in counts or [length] * 2]
    own = list(attn.compressor.parameters())
    if grad and own and want.requires_grad:
        mine = torch.autograd.grad(got, own)
        for one, two in zip(mine, torch.autograd.grad(want, own), strict=True):
            assert_close(one, two, 1e-10)


CONTENTS = pytest.mark.parametrize("content", ["kv", "hidden"])


@CONTENTS
@pytest.mark.parametrize("aux", losses.LOSSES)
@pytest.mark.parametrize("compressor", ["conv", "dilated", "gated"])
def test_aux_reaches_the_compressor_only(compressor, aux, content):
    """Parameter by parameter, with a carried memory, and the input too."""
    attn = attention(compressor, aux_loss=aux, memory_content=content)
    with torch.no_grad():
        _, memory = attn(torch.randn(2, 17, 16, dtype=F64))
    x = torch.randn(2, 30, 16, dtype=F64, requires_grad=True)
    _, _, loss = attn(x, memory, return_aux=True)
    assert loss > 0
    loss.backward()
    assert x.grad is None
    for name, parameter in attn.named_parameters():
        allowed = name.startswith(("compressor.", "decoder."))
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == allowed, name


@CONTENTS
@pytest.mark.parametrize("compressor", ["conv", "gated"])
@pytest.mark.parametrize("mode", ["task", "aux"])
def test_task_reaches_what_the_mode_says(mode, compressor, content):
    """ "task": everything, W_k and W_v through the slots too. "aux": no compressor parameter."""
    attn = attention(
        compressor, compressor_grad=mode, aux_loss="reconstruction", memory_content=content
    )
    x = torch.randn(2, 40, 16, dtype=F64)
    y, _, aux = attn(x, return_aux=True)
    y.square().sum().backward()
    for name, parameter in attn.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (mode == "task" or not name.startswith("compressor.")), name
    before = {
        name: None if p.grad is None else p.grad.clone() for name, p in attn.named_parameters()
    }
    aux.backward()
    for name, parameter in attn.named_parameters():
        if not name.startswith("compressor."):
            assert torch.equal(parameter.grad, before[name]), name
        elif mode == "aux":
            assert before[name] is None and parameter.grad.abs().sum() > 0


def test_keys_and_values_learn_through_slots():
    """In "task" mode the gradient of W_k and W_v has a part that went through the compressor."""
    x = torch.randn(2, 40, 16, dtype=F64)
    found = []
    for mode in ("task", "aux"):
        attn = attention(compressor_grad=mode)
        attn(x)[0].square().sum().backward()
        found.append([attn.k_proj.weight.grad, attn.v_proj.weight.grad])
    for through, without in zip(*found, strict=True):
        assert not torch.allclose(through, without)


def test_a_lossless_compressor_has_no_loss():
    """Groups of one token: the slot is the token, so reconstruction is exact."""
    attn = ctx.CompressiveAttention(
        16, 4, 2, window=3, compressed=4, ratio=1, segment=5, compressor="mean", dtype=F64,
        aux_loss="reconstruction",
    )  # fmt: skip
    _, _, loss = attn(torch.randn(2, 40, 16, dtype=F64), return_aux=True)
    assert loss.abs() < 1e-25
    other = attention("mean", aux_loss="reconstruction")
    assert other(torch.randn(2, 40, 16, dtype=F64), return_aux=True)[2] > 1e-4


def test_autoencoding_of_the_mean_is_the_variance():
    """A decoder that repeats the slot leaves what a mean forgets: the spread inside groups."""
    attn = ctx.CompressiveAttention(
        16, 4, 4, window=0, compressed=4, ratio=4, segment=4, compressor="mean", dtype=F64,
        aux_loss="autoencoding",
    )  # fmt: skip
    x = torch.randn(1, 8, 16, dtype=F64)
    _, _, loss = attn(x, return_aux=True)
    parts = []
    for projection in (attn.k_proj, attn.v_proj):
        groups = projection(x).view(1, 2, 4, 16)
        parts.append((groups - groups.mean(2, keepdim=True)).square().mean())
    assert_close(loss.detach(), sum(parts).detach(), 1e-12)


@pytest.mark.parametrize("compressor, kernel", [("conv", 7), ("dilated", None)])
def test_autoencoding_rebuilds_the_group_only(compressor, kernel):
    """What a slot was made of left of its group is not asked for."""
    options = {"window": 0, "compressed": 4, "ratio": 4, "segment": 4, "sinks": 0, "dtype": F64}
    attn = ctx.CompressiveAttention(
        16, 4, 4, compressor=compressor, compressor_kernel=kernel, aux_loss="autoencoding",
        **options,
    )  # fmt: skip
    x = torch.randn(1, 8, 16, dtype=F64)
    loss = attn(x, return_aux=True)[2]
    parts = []
    for projection in (attn.k_proj, attn.v_proj):
        groups = projection(x).view(1, 2, 4, 16)
        parts.append((groups - groups.mean(2, keepdim=True)).square().mean())
    assert_close(loss.detach(), sum(parts).detach(), 1e-12)  # it starts as a mean


def test_autoencoding_of_inputs():
    """Where inputs are remembered it is they that are rebuilt."""
    attn = ctx.CompressiveAttention(
        16, 4, 4, window=0, compressed=4, ratio=4, segment=4, compressor="mean", dtype=F64,
        aux_loss="autoencoding", memory_content="hidden",
    )  # fmt: skip
    x = torch.randn(1, 8, 16, dtype=F64)
    groups = x.view(1, 2, 4, 16)
    want = (groups - groups.mean(2, keepdim=True)).square().mean()
    assert_close(attn(x, return_aux=True)[2].detach(), want, 1e-12)


@CONTENTS
def test_training_on_it_lowers_it(content):
    attn = attention(compressor_grad="aux", aux_loss="reconstruction", memory_content=content)
    x = torch.randn(4, 60, 16, dtype=F64)
    optimizer = torch.optim.Adam(attn.compressor.parameters(), lr=1e-2)
    history = []
    for _ in range(60):
        loss = attn(x, return_aux=True)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize(
    "aux, content", [*((name, "kv") for name in losses.LOSSES), ("reconstruction", "hidden")]
)
def test_whole_model(aux, content):
    """The mean over layers; it compiles into the same graph."""
    config = ctx.CompressiveTransformerConfig(
        vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, aux_loss=aux,
        memory_content=content, **SIZES,
    )  # fmt: skip
    model = ctx.CompressiveTransformer(config)
    tokens = torch.randint(0, 50, (2, 40))
    logits, memory, loss = model(tokens, return_aux=True)
    assert loss.dim() == 0 and loss > 0 and len(memory) == 2
    assert torch.equal(logits, model(tokens)[0])
    dynamic = (aux, content) == ("reconstruction", "kv")
    run = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    assert_close(run(tokens, return_aux=True)[2].detach(), loss.detach(), 1e-6)


def test_errors():
    attn, x = attention(), torch.randn(2, 5, 16, dtype=F64)
    with pytest.raises(
        ValueError, match=r"return_aux must go with an aux_loss .* got aux_loss=None"
    ):
        attn(x, return_aux=True)
    attn, reset_at = attention(aux_loss="reconstruction"), torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"return_aux must .* got reset_at"):
        attn(x, reset_at=reset_at, return_aux=True)
    with pytest.raises(ValueError, match="aux_loss must be one of"):
        attention(aux_loss="magic")
