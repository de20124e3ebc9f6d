"""Compiled graphs: one graph serves every position of a stream, and gives the same numbers."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import ctx
from compiled import Compiled
from ctx.memory_rows import leaves
from strategies import assert_close, assert_same_bits, operands, plan_of

SIZES: dict[str, Any] = {"window": 8, "compressed": 6, "ratio": 4, "segment": 8, "sinks": 2}


def attention(**options):
    return ctx.CompressiveAttention(32, 4, 2, **{**SIZES, **options})


def relative():
    return attention(position="relative", relative_dim=10)


def alibi():
    return attention(position="alibi", distance="token")


def transformer():
    config = ctx.CompressiveTransformerConfig(
        vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, **SIZES
    )
    return ctx.CompressiveTransformer(config)


def inputs(module, rows, tokens):
    if isinstance(module, ctx.CompressiveTransformer):
        return torch.randint(0, 50, (rows, tokens))
    return torch.randn(rows, tokens, 32)


def gradients(module, y):
    module.zero_grad()
    y.square().mean().backward()
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("grad", [False, True], ids=["streaming", "differentiable"])
@pytest.mark.parametrize("make", [attention, relative, alibi, transformer])
def test_one_graph_for_every_position(make, grad):
    """50 steps of varying `seen` and length: at most two compilations, nothing left to Python."""
    module = make()
    compiled = Compiled(module, "aot_eager" if grad else "eager", floats=make is attention)
    ours, theirs = module.init_memory(2), module.init_memory(2)
    with torch.set_grad_enabled(grad):
        for step in range(50):
            x = inputs(module, 2, 3 + step % 4)
            y, ours = compiled.run(x, ours)
            expected, theirs = module(x, theirs)
            assert_close(y, expected, 1e-6)
            if grad and step % 25 == 24:
                pairs = zip(gradients(module, y), gradients(module, expected), strict=True)
                for mine, yours in pairs:
                    assert_close(mine, yours, 1e-6)
    assert compiled.graphs <= 2
    assert ours.spec == theirs.spec
    assert_same_bits(ours.seen, theirs.seen)
    for mine, yours in zip(leaves(ours), leaves(theirs), strict=True):
        assert_close(mine, yours, 1e-6)


@pytest.mark.parametrize(
    "grad, options",
    [
        (False, {}),
        (True, {}),
        (True, {"compressor_kernel": 2 * SIZES["ratio"] + 1}),
        (True, {"compressor": "most_used", "distance": "token"}),
    ],
)
def test_begins_without_a_memory(grad, options):
    module = attention(**options)
    compiled = Compiled(module, "aot_eager", dynamic="compressor" not in options)
    x = torch.randn(2, 9, 32)
    with torch.set_grad_enabled(grad):
        y, memory = compiled.run(x)
        expected, held = module(x)
    assert_close(y, expected, 1e-6)
    for name in held.tensors:
        assert_close(memory[name], held[name], 1e-6)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "how, grad",
    [
        ("lengths", False),
        ("mask", False),
        ("reset_at", False),
        ("reset_at", True),
        pytest.param("lengths", True, marks=SLOW),
        pytest.param("mask", True, marks=SLOW),
    ],
)
def test_rows(how, grad):
    """Padding and documents are tensors: they compile too."""
    module = attention()
    compiled = Compiled(module, "aot_eager")
    ours, theirs = module.init_memory(3), module.init_memory(3)
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            x = torch.randn(3, 10, 32)
            rows = {
                "lengths": torch.randint(0, 11, (3,)),
                "mask": torch.rand(3, 10) < 0.7,
                "reset_at": torch.rand(3, 10) < 0.2,
            }
            y, ours = compiled.run(x, ours, **{how: rows[how]})
            expected, theirs = module(x, theirs, **{how: rows[how]})
            assert_close(y, expected, 1e-6)
    assert compiled.graphs <= 2
    assert_same_bits(ours["seen"], theirs["seen"])


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["streaming", "differentiable"])
@pytest.mark.parametrize("make", [attention, transformer])
def test_inductor(make, grad, monkeypatch, tmp_path):
    """The compiler's own code around our operators; not what it kept of another version of them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = make()
    compiled = Compiled(module, "inductor")
    ours, theirs = module.init_memory(2), module.init_memory(2)
    with torch.set_grad_enabled(grad):
        for step in range(12):
            x = inputs(module, 2, 3 + step % 4)
            y, ours = compiled.run(x, ours)
            expected, theirs = module(x, theirs)
            assert_close(y, expected, 1e-5)
        if grad:
            pairs = zip(gradients(module, y), gradients(module, expected), strict=True)
            for mine, yours in pairs:
                assert_close(mine, yours, 1e-5)
    assert compiled.graphs <= 2


