"""A memory knows what it was made for, and a layer takes no other: every setting that decides what
is stored or how it is read, changed one at a time, in both paths, whatever a memory went through.
"""

import copy
import dataclasses
import io
import itertools

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import ctx
from ctx.memory_rows import leaves
from strategies import assert_same_bits

BASE = {
    "window": 64,
    "compressed": 4,
    "ratio": 2,
    "segment": 4,
    "sinks": 1,
    "compressor": "mean",
    "memory_content": "kv",
    "position": "rotary",
    "distance": "slot",
    "rotary_dim": 4,
    "rotary_base": 10000.0,
    "rotary_interleaved": False,
}


class Pool(nn.Module):
    def forward(self, keys, values):
        return keys.mean(3), values.mean(3)


class OtherPool(Pool):
    pass


class Softer(ctx.compression.Mean):
    """Inherits a name, and does something else."""

    def forward(self, keys, values):
        return keys.mean(3) / 2, values.mean(3)


# (what is changed, what the message names)
CHANGES = [
    ({"window": 63}, ["window=63"]),
    ({"window": 60, "segment": 8}, ["window=60", "segment=8"]),  # the shapes are equal
    ({"compressed": 5}, ["compressed=5"]),
    ({"ratio": 1, "window": 65}, ["ratio=1", "window=65"]),
    ({"segment": 3}, ["segment=3"]),
    ({"sinks": 2}, ["sinks=2"]),
    ({"compressor": "conv"}, ["compressor=conv"]),
    ({"compressor": "max"}, ["compressor=max"]),
    ({"compressor": "gated"}, ["compressor=gated"]),
    ({"compressor": "dilated"}, ["compressor=dilated", "overlap=1"]),
    ({"compressor": "conv", "compressor_kernel": 5}, ["compressor=conv", "overlap=3"]),
    ({"compressor": "most_used"}, ["compressor=most_used"]),
    ({"compressor": Pool()}, ["compressor=Pool"]),
    ({"compressor": Softer(2, 2, 4)}, ["compressor=Softer"]),
    ({"memory_content": "hidden"}, ["content=hidden"]),
    ({"position": None}, ["position=None", "rotary_dim=0"]),
    ({"position": "alibi"}, ["position=alibi"]),
    ({"position": "relative"}, ["position=relative"]),
    ({"distance": "token"}, ["distance=token"]),
    ({"rotary_dim": 2}, ["rotary_dim=2"]),
    ({"rotary_base": 500.0}, ["rotary_base=500.0"]),
    ({"rotary_interleaved": True}, ["rotary_interleaved=True"]),
]
OTHER_BASES = [
    ({"position": "alibi"}, {"position": "relative"}, ["position=relative"]),
    ({"position": "alibi"}, {"position": None}, ["position=None"]),
    ({"compressor": Pool()}, {"compressor": OtherPool()}, ["compressor=OtherPool"]),
    ({"memory_content": "hidden"}, {"memory_content": "hidden", "rotary_base": 9.0},
     ["rotary_base=9.0"]),
    ({"memory_content": "hidden"}, {"memory_content": "hidden", "distance": "token"},
     ["distance=token"]),
]  # fmt: skip
PAIRS = [({}, change, named) for change, named in CHANGES] + OTHER_BASES


def attention(**options):
    torch.manual_seed(5)
    return ctx.CompressiveAttention(16, 4, 2, **{**BASE, **options})


def saved(memory):
    buffer = io.BytesIO()
    torch.save(memory, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Copy(nn.Module):
    """A graph that takes a memory and gives one."""

    def forward(self, memory):
        return pytree.tree_map(torch.clone, memory)


def compiled_copy(memory):
    torch._dynamo.reset()  # a graph belongs to one spec
    return torch.compile(Copy(), backend="eager", fullgraph=True)(memory)


WAYS = {
    "as it is": lambda memory: memory,
    "save": saved,
    "deepcopy": copy.deepcopy,
    "pytree": lambda memory: pytree.tree_map(torch.clone, memory),
    "clone": ctx.rows.clone,
    "select": lambda memory: ctx.rows.select(memory, [1, 0]),
    "merge": lambda memory: ctx.rows.merge([ctx.rows.select(memory, [i]) for i in range(2)]),
    "to": lambda memory: ctx.rows.to(memory, dtype=torch.float64),
    "first rows": lambda memory: ctx.rows.merge([pytree.tree_map(lambda x: x[:1], memory)] * 2),
    "state": lambda memory: ctx.Memory.from_state_dict(memory.state_dict()),
    "graph": compiled_copy,
}


def streamed(attn):
    with torch.no_grad():
        return attn(torch.randn(2, 7, 16), attn.init_memory(2))[1]


def refused(attn, memory, named):
    """By the layer in both paths, before anything is written."""
    before = memory.clone()
    for grad, update in itertools.product([True, False], [True, False]):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError) as caught:  # noqa: PT011
            attn(torch.randn(2, 3, 16), memory, update=update)
        message = str(caught.value)
        assert message.startswith("ctx.CompressiveAttention: memory must be made for ")
        wanted, _, got = message.partition(", got one made for ")
        for setting in named:
            assert f" {setting}" in f" {got}", message
            assert f" {setting.split('=')[0]}=" in wanted and setting not in wanted, message
    for mine, x in zip(leaves(memory), leaves(before), strict=True):
        assert_same_bits(mine, x)


