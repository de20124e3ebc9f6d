"""A memory that was made or copied in inference mode serves training, in graphs as eagerly: it
consists of ordinary tensors.
"""

import pytest
import torch

import ctx
from ctx.memory_rows import leaves
from strategies import assert_close

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1}


def resized(memory, attn):
    return ctx.rows.resized(memory, attn.schedule)


WAYS = {
    "made": lambda memory, attn: memory,
    "begun": lambda memory, attn: attn(torch.randn(2, 13, 8))[1],
    "select": lambda memory, attn: ctx.rows.select(memory, [1, 0]),
    "merge": lambda memory, attn: ctx.rows.merge([ctx.rows.select(memory, [i]) for i in (0, 1)]),
    "clone": lambda memory, attn: ctx.rows.clone(memory),
    "resized": resized,
    "to": lambda memory, attn: ctx.rows.to(memory, dtype=torch.float64),
    "read": lambda memory, attn: attn(torch.randn(2, 3, 8), memory, update=False)[1],
}


CONTENTS = ["kv", "hidden"]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("way", WAYS)
def test_serves_training(way, content):
    """Every way in a graph, too, for one of the two contents."""
    torch.manual_seed(0)
    attn = ctx.CompressiveAttention(8, 4, 2, **SIZES, memory_content=content)
    with torch.inference_mode():
        memory = attn.init_memory(2)
        attn(torch.randn(2, 13, 8), memory)
        memory = WAYS[way](memory, attn)
    assert not any(x.is_inference() for x in leaves(memory))
    attn = attn.to(memory["window_keys"].dtype)
    x = torch.randn(2, 7, 8, dtype=memory["window_keys"].dtype)
    torch._dynamo.reset()
    found, calls = [], [attn]
    if (list(WAYS).index(way) + CONTENTS.index(content)) % 2:
        calls.append(torch.compile(attn, fullgraph=True, backend="aot_eager"))
    for call in calls:
        y, after = call(x, memory)
        found.append(torch.autograd.grad(y.sin().sum(), list(attn.parameters())))
        call(x, after)
    for eager, *compiled in zip(*found, strict=True):
        assert eager.isfinite().all()
        for gradient in compiled:
            assert_close(gradient, eager, 1e-6)


@pytest.mark.parametrize("operation", ["select", "merge", "clone", "to", "resized"])
def test_a_kv_memory(operation):
    with torch.inference_mode():
        memory = ctx.KVMemory(ctx.Schedule(**SIZES), 2, 1, 4)
        memory.step(*(torch.randn(2, 1, 9, 4) for _ in range(3)))
        made = {
            "select": lambda: memory.select([1]),
            "merge": lambda: ctx.KVMemory.merge([memory, memory]),
            "clone": memory.clone,
            "to": lambda: memory.to(dtype=torch.float64),
            "resized": lambda: memory.resized(compressed=2),
        }[operation]()
    for held in (memory, made):
        assert not any(x.is_inference() for x in held.tensors.values())
