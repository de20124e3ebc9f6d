"""Parameters that are on meta between calls (accelerate's offloading): memories and constants
follow the device that the hook brings them to.
"""

import types

import pytest
import torch

import ctx
from ctx.memory_rows import leaves
from strategies import assert_close

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1}


def offload(module, device):
    """What accelerate's AlignDevicesHook does: parameters come for the call, and leave after it."""
    held = {name: p.data for name, p in module.named_parameters(recurse=False)}
    if not held:
        return
    inner = module.forward

    def leave():
        for name, p in held.items():
            setattr(module, name, torch.nn.Parameter(p.to("meta"), requires_grad=False))

    def forward(*arguments, **options):
        for name, p in held.items():
            setattr(module, name, torch.nn.Parameter(p, requires_grad=False))
        try:
            return inner(*arguments, **options)
        finally:
            leave()

    module.forward = forward
    module._hf_hook = types.SimpleNamespace(execution_device=device)
    leave()


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=str)
@pytest.mark.parametrize("position, bias", [("alibi", "log_ratio"), ("relative", "learned")])
@pytest.mark.parametrize("content", ["kv", "hidden"])
def test_follows_the_execution_device(position, bias, content, device):
    torch.manual_seed(0)
    attn = ctx.CompressiveAttention(
        8, 4, 2, **SIZES, position=position, compressed_bias=bias, memory_content=content
    )
    x = torch.randn(2, 23, 8)
    with torch.no_grad():
        want, _ = attn(x)
    for module in [*attn.modules()]:
        offload(module, device)
    assert all(p.is_meta for p in attn.parameters())
    memory = attn.init_memory(2)
    assert {t.device.type for t in leaves(memory)} == {"cpu"}
    assert memory["window_keys"].dtype == torch.float32
    with torch.no_grad():
        parts = [attn(piece, memory)[0] for piece in x.split([1, 9, 13], 1)]
    assert_close(torch.cat(parts, 1), want, 1e-5)
    assert attn.init_memory(1, device="meta")["seen"].is_meta


def test_a_chain_of_hooks():
    attn = ctx.CompressiveAttention(8, 4, 2, **SIZES, device="meta")
    assert attn.init_memory(1)["seen"].is_meta
    first, second = (types.SimpleNamespace(execution_device=d) for d in (None, "cpu"))
    attn._hf_hook = types.SimpleNamespace(hooks=(first, second))
    assert attn.init_memory(1)["seen"].device.type == "cpu"


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    attn = ctx.CompressiveAttention(8, 4, 2, **SIZES)
    x = torch.randn(2, 23, 8)
    with torch.no_grad():
        want, _ = attn(x)
    accelerate.cpu_offload(attn, execution_device=torch.device("cpu"))
    memory = attn.init_memory(2)
    assert memory["seen"].device.type == "cpu"
    with torch.no_grad():
        parts = [attn(piece, memory)[0] for piece in x.split([1, 9, 13], 1)]
    assert_close(torch.cat(parts, 1), want, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "content, aux", [("kv", "reconstruction"), ("hidden", "reconstruction"), ("kv", "autoencoding")]
)
def test_a_model(content, aux, tied):
    """Whole: the tied output layer's weight is not there but in the embedding's call."""
    torch.manual_seed(0)
    config = ctx.CompressiveTransformerConfig(
        vocab_size=11,
        embed_dim=8,
        num_layers=2,
        num_heads=2,
        memory_content=content,
        aux_loss=aux,
        tied=tied,
        **SIZES,
    )
    built = ctx.CompressiveTransformer(config).eval()
    tokens = torch.randint(11, (2, 13))
    with torch.no_grad():
        want, _, loss = built(tokens, return_aux=True)
    drawn = built.generate(tokens, 4, temperature=0)
    for module in [*built.modules()]:
        offload(module, "cpu")
    assert all(p.is_meta for p in built.parameters())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            logits, _, aside = built(tokens, built.init_memory(2), return_aux=True)
        assert_close(logits.detach(), want, 1e-5)
        assert_close(aside.detach(), loss, 1e-5)
    assert torch.equal(built.generate(tokens, 4, temperature=0), drawn)