@pytest.mark.parametrize("own, change, named", PAIRS, ids=str)
def test_a_foreign_memory_is_refused(own, change, named):
    attn, other = attention(**own), attention(**change)
    memory = streamed(other)
    for way, carried in WAYS.items():
        try:
            refused(attn, carried(memory), named)
        except AssertionError:
            raise AssertionError(way) from None
    if change == {"window": 60, "segment": 8}:  # nothing but the name tells them apart
        own_shapes = [x.shape for x in leaves(attn.init_memory(2))]
        assert [x.shape for x in leaves(memory)] == own_shapes
    mine = {setting.split("=")[0] for setting in named}
    with torch.no_grad():  # the way back, and one's own
        with pytest.raises(ValueError, match=f"made for .*{mine.pop()}="):
            other(torch.randn(2, 3, 16), attn.init_memory(2))
        other(torch.randn(2, 3, 16), saved(ctx.rows.select(memory, [1, 0])))


@pytest.mark.parametrize(
    "options",
    [
        {"compressed_bias": "none"},
        {"compressed_bias": "log_ratio"},
        {"compressor_grad": "aux"},
        {"aux_loss": "autoencoding"},
        {"dropout": 0.5},
        {"bias": True},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_what_decides_nothing_is_no_part_of_it(options):
    memory = attention(**options).init_memory(2)
    with torch.no_grad():
        attention()(torch.randn(2, 3, 16), memory)
    rotary = {"rotary_base": 5.0, "rotary_interleaved": True}
    with torch.no_grad():  # nothing is rotated
        memory = attention(position=None, **rotary).init_memory(2)
        attention(position=None)(torch.randn(2, 3, 16), memory)


def test_one_that_does_not_say_is_refused():
    """Tensors alone, and a specification that its tensors do not have."""
    attn = attention()
    memory = attn.init_memory(2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for bare in (memory.tensors, leaves(memory)):
                with pytest.raises(TypeError, match=r"memory must be a ctx\.Memory or None"):
                    attn(torch.randn(2, 3, 16), bare)
            three = attn.init_memory(3)
            mixed = ctx.Memory(memory.spec, memory.seen, memory.rewindable, three.rings)
            with pytest.raises(ValueError, match=r"window_keys must be \[2, .*, got \[3, "):
                attn(torch.randn(2, 3, 16), mixed)
            other = attention(compressed=5).init_memory(2)
            said = ctx.Memory(memory.spec, other.seen, other.rewindable, other.rings)
            with pytest.raises(ValueError, match=r"compressed_keys must be .*, got "):
                attn(torch.randn(2, 3, 16), said)


def test_follows_what_is_assigned():
    """Of the layer as it is now, and of a twin that shares its parameters."""
    attn, x = attention(), torch.randn(2, 3, 16)
    old = attn.init_memory(2)
    attn.schedule = attn.schedule.resized(compressed=3)
    with pytest.raises(ValueError, match="made for compressed=3, got one made for compressed=4"):
        attn(x, old)
    carried = ctx.rows.resized(old, attn.schedule)
    attn(x, carried)
    attn.compressor = Pool()
    with pytest.raises(ValueError, match="compressor=Pool, got one made for compressor=mean"):
        attn(x, carried)
    attn.distance = "token"
    with pytest.raises(ValueError, match="distance=token compressor=Pool"):
        attn(x, carried)
    attn(x, attn.init_memory(2))


def test_a_model():
    config = {"vocab_size": 9, "embed_dim": 16, "num_layers": 2, "num_heads": 4}
    sizes = {"window": 8, "compressed": 4, "ratio": 2}
    model, other = (
        ctx.CompressiveTransformer(
            ctx.CompressiveTransformerConfig(**config, **sizes, rotary_base=base)
        )
        for base in (10000.0, 500.0)
    )
    tokens, memory = torch.randint(0, 9, (2, 7)), other.init_memory(2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"rotary_base=500\.0"):
            model(tokens, memory)
    assert memory[0]["seen"].tolist() == [0, 0]
    twin = model.with_memory(compressed=2)
    with torch.no_grad():
        _, memory = model(tokens)
        with pytest.raises(ValueError, match="compressed=2, got one made for compressed=4"):
            twin(tokens, memory)
        twin(tokens, ctx.rows.resized(memory, twin.schedules))


def test_merge_and_resized_look_at_it():
    memories = [attention(distance=distance).init_memory(1) for distance in ("slot", "token")]
    with pytest.raises(ValueError, match=r"Memory.merge: .*distance=slot, got .* distance=token"):
        ctx.rows.merge(memories)
    for pair in ([memories[0], memories[0].tensors], [memories[0].tensors, memories[0]]):
        with pytest.raises(TypeError, match=r"ctx.Memory.merge: memory must be a ctx.Memory"):
            ctx.rows.merge(pair)
    assert len(ctx.rows.merge([memories[0]] * 2)["seen"]) == 2
    equal = attention(window=60, segment=8)
    with pytest.raises(ValueError, match=r"ctx.Memory.resized: segment must stay .* got 4"):
        ctx.rows.resized(equal.init_memory(1), attention().schedule)
    kernel = attention(compressor="conv", compressor_kernel=5)
    smaller = kernel.schedule.resized(compressed=2)
    carried = ctx.rows.resized(kernel.init_memory(2), smaller)  # overlap: it says
    assert carried.spec.layers[0].overlap == 3
    kernel.schedule = smaller
    kernel(torch.randn(2, 3, 16), carried)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", [{"rotary_base": 500.0}, {"window": 60, "segment": 8}], ids=str)
def test_compiled(change, grad):
    """It passes through graphs, and a graph is not made for a foreign one."""
    attn, other = attention(), attention(**change)
    x = torch.randn(2, 3, 16)
    torch._dynamo.reset()
    step = torch.compile(attn, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        _, memory = step(x)
        for _ in range(2):
            _, memory = step(x, memory)
        attn(x, memory)
        refused(other, memory, ["segment=4" if "segment" in change else "rotary_base=10000.0"])
        named = "got one made for rotary_base=500" if "rotary_base" in change else "got one made"
        with pytest.raises(Exception, match=named):  # the compiler's, which quotes ours
            step(x, other.init_memory(2))
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=named):
            torch.compile(attn, backend="aot_eager")(x, other.init_memory(2))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_model(first, grad):
    """Also where the compiler gives up a graph, and runs parts of the call without one."""
    settings = {"vocab_size": 11, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
    sizes = {"window": 4, "compressed": 3, "ratio": 2}
    config = ctx.CompressiveTransformerConfig(**settings, **sizes)
    built = ctx.CompressiveTransformer(config)
    other = ctx.CompressiveTransformer(dataclasses.replace(config, rotary_base=500.0))
    tokens = torch.randint(11, (2, 3))
    torch._dynamo.reset()
    step = torch.compile(built, backend="eager")
    with torch.set_grad_enabled(grad):
        if first:
            step(tokens, built.init_memory(2))
        memory = other.init_memory(2)
        with pytest.raises(ValueError, match="got one made for rotary_base=500"):
            step(tokens, memory)
        assert all(not layer["seen"].any() for layer in memory)
    torch._dynamo.reset()


class Step(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, memory):
        with torch.no_grad():
            return self.module(x, memory)


def test_exported():
    attn, other = attention().requires_grad_(False), attention(distance="token")
    x = torch.randn(2, 1, 16)
    exported = torch.export.export(Step(attn), (x, attn.init_memory(2)), strict=False)
    _, memory = exported.module()(x, attn.init_memory(2))
    attn(x, memory)
    refused(other, memory, ["distance=slot"])
    with pytest.raises(ValueError, match="got one made for distance=token"):
        torch.export.export(Step(attn), (x, other.init_memory(2)), strict=False)
    named = r"(?s)distance='slot'.*but actually got .*distance='token'"
    with pytest.raises(ValueError, match=named):  # the specification is the graph's
        exported.module()(x, other.init_memory(2))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("change", [
    {"inv_freq": (1.0, 0.5)}, {"attention_factor": 1.5}, {"slot_mass": True},
], ids=str)  # fmt: skip
def test_settings_that_no_option_gives(change, grad):
    """Of a layer and of a KVMemory, which both take ctx.AttentionSettings."""
    base = ctx.AttentionSettings(schedule=ctx.Schedule(4, 3, 2), rotary_dim=4)
    layers = [
        ctx.CompressiveAttention(settings, embed_dim=16, num_heads=4, compressor="mean")
        for settings in (base, dataclasses.replace(base, **change))
    ]
    [name] = change
    x = torch.randn(2, 5, 16)
    for layer, other in (layers, layers[::-1]):
        memory = other.init_memory(2)
        before = [part.clone() for part in leaves(memory)]
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"{name}=.*{name}="):
            layer(x, memory)
        for part, was in zip(leaves(memory), before, strict=True):
            assert_same_bits(part, was)
    held, foreign = (
        ctx.KVMemory(settings, 2, 2, 4, compressor="mean")
        for settings in (base, dataclasses.replace(base, **change))
    )
    said = {"slot_mass": "mass"}.get(name, name)
    with pytest.raises(ValueError, match=f"KVMemory.load_state_dict: {said} must be"):
        held.load_state_dict(foreign.state_dict())
    with pytest.raises(ValueError, match=f"KVMemory.merge: memories must have one {said}"):
        ctx.KVMemory.merge([held, foreign])
