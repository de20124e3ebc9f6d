"""A call without tokens gives every parameter a gradient of zeros, as data-parallel training
expects of every call; a call without rows is refused in words.
"""

import itertools

import pytest
import torch

import ctx
from strategies import COMPRESSORS, POOLING, assert_same_bits

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1}
POSITIONS = ["rotary", "relative", "alibi", None]
LAYERS = [
    *itertools.product(COMPRESSORS, POSITIONS, ["kv"]),
    *itertools.product(POOLING, POSITIONS, ["hidden"]),
]


def attention(**options):
    torch.manual_seed(6)
    return ctx.CompressiveAttention(8, 4, 2, **SIZES, **options)


@pytest.mark.parametrize("compressor, position, content", LAYERS)
def test_no_tokens(compressor, position, content):
    aux = None if compressor == "most_used" else "autoencoding"
    attn = attention(
        compressor=compressor,
        position=position,
        memory_content=content,
        aux_loss=aux,
        compressor_grad="task" if aux is None else "aux",
        bias=True,
    )
    with torch.no_grad():
        attn.out_proj.weight.fill_(float("nan"))  # no number is looked at
        _, held = attn(torch.randn(2, 17, 8), attn.init_memory(2))
    for memory, update in itertools.product((None, held), (True, False)):
        for rows in ({}, {"lengths": torch.zeros(2, dtype=torch.int64)}):
            attn.zero_grad()
            x = torch.randn(2, 0, 8, requires_grad=True)
            y, after = attn(x, memory, update=update, **rows)
            assert y.shape == (2, 0, 8)
            y.sum().backward()
            for name, parameter in attn.named_parameters():
                assert parameter.grad is not None, name
                assert_same_bits(parameter.grad, torch.zeros_like(parameter))
            for name in ctx.state.STATE if memory is not None else ():
                assert_same_bits(after[name], memory[name])


def test_frozen_parameters_stay_so():
    attn = attention()
    attn.k_proj.requires_grad_(False)
    attn(torch.randn(2, 0, 8))[0].sum().backward()
    assert attn.k_proj.weight.grad is None and attn.q_proj.weight.grad is not None
    with torch.no_grad():
        assert not attn(torch.randn(2, 0, 8))[0].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        attn(torch.randn(2, 0, 8))[0].sum().backward()


@pytest.mark.parametrize("content", ["kv", "hidden"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_rows(content, grad):
    attn = attention(memory_content=content)
    with torch.set_grad_enabled(grad):
        for memory in (None, attn.init_memory(2)):
            with pytest.raises(ValueError, match=r"Attention: x must have at least one row, .*got"):
                attn(torch.randn(0, 3, 8), memory)
    with pytest.raises(ValueError, match=r"init_memory: batch_size must be at least 1, got 0"):
        attn.init_memory(0)
    with pytest.raises(ValueError, match=r"KVMemory: batch_size must be between 1 and .*, got 0"):
        ctx.KVMemory(ctx.Schedule(**SIZES), 0, 1, 4)
    memory = ctx.KVMemory(ctx.Schedule(**SIZES), 2, 1, 4)
    with pytest.raises(ValueError, match=r"step: k must be .*\[2, 1, T, 4\], got \[0, 1, 3, 4\]"):
        memory.step(*(torch.randn(0, 1, 3, 4) for _ in range(3)))


@pytest.mark.parametrize("compressor, position, content", LAYERS)
def test_no_tokens_for_a_model(compressor, position, content):
    """What stands before a layer, too: its norm gets a gradient through the layer's input."""
    settings = {"compressor": compressor, "position": position, "memory_content": content}
    config = ctx.CompressiveTransformerConfig(
        vocab_size=7, embed_dim=8, num_layers=2, num_heads=2, tied=False, **SIZES, **settings
    )
    built = ctx.CompressiveTransformer(config)
    with torch.no_grad():
        _, held = built(torch.randint(7, (2, 17)))
    calls = ({}, {"lengths": torch.zeros(2, dtype=torch.int64)}, {"update": False})
    for memory, options in itertools.product((None, held), (*calls, {"last_only": True})):
        built.zero_grad()
        built(torch.zeros(2, 0, dtype=torch.int64), memory, **options)[0].sum().backward()
        for name, parameter in built.named_parameters():
            assert parameter.grad is not None, name
            assert_same_bits(parameter.grad, torch.zeros_like(parameter))
