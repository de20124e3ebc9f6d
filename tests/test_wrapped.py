"""Every submodule of an attention is called, not read: one that owns another and adds to it (an
adapter), hooks, and a forward of one's own act in training and in streams.
"""

import copy

import pytest
import torch
from torch import nn

import ctx
from compiled import Compiled
from pairwise import pairwise
from strategies import COMPRESSORS, POOLING, assert_close, assert_same_bits

F64 = torch.float64
SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1, "max_rewind": 4}
POSITIONS = ["rotary", "relative", "alibi", None]
CALLS = [1, 11, 3, 8]


def attention(**options):
    torch.manual_seed(4)
    attn = ctx.CompressiveAttention(8, 4, 2, **{**SIZES, **options}, dtype=F64)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn


class Adapted(nn.Module):
    """A linear layer and a product of two small matrices beside it (LoRA)."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(base.in_features, 2, dtype=F64))
        self.up = nn.Parameter(0.2 * torch.randn(2, base.out_features, dtype=F64))

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up

    def by_hand(self, layer):
        layer.weight.add_((self.down @ self.up).T)


class Shifted(nn.Module):
    """A compressor and something added to its slots; the key's alone where there are no values."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(0.5 * torch.randn(base.head_dim, dtype=F64))

    def forward(self, keys, values):
        key_slots, value_slots = self.base(keys, values)
        scale = 1 + keys[..., -1, :].mean(-1, keepdim=True)
        return key_slots + scale * self.shift, value_slots.sin()


class ShiftedByHand(nn.Module):
    """The same without a submodule: the compressor's operator, and the addition."""

    def __init__(self, wrapper):
        super().__init__()
        base = wrapper.base
        self.overlap, self.name, self.operands = base.overlap, base.name, base.operands()
        self.shift = wrapper.shift

    def forward(self, keys, values):
        key_slots, value_slots, _ = torch.ops.ctx.compress(
            keys, values, self.operands, self.name, 0
        )
        scale = 1 + keys[..., -1, :].mean(-1, keepdim=True)
        return key_slots + scale * self.shift, value_slots.sin()


class Moved(nn.Module):
    """Relative positions, and something added to each of their tensors."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.steps = nn.ParameterList(0.3 * torch.randn_like(x) for x in base.parameters())

    def forward(self):
        return [x + step for x, step in zip(self.base(), self.steps, strict=True)]

    def by_hand(self, relative):
        for parameter, step in zip(relative.parameters(), self.steps, strict=True):
            parameter.add_(step)


class Rebuilt(nn.Module):
    """A decoder, and something added to what it rebuilds."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.change = nn.Parameter(0.3 * torch.randn_like(base.key_weight))

    def forward(self, keys, values):
        groups, others = self.base(keys, values)
        return groups + (keys @ self.change).view_as(groups), others

    def by_hand(self, decoder):
        decoder.key_weight.add_(self.change)


WRAPPERS = {
    **dict.fromkeys(["q_proj", "k_proj", "v_proj", "out_proj"], Adapted),
    "compressor": Shifted,
    "relative": Moved,
    "decoder": Rebuilt,
}
CASES = pairwise(
    *(WRAPPERS, COMPRESSORS, POSITIONS, ["kv", "hidden"]),
    allowed=lambda name, compressor, position, content: (
        (name != "relative" or position == "relative")
        and (compressor in POOLING or (name not in ("compressor", "decoder") and content == "kv"))
    ),
)


def streamed(attn, x, grad, calls=CALLS):
    memory, parts = attn.init_memory(len(x)), []
    with torch.set_grad_enabled(grad):
        for piece in x.split(calls, 1):
            y, memory = attn(piece, memory)
            parts.append(y)
    return torch.cat(parts, 1), memory


def count(module, ran):
    """Forward hooks of both kinds that count their calls."""
    module.register_forward_pre_hook(lambda *_: ran.append("before"))
    module.register_forward_hook(lambda *_: ran.append("after"))


@pytest.mark.parametrize("name, compressor, position, content", CASES)
def test_a_wrapper_adds(name, compressor, position, content):
    """Numbers of both paths are those of the addition by hand, gradients reach what was added, and
    hooks run on the wrapper and on what it owns.
    """
    attn = attention(
        compressor=compressor,
        position=position,
        memory_content=content,
        aux_loss="autoencoding" if name == "decoder" else None,
    )
    wanted = copy.deepcopy(attn)
    wrapper = WRAPPERS[name](getattr(attn, name))
    if name == "compressor":
        wanted.compressor = ShiftedByHand(wrapper)
    else:
        with torch.no_grad():
            wrapper.by_hand(getattr(wanted, name))
    setattr(attn, name, wrapper)
    assert type(attn.compressor).__name__ == (
        "Custom"
        if name == "compressor"
        else "MostUsed"
        if compressor == "most_used"
        else type(wanted.compressor).__name__
    )
    ran, inside = [], []
    count(wrapper, ran)
    count(wrapper.base, inside)
    added = [p for key, p in wrapper.named_parameters() if not key.startswith("base")]
    x = torch.randn(2, sum(CALLS), 8, dtype=F64)
    for grad in (True, False):
        if name != "decoder":
            ran.clear(), inside.clear()
            y, memory = streamed(attn, x, grad)
            want, after = streamed(wanted, x, grad)
            assert_close(y, want, 1e-11)
            for key in ctx.state.STATE:
                assert_close(memory[key], after[key], 1e-11)
            for calls in (ran, inside):
                assert calls.count("before") == calls.count("after") >= len(CALLS)
        if grad:
            loss = attn(x, return_aux=True)[2] if name == "decoder" else attn(x)[0].sin().sum()
            assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, added))
        if grad and name == "decoder":
            assert_close(loss, wanted(x, return_aux=True)[2], 1e-11)
            assert set(ran) == set(inside) == {"before", "after"}


