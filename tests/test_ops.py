"""Every operator under torch.library.opcheck: schema, autograd, shapes, and compiled graphs."""

import pytest
import torch
from torch.library import opcheck

import ctx
from strategies import CLOSE, DTYPES, assert_close, assert_same_bits

B, HKV, H, D, DV, T, C, P = 2, 2, 4, 6, 4, 5, 2, 8
SCHEDULE = ctx.Schedule(4, 3, C, 4, 1)
SETTINGS = (SCHEDULE.numbers, "slot", 4, 10000.0, False)
SCALE = D**-0.5


def drawn(*shape, dtype, grad=False):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def memory(dtype):
    """The tensors of a memory in the middle of a stream."""
    used = ctx.KVMemory(SCHEDULE, B, HKV, D, DV, max_rewind=5, dtype=dtype, rotary_dim=4)
    pairs = [torch.randn(B, HKV, 17, width, dtype=dtype) for width in (D, DV)]
    used.append(*pairs)
    return [tensor.clone() for tensor in used.tensors.values()]


def compressor(dtype, grad=False):
    module = ctx.compression.Conv(HKV, C, D, DV, dtype=dtype)
    return [operand.detach().requires_grad_(grad) for operand in module.operands()], "conv", []


def pairs(dtype, grad=False):
    sizes = (H, D), (HKV, D), (HKV, DV)
    return [drawn(B, heads, T, width, dtype=dtype, grad=grad) for heads, width in sizes]


ROWS = {
    "uniform": (None, None),
    "lengths": (torch.tensor([3, 5]), None),
    "documents": (None, torch.tensor([[False, True, False, False, True], [True] + [False] * 4])),
}


def scores(dtype, grad=False):
    """Bias, slopes, relative positions, as operators that attend take them."""
    sizes = [(H, D), (H, D), (H, D, P), (H, D), (H, D, P)]
    relative = [drawn(*size, dtype=dtype, grad=grad) for size in sizes]
    return drawn(H, dtype=dtype, grad=grad), torch.rand(H, dtype=dtype), relative


def step(dtype, rows, grad):
    operands = (*compressor(dtype), *scores(dtype))
    settings = (*SETTINGS, SCALE, rows == "lengths")
    return (*pairs(dtype, grad), *ROWS[rows], *memory(dtype), *operands, *settings)


def choose(dtype, rows, grad):
    used = ctx.KVMemory(
        SCHEDULE, B, HKV, D, DV, max_rewind=5, dtype=dtype, rotary_dim=4, compressor="most_used"
    )
    used.step(
        *(torch.randn(B, heads, 17, w, dtype=dtype) for heads, w in ((H, D), (HKV, D), (HKV, DV)))
    )
    state = [tensor.clone() for tensor in used.tensors.values()]
    q, k, v = pairs(dtype, grad)
    groups, _, block = torch.ops.ctx.evicted_groups(k, v, *ROWS[rows], state, *SETTINGS)
    rest = (*scores(dtype), *SETTINGS, SCALE, block, groups.shape[2])
    return (q, k, v, *ROWS[rows], *state, *rest)


def append(dtype, rows, grad):
    return (*pairs(dtype, grad)[1:], *ROWS[rows], *memory(dtype), *compressor(dtype), *SETTINGS)


def attend_memory(dtype, rows, grad):
    operands = (None, None, []) if rows == "uniform" else scores(dtype)
    return (pairs(dtype, grad)[0], *memory(dtype), *operands, *SETTINGS, SCALE, True)


