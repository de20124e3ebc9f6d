"""ctx.CompressiveAttention: parallel = streaming = reference, in values and in gradients."""

import copy
import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import ctx
from ctx import reference
from strategies import (
    COMPRESSORS,
    POOLING,
    assert_close,
    assert_same_bits,
    cases,
    cuts,
    schedules,
)

F64 = torch.float64
MEMORY = [
    "window_keys",
    "window_values",
    "compressed_keys",
    "compressed_values",
    "sink_keys",
    "sink_values",
    "attention_received",
    "slot_positions",
    "slot_mass",
    "seen",
    "rewindable",
]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Arguments of a CompressiveAttention, and the reference of the same layer."""

    schedule: dict[str, Any]
    heads: int
    kv_heads: int
    head_dim: int
    max_rewind: int
    bias: bool
    seed: int
    options: dict[str, Any]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # those without an option

    @property
    def embed_dim(self):
        return self.heads * self.head_dim

    def module(self, dtype=F64, **changes):
        """The module with random parameters everywhere, those that start as zeros too."""
        torch.manual_seed(self.seed)
        options = {**self.options, "max_rewind": self.max_rewind, **changes}
        sizes = {"embed_dim": self.embed_dim, "num_heads": self.heads}
        sizes["num_kv_heads"] = self.kv_heads
        first = ()
        if self.settings:
            fields = {field.name for field in dataclasses.fields(ctx.AttentionSettings)}
            named = {name: options.pop(name) for name in [*options] if name in fields}
            schedule = ctx.Schedule(**self.schedule)
            first = (ctx.AttentionSettings(schedule=schedule, **named, **self.settings),)
        else:
            options |= self.schedule
        attn = ctx.CompressiveAttention(*first, **sizes, bias=self.bias, dtype=F64, **options)
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return attn.to(dtype)

    def expected(self, attn, x, new=None, return_region_weights=False):
        """What the reference gives for the module's parameters."""
        own = ("compressed_bias", "compressor_kernel")
        options = {k: v for k, v in self.options.items() if k not in own}
        weights = {**dict(attn.named_parameters()), "alibi_slopes": attn.alibi_slopes}
        options.pop("relative_dim", None)
        kind = self.options["compressed_bias"]
        if kind != "learned":
            amount = 0.0 if kind == "none" else math.log(attn.schedule.ratio)
            weights["compressed_bias"] = torch.full((self.heads,), amount, dtype=x.dtype)
        return reference.compressive_attention(
            x,
            weights,
            reference.Schedule(**self.schedule),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            new=new,
            return_region_weights=return_region_weights,
            **options,
            **self.settings,
        )

    def x(self, batch, length, dtype=F64):
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = batch, length, self.embed_dim
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


