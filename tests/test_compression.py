"""Compressor modules: names and shapes of parameters, values and gradients of the reference."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
from ctx import reference
from strategies import COMPRESSORS, DTYPES, POOLING, assert_close, cases, memories

F64 = torch.float64
SHAPES = {
    "mean": {},
    "max": {},
    "conv": {"key_weight": (3, 5, 8, 8), "value_weight": (3, 5, 6, 6)},
    "dilated": {
        "key_first": (3, 2, 8, 16),
        "key_hidden": (3, 2, 2, 16, 16),
        "key_weight": (3, 5, 16, 8),
        "value_first": (3, 2, 6, 12),
        "value_hidden": (3, 2, 2, 12, 12),
        "value_weight": (3, 5, 12, 6),
    },
    "most_used": {},
    "gated": {
        "key_gate": (3, 8),
        "key_position": (3, 5),
        "value_gate": (3, 8),
        "value_position": (3, 5),
    },
}


def made(name, *sizes, **options):
    return ctx.compression.COMPRESSORS[name](*sizes, **options)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_parameters(name):
    module = made(name, 3, 5, 8, 6)
    assert {key: tuple(x.shape) for key, x in module.named_parameters()} == SHAPES[name]
    assert set(module.state_dict()) == set(SHAPES[name])
    start = reference.initial_parameters(name, 3, 5, 8, 6, torch.float32)
    for key, parameter in module.named_parameters():
        assert torch.equal(parameter, start[key])


def test_longer_kernel():
    """The tokens left of the group come first, and start without weight."""
    module = made("conv", 3, 5, 8, 6, kernel=7)
    assert module.overlap == 2 and module.key_weight.shape == (3, 7, 8, 8)
    start = reference.initial_parameters("conv", 3, 5, 8, 6, torch.float32, 7)
    for key, parameter in module.named_parameters():
        assert torch.equal(parameter, start[key])
    assert (module.key_weight[:, :2] == 0).all() and (module.key_weight[:, 2:] != 0).any()
    assert "kernel=7" in repr(module) and made("conv", 3, 5, 8, kernel=5).overlap == 0


@pytest.mark.parametrize(
    "ratio, overlap", [(1, 1), (2, 1), (3, 3), (4, 3), (5, 7), (8, 7), (9, 15)]
)
def test_dilated_reads_a_receptive_field(ratio, overlap):
    """The earliest token that it is given matters, and so does each."""
    module = made("dilated", 1, ratio, 2).double()
    assert module.overlap == overlap
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand_like(parameter))
    tokens = torch.rand(1, 1, 1, overlap + ratio, 2, dtype=F64, requires_grad=True)
    module(tokens, tokens.detach())[0].sum().backward()
    assert (tokens.grad.abs().amin(-1) > 0).all()
    with pytest.raises(ValueError, match=r"keys must be groups of c \+ overlap"):
        module(tokens[..., 1:, :], tokens[..., 1:, :])


@pytest.mark.parametrize("name", POOLING)
def test_starts_as_mean(name):
    module = made(name, 2, 5, 4, 3, dtype=F64)
    tokens = torch.randn(2, 2, 3, module.overlap + 5, 4, dtype=F64)
    values = torch.randn(2, 2, 3, module.overlap + 5, 3, dtype=F64)
    wanted = reference.maximum if name == "max" else reference.mean
    for got, want in zip(
        module(tokens, values), wanted(tokens[..., -5:, :], values[..., -5:, :]), strict=True
    ):
        assert_close(got, want, 1e-14)


def test_kernel_errors():
    with pytest.raises(ValueError, match=r"Conv: kernel must be at least ratio = 4, got 3"):
        made("conv", 1, 4, 2, kernel=3)
    with pytest.raises(TypeError, match=r"kernel must be an int"):
        made("conv", 1, 4, 2, kernel=4.5)
    with pytest.raises(ValueError, match=r'kernel must be None unless "conv" compresses, got 5'):
        ctx.compression.make_compressor("mean", 1, 4, 2, kernel=5)
    layer = {"window": 4, "compressed": 2, "ratio": 4}
    for compressor, kernel, words in (
        ("conv", 3, "compressor_kernel must be at least ratio = 4, got 3"),
        ("gated", 5, 'compressor_kernel must be None unless "conv" compresses, got 5'),
        (torch.nn.Identity(), 5, 'compressor_kernel must be None unless "conv" compresses'),
    ):
        with pytest.raises(ValueError, match=words):
            ctx.CompressiveAttention(8, 2, compressor=compressor, compressor_kernel=kernel, **layer)
    with pytest.raises(ValueError, match="aux_loss must be None for compressor"):
        ctx.CompressiveAttention(8, 2, compressor="most_used", aux_loss="reconstruction", **layer)
    with pytest.raises(ValueError, match="what stays depends on queries"):
        made("most_used", 1, 4, 2)(torch.zeros(1, 1, 1, 4, 2), torch.zeros(1, 1, 1, 4, 2))


def test_value_dim_defaults_to_head_dim():
    assert made("conv", 2, 3, 4).value_weight.shape == (2, 3, 4, 4)


def test_conv_bias():
    module = made("conv", 2, 3, 4, 5, bias=True)
    assert module.key_bias.shape == (2, 4) and module.value_bias.shape == (2, 5)
    with torch.no_grad():
        module.key_bias.normal_(), module.value_bias.normal_()
    keys, values = torch.randn(2, 2, 3, 3, 4), torch.randn(2, 2, 3, 3, 5)
    want = reference.conv(keys, values, **dict(module.named_parameters()))
    for got, slot in zip(module(keys, values), want, strict=True):
        assert_close(got, slot, 1e-6)
    memory = ctx.KVMemory(ctx.Schedule(0, 2, 3), 1, 2, 4, 5, compressor=module, position=None)
    memory.append(keys[:1, :, 0], values[:1, :, 0])
    memory.append(keys[:1, :, 0, :1], values[:1, :, 0, :1])  # token 3 makes group 0 due
    assert_close(memory.tensors["compressed_keys"][:, :, 0], want[0][:1, :, 0], 1e-6)
    assert_close(memory.tensors["compressed_values"][:, :, 0], want[1][:1, :, 0], 1e-6)


@pytest.mark.parametrize("name", POOLING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(10)
@given(data=st.data())
def test_values(name, dtype, data):
    setting = data.draw(memories(compressor=name))
    module = setting.module(dtype).to(dtype)
    groups = data.draw(st.integers(0, 4))
    shape = setting.batch, setting.kv_heads, groups, module.overlap + setting.ratio
    keys = setting.random((*shape, setting.head_dim), dtype, 2)
    values = setting.random((*shape, setting.value_dim), dtype, 3)
    parameters = {key: x.to(F64) for key, x in module.named_parameters()}
    want = reference.COMPRESSORS[name](keys.to(F64), values.to(F64), **parameters)[:2]
    close = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    for got, slot in zip(module(keys, values), want, strict=True):
        assert got.dtype == dtype
        assert_close(got.to(F64), slot, close)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("name", POOLING)
def test_gradients(name, kernel):
    """Of keys, values and every parameter: equal to the reference's, and numerically right."""
    module = made(name, 2, 3, 4, 2, **({"kernel": kernel} if name == "conv" else {})).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    tokens = module.overlap + 3
    keys = torch.randn(2, 2, 2, tokens, 4, dtype=F64, requires_grad=True)
    values = torch.randn(2, 2, 2, tokens, 2, dtype=F64, requires_grad=True)
    named = dict(module.named_parameters())
    wanted = [keys, values, *named.values()]

    def gradients(slots):
        loss = sum((slot * torch.arange(slot.numel()).view_as(slot)).sum() for slot in slots)
        return torch.autograd.grad(loss, wanted)

    ours = gradients(module(keys, values))
    theirs = gradients(reference.COMPRESSORS[name](keys, values, **named)[:2])
    for mine, yours in zip(ours, theirs, strict=True):
        assert_close(mine, yours, 1e-12)

    def run(keys, values, *parameters):
        again = dict(zip(named, parameters, strict=True))
        return torch.func.functional_call(module, again, (keys, values))

    assert torch.autograd.gradcheck(run, wanted)