def test_a_wrapper_around_most_used_is_refused():
    attn = attention(compressor="most_used")
    with pytest.raises(ValueError, match=r"module must not contain .* got 'most_used' in Shifted"):
        attn.compressor = Shifted(attn.compressor)
    assert isinstance(attn.compressor, ctx.compression.MostUsed)

    class Other(ctx.compression.MostUsed):
        def forward(self, keys, values):
            return keys[..., 0, :], values[..., 0, :]

    with pytest.raises(ValueError, match=r"forward must not be overridden .* 'most_used'"):
        attn.compressor = Other(2, 2, 2)
    for option in ({"memory_content": "hidden"}, {"aux_loss": "reconstruction"}):
        attn = attention(compressor="mean", **option)
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be .* 'most_used'"):
            attn.compressor = ctx.compression.MostUsed(2, 2, 2)
    with pytest.raises(TypeError, match="compressor must be a module, got 3"):
        attn.compressor = 3


def test_a_compressor_that_is_assigned_brings_its_overlap():
    """The ring of the window is as long as the new one needs."""
    attn = attention(compressor="mean")
    before = attn.init_memory(1)["window_keys"].shape[2]
    attn.compressor = Shifted(ctx.compression.Conv(2, 2, 2, kernel=7, dtype=F64))
    assert attn.compressor.overlap == 5
    assert attn.init_memory(1)["window_keys"].shape[2] == before + 5


class Louder(ctx.compression.Conv):
    """What the convolution makes, times two."""

    def forward(self, keys, values):
        return tuple(2 * slots for slots in super().forward(keys, values))


def twice(module, arguments, slots):
    return tuple(2 * x for x in slots)


def put_on(module):
    """As offloading does it: on the object."""
    inner = module.forward
    module.forward = lambda *arguments: tuple(2 * x for x in inner(*arguments))


ACTING = {
    "override": lambda made: None,
    "hook": lambda made: made.register_forward_hook(twice),
    "object": put_on,
    "everywhere": lambda made: nn.modules.module.register_module_forward_hook(
        lambda module, *call: twice(module, *call) if module is made else None
    ),
}


def doubled(how, *sizes, **options):
    """A convolution whose call gives twice its slots, the same by its weights, and what undoes."""
    kind = Louder if how == "override" else ctx.compression.Conv
    made, want = kind(*sizes, **options), ctx.compression.Conv(*sizes, **options)
    with torch.no_grad():
        for mine, yours in zip(made.parameters(), want.parameters(), strict=True):
            mine.normal_()
            yours.copy_(2 * mine)
    return made, want, ACTING[how](made)


