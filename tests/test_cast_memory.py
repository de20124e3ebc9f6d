"""A memory whose tensors were all cast keeps what must stay float32: usage is widened where the
memory is written, and a call that only reads it leaves it as it was."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

import ctx
from ctx.memory_rows import leaves
from ctx.state import PLACE

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 4}


def cast(memory):
    return pytree.tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, memory)


def widened(memory):
    """A copy in which what must be float32 is."""
    made = copy.deepcopy(memory)
    for ring in made.rings:
        ring[PLACE["attention_received"]] = ring[PLACE["attention_received"]].float()
    return made


def same(one, other):
    return all(map(torch.equal, leaves(one), leaves(other)))


@pytest.mark.parametrize("compressor", ["most_used", "conv"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer(compressor, compiled):
    attention = ctx.CompressiveAttention(8, 2, **SIZES, compressor=compressor).bfloat16()
    call = torch.compile(attention, backend="aot_eager") if compiled else attention
    x = torch.randn(2, 13, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        given = cast(attention(x)[1])
        wide = widened(given)
        usage = given["attention_received"]
        out, held = call(x, given, update=False)
        assert held is given and given["attention_received"] is usage
        expected, after = attention(x, wide)
        torch.testing.assert_close(out, expected)  # read before it is written, that is rounded
        out, held = call(x, given)
        assert held is given and given["attention_received"].dtype == torch.float32
        assert torch.equal(out, expected) and same(given, after)
    given = cast(given)
    out, held = call(x, given)
    out.float().sum().backward()
    assert (
        given["attention_received"].dtype == torch.bfloat16
        and held["attention_received"].dtype == torch.float32
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model(compiled):
    """The memory that was passed is streamed into as a whole, whatever is done with the result."""
    config = ctx.CompressiveTransformerConfig(
        vocab_size=11, embed_dim=8, num_layers=2, num_heads=2, compressor="most_used", **SIZES
    )
    built = ctx.CompressiveTransformer(config).bfloat16()
    call = torch.compile(built, backend="aot_eager") if compiled else built
    tokens = torch.randint(11, (2, 13))
    with torch.no_grad():
        given = cast(built(tokens)[1])
        wide = widened(given)
        call(tokens, given)
        built(tokens, wide)
    assert same(given, wide)
    assert [layer["attention_received"].dtype for layer in given] == [torch.float32] * 2
    torch._dynamo.reset()