@pytest.mark.parametrize("name", POOLING)
def test_is_an_ordinary_module(name):
    module = made(name, 2, 3, 4).double()
    keys = torch.randn(2, 2, 2, module.overlap + 3, 4, dtype=F64)
    twin = copy.deepcopy(module)
    again = made(name, 2, 3, 4).double()
    again.load_state_dict(module.state_dict())
    for other in (twin, again):
        for got, want in zip(other(keys, keys), module(keys, keys), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["conv", "dilated", "gated"])
def test_first_values(name):
    """They come from the engine, also without values; on meta they have shapes alone."""
    sizes = (2, 3, 4)
    first = ctx._C.first_values(name, *sizes, 0, 0, torch.device("cpu"))
    assert {value.dtype for value in first} == {F64}
    alone = made(name, *sizes, 0, dtype=F64)
    assert all(key.startswith("key_") for key, _ in alone.named_parameters())
    full = dict(zip(alone.operand_names, first, strict=True))
    for key, parameter in alone.named_parameters():
        assert torch.equal(parameter, full[key])
    for operand, value in zip(alone.operands(), first, strict=True):
        assert operand.shape == value.shape
    shapes = ctx._C.first_values(name, *sizes, 5, 0, torch.device("meta"))
    assert all(value.is_meta for value in shapes)
    with pytest.raises(ValueError, match=r"Compressor\.make: ratio must be at least 1, got 0"):
        ctx._C.first_values(name, 2, 0, 4, 4, 0, torch.device("cpu"))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", ["conv", "dilated", "gated"])
def test_first_values_of_shards(name):
    """A module made on meta, sharded and filled starts as one that was made at once."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        with torch.device("meta"):
            late = made(name, 2, 3, 4)
        fully_shard(late, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        late.to_empty(device="cpu").reset_parameters()
        for key, parameter in made(name, 2, 3, 4).named_parameters():
            assert torch.equal(late.get_parameter(key).full_tensor(), parameter)
    finally:
        torch.distributed.destroy_process_group()
