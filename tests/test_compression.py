"""Compressor modules: names and shapes of parameters, values and gradients of the reference."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
from ctx import reference
from strategies import COMPRESSORS, DTYPES, assert_close, cases, memories

F64 = torch.float64
SHAPES = {
    "mean": {},
    "max": {},
    "conv": {"key_weight": (3, 5, 8, 8), "value_weight": (3, 5, 6, 6)},
    "gated": {
        "key_gate": (3, 8),
        "key_position": (3, 5),
        "value_gate": (3, 8),
        "value_position": (3, 5),
    },
}


def made(name, *sizes, **options):
    return getattr(ctx.compression, name.capitalize())(*sizes, **options)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_parameters(name):
    module = made(name, 3, 5, 8, 6)
    assert {key: tuple(x.shape) for key, x in module.named_parameters()} == SHAPES[name]
    assert set(module.state_dict()) == set(SHAPES[name])
    start = reference.initial_parameters(name, 3, 5, 8, 6, torch.float32)
    for key, parameter in module.named_parameters():
        assert torch.equal(parameter, start[key])


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


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(10)
@given(data=st.data())
def test_values(name, dtype, data):
    setting = data.draw(memories(compressor=name))
    module = setting.module(dtype).to(dtype)
    groups = data.draw(st.integers(0, 4))
    shape = setting.batch, setting.kv_heads, groups, setting.ratio
    keys = setting.random((*shape, setting.head_dim), dtype, 2)
    values = setting.random((*shape, setting.value_dim), dtype, 3)
    parameters = {key: x.to(F64) for key, x in module.named_parameters()}
    want = reference.COMPRESSORS[name](keys.to(F64), values.to(F64), **parameters)
    close = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    for got, slot in zip(module(keys, values), want, strict=True):
        assert got.dtype == dtype
        assert_close(got.to(F64), slot, close)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_gradients(name):
    """Of keys, values and every parameter: equal to the reference's, and numerically right."""
    module = made(name, 2, 3, 4, 2).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    keys = torch.randn(2, 2, 2, 3, 4, dtype=F64, requires_grad=True)
    values = torch.randn(2, 2, 2, 3, 2, dtype=F64, requires_grad=True)
    named = dict(module.named_parameters())
    wanted = [keys, values, *named.values()]

    def gradients(slots):
        loss = sum((slot * torch.arange(slot.numel()).view_as(slot)).sum() for slot in slots)
        return torch.autograd.grad(loss, wanted)

    ours = gradients(module(keys, values))
    theirs = gradients(reference.COMPRESSORS[name](keys, values, **named))
    for mine, yours in zip(ours, theirs, strict=True):
        assert_close(mine, yours, 1e-12)

    def run(keys, values, *parameters):
        again = dict(zip(named, parameters, strict=True))
        return torch.func.functional_call(module, again, (keys, values))

    assert torch.autograd.gradcheck(run, wanted)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_is_an_ordinary_module(name):
    module = made(name, 2, 3, 4).double()
    keys = torch.randn(2, 2, 2, 3, 4, dtype=F64)
    twin = copy.deepcopy(module)
    again = made(name, 2, 3, 4).double()
    again.load_state_dict(module.state_dict())
    for other in (twin, again):
        for got, want in zip(other(keys, keys), module(keys, keys), strict=True):
            assert torch.equal(got, want)
