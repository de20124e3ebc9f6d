"""A memory whose tensors were all cast keeps what must stay float32: usage is widened where the
memory is written, and a call that only reads it leaves it as it was."""

import copy

import pytest
import torch

import ctx

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 4}


def cast(layer):
    return {name: x.bfloat16() if x.is_floating_point() else x for name, x in layer.items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("compressor", ["most_used", "conv"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer(compressor, compiled):
    attention = ctx.CompressiveAttention(8, 2, **SIZES, compressor=compressor).bfloat16()
    call = torch.compile(attention, backend="aot_eager") if compiled else attention
    x = torch.randn(2, 13, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        given = cast(attention(x)[1])
        wide = {**copy.deepcopy(given), "attention_received": given["attention_received"].float()}
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
        given = [cast(layer) for layer in built(tokens)[1]]
        wide = [
            {**copy.deepcopy(layer), "attention_received": layer["attention_received"].float()}
            for layer in given
        ]
        call(tokens, given)
        built(tokens, wide)
    assert all(map(same, given, wide))
    assert [layer["attention_received"].dtype for layer in given] == [torch.float32] * 2
    torch._dynamo.reset()