@st.composite
def layers(draw, **options):
    head_dim = draw(st.sampled_from([2, 4, 6]))
    kv_heads = draw(st.integers(1, 2))
    drawn = {
        "compressor": (name := draw(st.sampled_from(COMPRESSORS))),
        "memory_content": draw(
            st.sampled_from(["kv", "kv", "hidden" if name in POOLING else "kv"])
        ),
        "position": draw(st.sampled_from(["rotary", "rotary", "relative", "alibi", None])),
        "relative_dim": draw(st.sampled_from([2, 4, 6])),
        "rotary_dim": draw(st.sampled_from([None, 2])),
        "rotary_interleaved": draw(st.booleans()),
        "distance": draw(st.sampled_from(["slot", "token"])),
        "compressed_bias": draw(st.sampled_from(["none", "log_ratio", "learned"])),
        "compressor_grad": draw(st.sampled_from(["task", "task", "aux"])),
        **options,
    }
    schedule = draw(schedules())
    if drawn["compressor"] == "conv":
        longer = draw(st.sampled_from([None, 0, 1, 4]))
        drawn["compressor_kernel"] = None if longer is None else schedule["ratio"] + longer
    settings = {}
    if draw(st.booleans()):
        settings["logit_softcap"] = draw(st.sampled_from([None, 2.0]))
        settings["slot_mass"] = drawn["compressed_bias"] != "log_ratio" and draw(st.booleans())
        if drawn["position"] == "rotary":
            settings["attention_factor"] = draw(st.sampled_from([1.0, 1.25]))
            width = drawn["rotary_dim"] or head_dim
            given = tuple(0.7**i for i in range(width // 2))
            settings["inv_freq"] = draw(st.sampled_from([None, given]))
    return Layer(
        settings=settings,
        schedule=schedule,
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_rewind=draw(st.sampled_from([1, 3, 64])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        options=drawn,
    )


def chunks(x, sizes):
    return x.split(sizes, 1)


def run(attn, x, sizes, memory=None):
    """All outputs of the calls, and the last memory."""
    outs = [x[:, :0]]
    for piece in chunks(x, sizes):
        y, memory = attn(piece, memory)
        outs.append(y)
    return torch.cat(outs, 1), memory


def snapshot(memory):
    return memory.clone()


def assert_memory_close(got, want, tolerance):
    """The same stream gives the same rings; what was never written is zero in both."""
    assert got.spec == want.spec and list(got.tensors) == list(want.tensors) == MEMORY
    assert_same_bits(got["seen"], want["seen"])
    for name in (name for name in MEMORY if name != "rewindable"):
        assert_close(got[name], want[name], tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-11), (torch.float32, 2e-5)], ids=str)
@cases(120)
@given(data=st.data())
def test_parallel_is_streaming_is_reference(dtype, tolerance, data):
    """One differentiable call, differentiable calls, in-place calls, and the reference."""
    layer = data.draw(layers())
    attn = layer.module(dtype)
    length = data.draw(st.integers(1, 40))
    x = layer.x(data.draw(st.integers(1, 2)), length, dtype)
    want = layer.expected(attn, x)
    parallel, after_one = run(attn, x, [length])
    assert_close(parallel, want, tolerance)
    pieces, after_pieces = run(attn, x, data.draw(cuts(length)))
    assert_close(pieces, want, tolerance)
    with torch.no_grad():
        streamed, after_stream = run(attn, x, data.draw(cuts(length)), attn.init_memory(len(x)))
    assert_close(streamed, want, tolerance)
    for memory in (after_pieces, after_stream):
        assert_memory_close(memory, after_one, tolerance)


@cases(80)
@given(st.data())
def test_gradients_equal_reference(data):
    """Of the inputs and of every parameter, for the last of two calls: what was carried over is
    constant, slots made in the last call of older tokens train the compressor and nothing else.
    """
    layer = data.draw(layers())
    attn = layer.module()
    old, new = data.draw(st.integers(0, 15)), data.draw(st.integers(1, 20))
    x = layer.x(2, old + new).requires_grad_()
    _, memory = run(attn, x[:, :old], [old] if old else [])
    y, _ = attn(x[:, old:], memory)
    want = layer.expected(attn, x, new=new)
    assert_close(y, want, 1e-11)
    cotangent = torch.randn_like(y)
    names, parameters = zip(*attn.named_parameters(), strict=True)
    wanted = [x, *parameters]
    ours = torch.autograd.grad(y, wanted, cotangent, allow_unused=True)
    theirs = torch.autograd.grad(want, wanted, cotangent, allow_unused=True)
    for name, leaf, mine, yours in zip(["x", *names], wanted, ours, theirs, strict=True):
        mine = torch.zeros_like(leaf) if mine is None else mine
        yours = torch.zeros_like(leaf) if yours is None else yours
        try:
            assert_close(mine, yours, 1e-10)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
    assert ours[0][:, :old].abs().sum() == 0


@pytest.mark.parametrize(
    "compressor, kernel, content",
    [
        *((name, None, "kv") for name in COMPRESSORS),
        *((name, None, "hidden") for name in POOLING),
        ("conv", 5, "kv"),
        ("conv", 5, "hidden"),
    ],
)
@pytest.mark.parametrize(
    "position, distance", [("rotary", "slot"), ("rotary", "token"), (None, "slot")]
)
def test_gradcheck(compressor, kernel, position, distance, content):
    """Inputs, projections, compressor parameters and bias, with and without a carried memory."""
    attn = ctx.CompressiveAttention(
        4,
        2,
        1,
        window=2,
        compressed=2,
        ratio=2,
        segment=3,
        sinks=1,
        compressor=compressor,
        compressor_kernel=kernel,
        memory_content=content,
        position=position,
        distance=distance,
        dtype=F64,
    )
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        _, carried = attn(torch.randn(1, 5, 4, dtype=F64))
    names, parameters = zip(*attn.named_parameters(), strict=True)
    assert "compressed_bias" in names

    def from_memory(x, memory, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attn, named, (x, memory))[0]

    for length, memory in ((12, None), (7, carried)):
        x = torch.randn(1, length, 4, dtype=F64, requires_grad=True)
        inputs = x, memory, *parameters
        assert torch.autograd.gradcheck(from_memory, inputs, fast_mode=True)


def make(**options):
    options = {"window": 4, "compressed": 3, "ratio": 2, "segment": 4, "max_rewind": 8, **options}
    return ctx.CompressiveAttention(8, 2, 1, **options)


def test_parameters():
    """Names, shapes and first values: what a checkpoint depends on."""
    attn = make(compressor="conv", bias=True)
    shapes = {name: tuple(x.shape) for name, x in attn.state_dict().items()}
    assert shapes == {
        "q_proj.weight": (8, 8),
        "q_proj.bias": (8,),
        "k_proj.weight": (4, 8),
        "k_proj.bias": (4,),
        "v_proj.weight": (4, 8),
        "v_proj.bias": (4,),
        "out_proj.weight": (8, 8),
        "out_proj.bias": (8,),
        "compressor.key_weight": (1, 2, 4, 4),
        "compressor.value_weight": (1, 2, 4, 4),
        "compressed_bias": (2,),
    }
    assert_close(attn.compressed_bias.detach(), torch.full((2,), 2.0).log(), 1e-7)
    for kind in ("none", "log_ratio"):
        assert "compressed_bias" not in make(compressed_bias=kind).state_dict()


def test_defaults_are_the_contract():
    attn = ctx.CompressiveAttention(8, 2, window=4, compressed=3, ratio=2)
    assert isinstance(attn.compressor, ctx.compression.Conv)
    assert attn.schedule == ctx.Schedule(4, 3, 2, 2, 0)
    assert attn.q_proj.bias is None and attn.k_proj.weight.shape == (8, 8)
    assert isinstance(attn.compressed_bias, torch.nn.Parameter)


def test_passed_memory_is_left_alone_under_grad():
    attn = make()
    _, memory = attn(torch.randn(2, 11, 8))
    before = snapshot(memory)
    _, after = attn(torch.randn(2, 9, 8), memory)
    for name in MEMORY:
        assert_same_bits(memory[name], before[name])
        assert after[name].data_ptr() != memory[name].data_ptr() or not memory[name].numel()
        assert not after[name].requires_grad
    assert memory["seen"].tolist() == [11, 11] and after["seen"].tolist() == [20, 20]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_memory_is_updated_in_place_without_grad(mode):
    attn = make()
    with mode():
        memory = attn.init_memory(2)
        places = {name: tensor.data_ptr() for name, tensor in memory.tensors.items()}
        _, after = attn(torch.randn(2, 11, 8), memory)
        assert {name: tensor.data_ptr() for name, tensor in after.tensors.items()} == places
        assert memory["seen"].tolist() == [11, 11] == after["seen"].tolist()


def test_init_memory():
    attn = make(sinks=2)
    memory = attn.init_memory(3)
    assert list(memory.tensors) == MEMORY
    assert memory.spec == attn.spec and memory.spec.layers[0].key.startswith(
        "window=4 compressed=3 ratio="
    )
    assert memory.layers == 1 and memory.batch_size == 3
    assert memory.nbytes == sum(x.nbytes for x in memory.tensors.values())
    assert memory["seen"].tolist() == [0, 0, 0] and memory["seen"].dtype == torch.int64
    assert memory["window_keys"].shape == (3, 1, 4 + 4 + 2 - 1 + 8, 4)
    assert memory["compressed_keys"].shape == (3, 1, 3 + 4, 4)
    assert memory["sink_values"].shape == (3, 1, 2, 4)
    assert attn.init_memory(1, dtype=torch.bfloat16)["window_values"].dtype == torch.bfloat16
    x = torch.randn(3, 9, 8)
    assert torch.equal(attn(x, memory)[0], attn(x)[0])


def test_carried_memory_is_constant():
    """No gradient reaches an earlier call, and its graph may be freed."""
    attn = make()
    first = torch.randn(1, 10, 8, requires_grad=True)
    y, memory = attn(first)
    y.sum().backward()
    first.grad = None
    second = torch.randn(1, 10, 8, requires_grad=True)
    attn(second, memory)[0].sum().backward()
    assert first.grad is None
    assert (second.grad.abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_over_a_memory_that_streaming_filled(mode):
    """It does not matter to a gradient how the memory was filled."""
    attn, tokens = make(), torch.randn(2, 30, 8)
    _, memory = attn(tokens[:, :20])
    attn(tokens[:, 20:], memory)[0].sum().backward()
    want = [p.grad.clone() for p in attn.parameters()]
    attn.zero_grad()
    with mode():
        _, memory = attn(tokens[:, :20], attn.init_memory(2))
    attn(tokens[:, 20:], memory)[0].sum().backward()
    for parameter, gradient in zip(attn.parameters(), want, strict=True):
        assert_close(parameter.grad, gradient, 1e-5)


def test_a_memory_changed_before_backward_is_noticed():
    """Rings are read where they lie, not copied: the gradients would be those of another memory."""
    attn = make()
    _, memory = attn(torch.randn(1, 20, 8))
    y, _ = attn(torch.randn(1, 10, 8), memory)
    with torch.no_grad():
        attn(torch.randn(1, 10, 8), memory)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("compressor", ["conv", "gated"])
def test_aux_gives_the_compressor_no_gradient(compressor):
    """The task treats slots as constants: same output, other gradients."""
    x = torch.randn(1, 30, 8, requires_grad=True)
    task = make(compressor=compressor, window=0)
    aux = make(compressor=compressor, window=0, compressor_grad="aux")
    aux.load_state_dict(task.state_dict())
    out, same = task(x)[0], aux(x)[0]
    assert_same_bits(out.detach(), same.detach())
    out.square().sum().backward()
    full = x.grad.clone()
    x.grad = None
    same.square().sum().backward()
    for name, parameter in task.compressor.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    for name, parameter in aux.compressor.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().sum() == 0, name
    assert aux.compressed_bias.grad.abs().sum() > 0
    assert not torch.allclose(aux.k_proj.weight.grad, task.k_proj.weight.grad)
    assert not torch.allclose(x.grad, full)


def test_task_trains_the_compressor():
    """A few steps of a task that can only be solved through the slots lower its loss."""
    attn = make(window=0, segment=2)
    x, target = torch.randn(2, 40, 8), torch.randn(2, 40, 8)
    for parameter in attn.parameters():
        parameter.requires_grad_(False)
    optimiser = torch.optim.Adam(attn.compressor.requires_grad_(True).parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = (attn(x)[0] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3


def test_dropout_only_in_training():
    attn = make(dropout=0.5)
    x = torch.randn(1, 20, 8)
    assert not torch.equal(attn(x)[0], attn(x)[0])
    attn.eval()
    plain = make()
    plain.load_state_dict(attn.state_dict())
    assert torch.equal(attn(x)[0], plain(x)[0])


def test_schedule_can_be_replaced():
    """Evaluation with other sizes of the same weights, e.g. without compressed memory."""
    attn = make()
    x = torch.randn(1, 40, 8)
    both = attn(x)[0]
    attn.schedule = dataclasses.replace(attn.schedule, compressed=0)
    off = attn(x)[0]
    twin = make(compressed=0)
    twin.load_state_dict(attn.state_dict())
    assert torch.equal(off, twin(x)[0])
    assert torch.equal(both[:, :8], off[:, :8]) and not torch.allclose(both[:, 20:], off[:, 20:])


class TestPlainData:
    """Module and memory are ordinary objects: copied, saved, flattened."""

    def parts(self):
        attn = make(sinks=1)
        with torch.no_grad():
            _, memory = attn(torch.randn(2, 21, 8), attn.init_memory(2))
        return attn, memory, torch.randn(2, 13, 8)

    def assert_continues(self, attn, memory, other, copied, x):
        with torch.no_grad():
            want, after = attn(x, snapshot(memory))
            got, copied_after = other(x, copied)
        assert_same_bits(got, want)
        for name in MEMORY:
            assert_same_bits(copied_after[name], after[name])

    def test_deepcopy(self):
        attn, memory, x = self.parts()
        other, copied = copy.deepcopy(attn), copy.deepcopy(memory)
        before = snapshot(memory)
        self.assert_continues(attn, memory, other, copied, x)
        for name in MEMORY:
            assert_same_bits(memory[name], before[name])

    def test_save_and_load(self):
        attn, memory, x = self.parts()
        buffer = io.BytesIO()
        torch.save({"weights": attn.state_dict(), "memory": memory}, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        other = make(sinks=1)
        other.load_state_dict(loaded["weights"])
        self.assert_continues(attn, memory, other, loaded["memory"], x)

    def test_pytree(self):
        attn, memory, x = self.parts()
        leaves, spec = pytree.tree_flatten(memory)
        assert len(leaves) == len(memory.tensors) == len(MEMORY)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        copied = pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)
        self.assert_continues(attn, memory, attn, copied, x)

    def test_whole_module_pickles(self):
        attn, memory, x = self.parts()
        buffer = io.BytesIO()
        torch.save(attn, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
        self.assert_continues(attn, memory, other, snapshot(memory), x)