MUTATING = {
    "step_": step,
    "append_": append,
    "attend_memory": attend_memory,
    "choose_": choose,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["constant", "requires_grad"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MUTATING)
def test_streaming_operators(name, rows, grad, dtype):
    """Mutation and differentiation never meet: outputs carry no gradient, whatever goes in."""
    operator, arguments = getattr(torch.ops.ctx, name).default, MUTATING[name](dtype, rows, grad)
    with torch.set_grad_enabled(not grad):
        opcheck(operator, arguments)
    for returned in operator(*arguments) or ():
        assert not returned.requires_grad


def rotary(dtype, grad):
    x = drawn(B, H, T, D, dtype=dtype, grad=grad)
    return x, torch.randint(0, 100, (B, T)), 4, 10000.0, False


def compress(dtype, grad):
    keys, values = (drawn(B, HKV, 3, C, width, dtype=dtype, grad=grad) for width in (D, DV))
    return keys, values, *compressor(dtype, grad)[:2]


def attend(dtype, grad, with_region_weights=True, kernels=False):
    """What torch's operators do, or what our kernels do: no relative positions then."""
    q = drawn(B, H, T, D, dtype=dtype, grad=grad)
    spans = []
    for count in (1, 4, 9):
        for width in (D, DV):
            spans.append(drawn(B, HKV, count, width, dtype=dtype, grad=grad))
    numbers = [torch.arange(17, 17 + T).expand(B, T)]
    numbers += [torch.full((B, T), first) for first in (0, 0, 5)]
    bias, slopes, _ = scores(dtype, grad)
    relative = [drawn(B, H, T, P, dtype=dtype, grad=grad) for _ in range(2)]
    positions = torch.randint(0, 12, (B, HKV, SCHEDULE.compressed + 4))
    operands = (None, bias, slopes, None, None) if kernels else (positions, bias, slopes, *relative)
    past = [*memory(dtype)[:4], torch.tensor([[5, 7, 0, 1]]).expand(B, 4)]
    settings = (SETTINGS[0], "token", *SETTINGS[2:], SCALE, past)
    region_weights = (with_region_weights,) if with_region_weights is not None else ()
    return (q, numbers[0], *spans, *numbers[1:], *operands, *settings, *region_weights)


def evicted_groups(dtype, grad):
    return (*pairs(dtype, grad)[1:], *ROWS["lengths"], memory(dtype), *SETTINGS)


def attend_sequence(dtype, grad):
    q, k, v = pairs(dtype, grad)
    keys, values, _ = torch.ops.ctx.evicted_groups(
        k, v, None, ROWS["documents"][1], memory(dtype), *SETTINGS
    )
    slots = keys.mean(3).detach(), values.mean(3).detach(), None
    rows = (None, ROWS["documents"][1], memory(dtype))
    return (q, k, v, *rows, *slots, *scores(dtype, grad), *SETTINGS, SCALE, True)


def take_tokens(dtype, grad):
    ring, sinks = memory(dtype)[0], memory(dtype)[4]
    x, seen, oldest = (
        drawn(B, HKV, T, D, dtype=dtype, grad=grad),
        torch.tensor([9, 3]),
        torch.ones(2),
    )
    return (
        x,
        ring,
        sinks,
        seen,
        oldest.long() * 2,
        torch.tensor([[-9, -5, -1, 0, 4], [-3, -1, 2, 2, 7]]),
    )


FUNCTIONAL = {
    "rotary": rotary,
    "take_tokens": take_tokens,
    "compress": compress,
    "attend": attend,
    "evicted_groups": evicted_groups,
    "attend_sequence": attend_sequence,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["constant", "requires_grad"])
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_operators(name, grad, dtype):
    opcheck(getattr(torch.ops.ctx, name).default, FUNCTIONAL[name](dtype, grad))


@pytest.mark.parametrize("kernels", [False, True])
def test_attend_backward(kernels):
    """The backward is an operator, too."""
    arguments = attend(torch.float64, False, with_region_weights=None, kernels=kernels)
    out, logsumexp, region_weights = torch.ops.ctx.attend(*arguments, True)
    assert_close(region_weights.sum(-1), torch.ones(B, H, T, dtype=torch.float64), 1e-12)
    grads = torch.randn_like(out), torch.randn_like(logsumexp)
    opcheck(torch.ops.ctx.attend_backward.default, (*grads, out, logsumexp, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take_tokens(dtype):
    """A row is the call's, the ring's, a sink's or zero; other devices do the same."""
    x, ring, sinks, seen, oldest, place = arguments = take_tokens(dtype, grad=True)
    x = x.detach()
    taken = torch.ops.ctx.take_tokens(*arguments)
    capacity = ring.shape[2]
    none = torch.zeros(HKV, D, dtype=dtype)
    want = [
        [none, ring[0, :, 4 % capacity], ring[0, :, 8 % capacity], x[0, :, 0], x[0, :, 4]],
        [none, ring[1, :, 2 % capacity], x[1, :, 2], x[1, :, 2], x[1, :, T - 1]],
    ]
    assert_same_bits(taken, torch.stack([torch.stack(rows, 1) for rows in want]))
    sunk = torch.ops.ctx.take_tokens(x, ring, sinks, seen, oldest * 0, place)
    assert_same_bits(sunk[0, :, 0], sinks[0, :, 0])
    grad = torch.randn_like(taken)
    backward = torch.ops.ctx.take_tokens_backward
    opcheck(backward.default, (grad, place, T))
    [got] = torch.autograd.grad(taken, arguments[0], grad)
    outside = torch.zeros_like(x)
    outside[0, :, 0], outside[0, :, 4] = grad[0, :, 3], grad[0, :, 4]
    outside[1, :, 2] = grad[1, :, 2] + grad[1, :, 3]
    assert_same_bits(got, outside)
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    for operator, given, here in (
        (torch.ops.ctx.take_tokens.default, (x, *arguments[1:]), taken),
        (backward.default, (grad, place, T), got),
    ):
        assert_close(operator._op_dk(key, *given), here.detach(), CLOSE[dtype])


def test_none_is_left_out():
    """Every operator of the library is checked above."""
    names = {
        schema.name.removeprefix("ctx::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("ctx::")
    }
    assert names == {*MUTATING, *FUNCTIONAL, "attend_backward", "take_tokens_backward"}
