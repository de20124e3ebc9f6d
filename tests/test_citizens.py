"""What torch users do with modules: autocast, checkpointing, functional calls, meta, dtypes."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ctx
from strategies import assert_close, assert_same_bits, new_streams, operands, plan_of

SIZES = {"window": 8, "compressed": 6, "ratio": 4, "segment": 8, "sinks": 2}


def attention(**options):
    return ctx.CompressiveAttention(32, 4, 2, **{**SIZES, **options})


def config(**options):
    sizes = {"vocab_size": 50, "embed_dim": 32, "num_layers": 2, "num_heads": 4, **SIZES}
    return ctx.CompressiveTransformerConfig(**{**sizes, **options})


class TestAutocast:
    @pytest.mark.parametrize("compressor", ["conv", "gated"])
    @pytest.mark.parametrize("carried", [None, torch.float32, torch.bfloat16], ids=str)
    def test_both_paths(self, compressor, carried):
        """bfloat16 products around a memory of any dtype; both paths agree with float32."""
        attn = attention(compressor=compressor)
        x = torch.randn(2, 50, 32)
        expected, _ = attn(x)
        outs = []
        for grad in (True, False):
            memory = None if carried is None else attn.init_memory(2, dtype=carried)
            parts = []
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
                for piece in x.split([1, 19, 30], 1):
                    y, memory = attn(piece, memory)
                    assert y.dtype == torch.bfloat16
                    parts.append(y)
            kept = memory["window_keys"].dtype
            assert kept == (torch.bfloat16 if carried is None else carried)
            outs.append(torch.cat(parts, 1))
        assert_close(outs[1], outs[0], 2e-2)
        assert_close(outs[0].float(), expected, 4e-2)

    def test_gradients_are_the_parameters(self):
        attn, x = attention(), torch.randn(2, 40, 32)
        wanted = torch.autograd.grad(attn(x)[0].square().mean(), list(attn.parameters()))
        with torch.autocast("cpu", torch.bfloat16):
            loss = attn(x)[0].float().square().mean()
        for parameter, grad, want in zip(
            attn.parameters(),
            torch.autograd.grad(loss, list(attn.parameters())),
            wanted,
            strict=True,
        ):
            assert grad.dtype == parameter.dtype
            assert (grad - want).norm() <= 0.1 * want.norm() + 1e-4

    def test_operators_keep_their_precision(self):
        """Autocast ends where an operator begins: float32 in, the same float32 numbers out."""
        attn = attention(compressor="conv").requires_grad_(False)
        q, k, v = (torch.randn(1, heads, 40, 8) for heads in (4, 2, 2))
        plan = plan_of(attn, new_streams(1), 40)
        with torch.no_grad():
            attn.compressor.key_weight.add_(0.1 * torch.randn_like(attn.compressor.key_weight))

        def run():
            keys, values = torch.ops.ctx.evicted_groups(k, v, plan, [], *attn.law)
            slots = attn.compressor(keys, values)
            return torch.ops.ctx.attend(q, k, v, plan, [], slots, *operands(attn))[0]

        expected = run()
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(run(), expected)


class TestCheckpointing:
    def test_gradients_are_the_same(self):
        attn, x = attention(), torch.randn(2, 30, 32, requires_grad=True)
        with torch.no_grad():
            _, memory = attn(torch.randn(2, 21, 32))
        leaves = [x, *attn.parameters()]
        y, after = attn(x, memory)
        wanted = torch.autograd.grad(y.square().sum(), leaves)
        z, again = checkpoint(attn, x, memory, use_reentrant=False)
        for mine, yours in zip(torch.autograd.grad(z.square().sum(), leaves), wanted, strict=True):
            assert_same_bits(mine, yours)
        for name in after.tensors:
            assert_same_bits(again[name], after[name])

    def test_reentrant_is_refused_before_it_streams_twice(self):
        attn, x = attention(), torch.randn(2, 30, 32, requires_grad=True)
        memory = attn.init_memory(2)
        for content in ("kv", "hidden"):
            attn = attention(memory_content=content)
            memory = attn.init_memory(2)
            with pytest.raises(
                ValueError, match=r"memory must be .*CheckpointFunctionBackward.*use_"
            ):
                checkpoint(attn, x, memory, use_reentrant=True)
            with pytest.raises(ValueError, match="use_reentrant=False"):  # however deep inside
                checkpoint(lambda x, m=memory, f=attn: f(x, m), x, use_reentrant=True)
            assert memory["seen"].tolist() == [0, 0]

    def test_reentrant_may_read(self):
        attn, x = attention(), torch.randn(2, 30, 32, requires_grad=True)
        _, memory = attn(torch.randn(2, 21, 32))
        leaves = [x, *attn.parameters()]
        y, _ = attn(x, memory, update=False)
        wanted = torch.autograd.grad(y.square().sum(), leaves)
        z, _ = checkpoint(
            lambda x: attn(x, memory, update=False), x, use_reentrant=True, determinism_check="none"
        )
        z.square().sum().backward()
        for leaf, want in zip(leaves, wanted, strict=True):
            assert_same_bits(leaf.grad, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("content", ["kv", "hidden"])
def test_an_input_that_carries_a_graph_is_streamed_without_grad(content, mode):
    """As torch's own modules take it: an actor's output, a leaf that is trained."""
    attn = attention(memory_content=content)
    leaf = torch.randn(2, 11, 32, requires_grad=True)
    for x in (leaf, leaf.sin()):
        memory, twin = attn.init_memory(2), attn.init_memory(2)
        with mode():
            y, after = attn(x, memory)
            want, _ = attn(x.detach(), twin)
        assert after is memory and not y.requires_grad
        assert_same_bits(y, want)
        for name, tensor in memory.tensors.items():
            assert_same_bits(tensor, twin[name])


def test_functional_call():
    attn, other = attention(), attention()
    x = torch.randn(2, 30, 32)
    weights = dict(other.named_parameters())
    got, _ = torch.func.functional_call(attn, weights, (x,))
    assert_same_bits(got, other(x)[0])
    assert not torch.equal(got, attn(x)[0])


@pytest.mark.parametrize("bias", ["learned", "log_ratio", "none"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_meta_construction(bias, norm):
    """A model made on the meta device and filled later equals one that was made at once."""
    settings = config(compressed_bias=bias, norm=norm, compressor="gated")
    with torch.device("meta"):
        late = ctx.CompressiveTransformer(settings)
    assert all(tensor.is_meta for tensor in [*late.parameters(), *late.buffers()])
    late.to_empty(device="cpu")
    now = ctx.CompressiveTransformer(settings)
    for model in (late, now):
        torch.manual_seed(1)
        model.reset_parameters()
    tokens = torch.randint(0, 50, (2, 60))
    assert_same_bits(late(tokens)[0], now(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_dtype(dtype):
    model = ctx.CompressiveTransformer(config(compressed_bias="log_ratio"))
    tokens = torch.randint(0, 50, (2, 60))
    expected, _ = model(tokens)
    model.to(dtype)
    with torch.no_grad():
        got, memory = model(tokens, model.init_memory(2))
    assert got.dtype == dtype and memory[0]["window_keys"].dtype == dtype
    assert_close(got.float(), expected, 5e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_memory_may_be_kept_in_another_dtype():
    """A float32 model streams into half the bytes, and equals itself to their rounding."""
    model = ctx.CompressiveTransformer(config())
    tokens = torch.randint(0, 50, (2, 90))
    expected, _ = model(tokens)
    memory = model.init_memory(2).to(dtype=torch.bfloat16)
    with torch.no_grad():
        got, _ = model(tokens, memory)
    assert got.dtype == torch.float32
    assert_close(got, expected, 2e-2)


def test_deepcopy_of_a_model_and_its_memory():
    model = ctx.CompressiveTransformer(config())
    tokens = torch.randint(0, 50, (2, 30))
    with torch.no_grad():
        _, memory = model(tokens, model.init_memory(2))
        twin, held = copy.deepcopy((model, memory))
        assert_same_bits(twin(tokens, held)[0], model(tokens, memory)[0])


def test_a_compressor_that_moves_is_followed():
    """`.to` gives a module new storage; the memory must not go on with the old one."""
    module = ctx.compression.Conv(1, 2, 4)
    used = ctx.KVMemory(ctx.Schedule(4, 3, 2, 4), 1, 1, 4, compressor=module)
    q, k, v = (torch.randn(1, 1, 40, 4) for _ in range(3))
    module.double().float()
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    used.step(q, k, v)
    assert not used.tensors["compressed_keys"].any()


@pytest.mark.parametrize("kind", ["compressor", "relative"])
def test_parameters_that_are_laid_out_anew_are_followed(kind):
    """`p.data = ...` over the same storage, with other strides or of another dtype."""

    def build():
        torch.manual_seed(3)
        conv = ctx.compression.Conv(1, 2, 4)
        relative = ctx.positions.Relative(2, 4, 4)
        with torch.no_grad():
            for p in [*conv.parameters(), *relative.parameters()]:
                p.normal_()
        options = {"position": "relative", "relative": relative, "compressor": conv}
        memory = ctx.KVMemory(ctx.Schedule(4, 3, 2, 4), 1, 1, 4, **options)
        return memory, conv.key_weight if kind == "compressor" else relative.position_weight

    tensors = [torch.randn(1, heads, 40, 4) for heads in (2, 1, 1)]
    used, weight = build()
    plain = used.step(*tensors)
    for change in (
        lambda p: p.data.transpose(-1, -2),  # the same numbers, read in another order
        lambda p: p.data.view(torch.int32).view(torch.float32).double(),
    ):
        used, weight = build()
        used.step(*(x[:, :, :1] for x in tensors))
        weight.data = change(weight)
        used.reset()
        twin, other = build()
        with torch.no_grad():
            other.copy_(weight)
        got = used.step(*tensors)
        assert_close(got, twin.step(*tensors), 1e-6)
        if weight.dtype == torch.float32:
            assert not torch.allclose(got, plain)