@pytest.mark.parametrize("content", ["kv", "hidden"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ACTING)
def test_what_acts_on_a_native_compressor_acts_in_streams(how, grad, content):
    sizes = (1, 2, 8, 0) if content == "hidden" else (2, 2, 2)
    made, want, handle = doubled(how, *sizes, dtype=F64)
    attn, twin = (attention(compressor=x, memory_content=content) for x in (made, want))
    with torch.no_grad():
        for mine, yours in zip(made.parameters(), want.parameters(), strict=True):
            yours.copy_(2 * mine)  # the layers have moved them
    x = torch.randn(2, sum(CALLS), 8, dtype=F64)
    try:
        y, memory = streamed(attn, x, grad)
    finally:
        if handle is not None:
            handle.remove()
    expected, held = streamed(twin, x, grad)
    assert_close(y, expected, 1e-11)
    for name in ctx.state.STATE:
        assert_close(memory[name], held[name], 1e-11)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("how", ACTING)
def test_what_acts_on_a_native_compressor_acts_in_a_memory(how, position):
    """Whether it was there from the beginning or came later."""
    scheme = {
        "alibi": {"alibi_slopes": [0.5, 0.25]},
        "relative": {"relative": ctx.positions.Relative(2, 4, 6, dtype=F64)},
    }.get(position, {})
    options = {"position": position, **scheme, "dtype": F64, "compressed_bias": [0.5, 0.0]}
    made, want, handle = doubled(how, 1, 2, 4, dtype=F64)
    try:
        memory, twin = (
            ctx.KVMemory(ctx.Schedule(4, 3, 2), 2, 1, 4, compressor=x, **options)
            for x in (made, want)
        )
        for tokens in (1, 11, 3, 8):
            q, k, v = (torch.randn(2, heads, tokens, 4, dtype=F64) for heads in (2, 1, 1))
            mine, yours = (m.step(q, k, v, return_region_weights=True) for m in (memory, twin))
            for x, other in zip(mine, yours, strict=True):
                assert_close(x, other, 1e-11)
            for one in (memory, twin):
                one.append(k, v)
            assert_close(memory.attend(q[:, :, -1:]), twin.attend(q[:, :, -1:]), 1e-11)
        before = {name: x.clone() for name, x in memory.tensors.items()}
        with pytest.raises(ValueError, match=r"^ctx.KVMemory.step: q must be "):
            memory.step(q[:, :, :, :2], k, v)
        with pytest.raises(ValueError, match=r"^ctx.KVMemory.append: v must "):
            memory.append(k, v[:, :, :1])
        for name, x in memory.tensors.items():
            assert_same_bits(x, before[name])
    finally:
        if handle is not None:
            handle.remove()


def test_parameters_that_a_hook_gathers():
    """FSDP2's way: a compressor has its parameters during its call only."""
    attn = attention(compressor="conv")
    x = torch.randn(2, sum(CALLS), 8, dtype=F64)
    want = streamed(attn, x, False)[0]
    made = attn.compressor
    whole = {name: p.detach().clone() for name, p in made.named_parameters()}

    def gather(*_):
        for name, p in made.named_parameters():
            p.data = whole[name].clone()

    def free(*_):
        for p in made.parameters():
            p.data = torch.full_like(p.data, float("nan"))

    free()
    made.register_forward_pre_hook(gather)
    made.register_forward_hook(free)
    assert_close(streamed(attn, x, False)[0], want, 1e-11)


def test_hooks_of_relative_positions_run_in_a_memory():
    relative = ctx.positions.Relative(2, 4, 6, dtype=F64)
    twin = copy.deepcopy(relative)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    relative.register_forward_hook(lambda module, arguments, found: [2 * x for x in found])
    options = {"position": "relative", "dtype": F64}
    memory, other = (
        ctx.KVMemory(ctx.Schedule(4, 3, 2), 1, 1, 4, relative=x, **options)
        for x in (relative, twin)
    )
    q, k, v = (torch.randn(1, heads, 20, 4, dtype=F64) for heads in (2, 1, 1))
    assert_close(memory.step(q, k, v), other.step(q, k, v), 1e-12)


@pytest.mark.parametrize("content", ["kv", "hidden"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_projections(position, content):
    """They have no parameters that could be read; nothing of them trains, but both paths run."""
    attn = attention(position=position, memory_content=content, compressed_bias="log_ratio").float()
    x = torch.randn(2, 23, 8)
    want = attn(x)[0].detach()
    quantised = torch.ao.quantization.quantize_dynamic(attn, {nn.Linear})
    assert not isinstance(quantised.k_proj, nn.Linear)
    memory = quantised.init_memory(2)
    assert memory["window_keys"].dtype == torch.float32
    with torch.no_grad():
        assert_close(quantised(x, memory)[0], want, 0.2)
    assert quantised(x, memory)[0].isfinite().all()  # in the middle of a stream
    assert_close(quantised(x)[0].detach(), want, 0.2)
    bare = attention(
        position=None, memory_content=content, compressor="mean", compressed_bias="none"
    )
    bare = torch.ao.quantization.quantize_dynamic(bare.float(), {nn.Linear})
    assert [*bare.parameters(), *bare.buffers()] == []
    assert bare.init_memory(2)["window_keys"].dtype == torch.float32
    with pytest.raises(TypeError, match="x must be floating point as the parameters"):
        quantised(x.long(), memory)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_begin_again(name):
    """`reset_parameters` reaches what a wrapper owns, and asks nothing of the wrapper."""
    attn = attention()
    setattr(attn, name, Adapted(getattr(attn, name)))
    with torch.no_grad():
        getattr(attn, name).base.weight.fill_(9.0)
    attn.reset_parameters()
    assert getattr(attn, name).base.weight.abs().max() < 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("content", ["kv", "hidden"])
def test_compiled(content, grad):
    """All of them wrapped, a hook among them, in one graph for calls of one length."""
    attn = attention(position="relative", memory_content=content)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj", "compressor", "relative"):
        setattr(attn, name, WRAPPERS[name](getattr(attn, name)))
    attn.compressor.module.base.register_forward_hook(twice)
    x = torch.randn(2, 24, 8, dtype=F64)
    want = streamed(attn, x, grad, [8, 8, 8])[0]
    compiled = Compiled(attn, "aot_eager", dynamic=None)
    memory, parts = attn.init_memory(2), []
    with torch.set_grad_enabled(grad):
        for piece in x.split(8, 1):
            y, memory = compiled.run(piece, memory)
            parts.append(y)
    assert_close(torch.cat(parts, 1), want, 1e-11)
    assert compiled.graphs == 1