class Step(nn.Module):
    """One streaming step as a graph: memory in, memory out."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, memory):
        with torch.no_grad():
            return self.module(x, memory)


@pytest.mark.parametrize("make", [attention, relative, alibi, transformer])
def test_export_of_a_step(make):
    """Memory is input and output of the exported step; its decomposition gives the same stream."""
    module = make().eval().requires_grad_(False)
    memory = module.init_memory(2)
    x = inputs(module, 2, 1)
    exported = torch.export.export(Step(module), (x, memory), strict=False)
    decomposed = exported.run_decompositions()
    targets = {str(node.target) for node in decomposed.graph.nodes if node.op == "call_function"}
    assert any("ctx" in target or "auto_functionalized" in target for target in targets)
    step, held = decomposed.module(), module.init_memory(2)
    for _ in range(40):
        x = inputs(module, 2, 1)
        y, memory = step(x, memory)
        expected, held = Step(module)(x, held)
        assert_close(y, expected, 1e-6)
    for mine, yours in zip(leaves(memory), leaves(held), strict=True):
        assert_close(mine, yours, 1e-6)


@pytest.mark.parametrize("compressor", ["mean", "dilated", "gated", "most_used"])
def test_operators_alone(compressor):
    """torch.ops.ctx compiles without any of our modules around it."""
    module = attention(compressor=compressor).requires_grad_(False)
    compressor = module.compressor.operands()

    def step(q, k, v, *state):
        *rings, seen, rewindable = state
        plan = plan_of(module, seen, 3, carried=True)
        out, *_ = torch.ops.ctx.step_(q, k, v, plan, rings, compressor, *operands(module))
        torch.ops.ctx.advance_(seen, rewindable, plan, module.max_rewind)
        return out

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    ours, theirs = ([module.init_memory(2)[name] for name in ctx.state.STATE] for _ in range(2))
    for _ in range(30):
        q, k, v = (torch.randn(2, heads, 3, 8) for heads in (4, 2, 2))
        assert_close(compiled(q, k, v, *ours), step(q, k, v, *theirs), 1e-6)
    for mine, yours in itertools.zip_longest(ours, theirs):
        assert_same_bits(mine, yours)


ROWS = {
    "reset": lambda memory, mask: memory.reset(),
    "reset of some": lambda memory, mask: memory.reset(mask),
    "clone": lambda memory, mask: memory.clone(),
    "to": lambda memory, mask: memory.to(dtype=torch.float64),
    "merge": lambda memory, mask: ctx.Memory.merge([memory, memory]),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_operations_that_read_no_number(name):
    """They are part of a whole graph, over a memory that a call has looked at."""
    attention = ctx.CompressiveAttention(8, 2, window=4, compressed=3, ratio=2)
    with torch.no_grad():
        ours = attention(torch.randn(2, 13, 8))[1].clone()
    mask, theirs = torch.tensor([True, False]), ours.clone()
    torch._dynamo.reset()
    call = torch.compile(ROWS[name], backend="aot_eager", fullgraph=True)
    got, want = call(ours, mask) or ours, ROWS[name](theirs, mask) or theirs
    for mine, yours in zip(leaves(got), leaves(want), strict=True):
        assert torch.equal(mine, yours) and mine.dtype == yours.dtype
    torch._dynamo.reset()
