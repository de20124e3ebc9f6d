"""Every operator under torch.library.opcheck: schema, autograd, shapes, and compiled graphs."""

import dataclasses

import pytest
import torch
from torch.library import opcheck

import ctx
from ctx import engine
from ctx.state import TENSORS
from pairwise import pairwise
from strategies import DTYPES, assert_close

B, HKV, H, D, DV, T, C, P = 2, 2, 4, 6, 4, 5, 2, 8
SCHEDULE = ctx.Schedule(4, 3, C, 4, 1)
SETTINGS = ctx.AttentionSettings(
    schedule=SCHEDULE, rotary_dim=4, slot_mass=True, logit_softcap=3.0, attention_factor=1.25
).resolved(D)


def law(compressor="conv", **changes):
    """What operators take of the settings: two lists."""
    return engine.law_of(dataclasses.replace(SETTINGS, **changes), compressor, D, 0)


def drawn(*shape, dtype, grad=False):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def memory(dtype, compressor="mean", **options):
    """The rings of a memory in the middle of a stream, and `seen`."""
    options = {"max_rewind": 5, "dtype": dtype, "compressor": compressor, **options}
    used = ctx.KVMemory(SETTINGS, B, HKV, D, DV, **options)
    used.step(*(torch.randn(B, n, 17, w, dtype=dtype) for n, w in ((H, D), (HKV, D), (HKV, DV))))
    rings = [used.tensors[name].clone() for name in TENSORS]
    return rings, used.seen.clone()


def parameters(dtype, grad=False):
    module = ctx.compression.Conv(HKV, C, D, DV, dtype=dtype)
    return [operand.detach().requires_grad_(grad) for operand in module.operands()]


def pairs(dtype, grad=False):
    sizes = (H, D), (HKV, D), (HKV, DV)
    return [drawn(B, heads, T, width, dtype=dtype, grad=grad) for heads, width in sizes]


ROWS = {
    "uniform": (None, None),
    "lengths": (torch.tensor([3, 5]), None),
    "documents": (None, torch.tensor([[False, True, False, False, True], [True] + [False] * 4])),
}


def plan(seen, rows, settings, carried=True):
    return torch.ops.ctx.plan(seen, *ROWS[rows], T, settings, carried)


def scores(dtype, grad=False):
    """Bias, slopes, relative positions, as operators that attend take them."""
    sizes = [(H, D), (H, D), (H, D, P), (H, D), (H, D, P)]
    relative = [drawn(*size, dtype=dtype, grad=grad) for size in sizes]
    return drawn(H, dtype=dtype, grad=grad), torch.rand(H, dtype=dtype), relative


def step(dtype, rows, grad):
    rings, seen = memory(dtype)
    packed = law()
    call = plan(seen, rows, packed.settings)
    operands = (parameters(dtype), *scores(dtype))
    return (*pairs(dtype, grad), call, rings, *operands, *packed, rows == "lengths")


def choose(dtype, rows, grad):
    """Slots that are tokens: which ones is an output, too."""
    rings, seen = memory(dtype, "most_used")
    packed = law("most_used")
    call = plan(seen, rows, packed.settings)
    return (*pairs(dtype, grad), call, rings, [], *scores(dtype), *packed, False)


def read(dtype, rows, grad):
    """Queries of what is in the memory: no new tokens."""
    rings, seen = memory(dtype)
    packed = law()
    q, k, v = pairs(dtype, grad)
    call = torch.ops.ctx.plan(seen - T, None, None, T, packed.settings, True)
    operands = (None, None, []) if rows == "uniform" else scores(dtype)
    return (q, k[:, :, :0], v[:, :, :0], call, rings, [], *operands, *packed, True)


def append(dtype, rows, grad):
    rings, seen = memory(dtype)
    packed = law()
    call = plan(seen, rows, packed.settings)
    return (*pairs(dtype, grad)[1:], call, rings, parameters(dtype), *packed)


def append_given(dtype, rows, grad):
    """Slots that the caller made."""
    rings, seen = memory(dtype)
    packed = law("custom")
    call = plan(seen, rows, packed.settings)
    k, v = pairs(dtype, grad)[1:]
    keys, values = torch.ops.ctx.evicted_groups(k, v, call, rings, *packed)
    slots = [x.detach().mean(3) for x in (keys, values)]
    return k, v, call, rings, [*slots, torch.rand(slots[0].shape[:3])], *packed


#: Quick checks of opcheck; what is left, graphs of symbolic shapes, takes a second for each case.
EAGER = ("test_schema", "test_autograd_registration", "test_faketensor")
GRADS = {"constant": False, "requires_grad": True}


def checked(operator, arguments, symbolic):
    """opcheck, with graphs of symbolic shapes or without."""
    opcheck(operator, arguments, **({} if symbolic else {"test_utils": EAGER}))


MUTATING = {
    "step": ("step_", step),
    "choose": ("step_", choose),
    "read": ("step_", read),
    "append": ("append_", append),
    "append given": ("append_", append_given),
}


SYMBOLIC = pairwise(MUTATING, ROWS, GRADS.values(), DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MUTATING)
def test_streaming_operators(name, rows, grad, dtype):
    """Mutation and differentiation never meet: outputs carry no gradient, whatever goes in."""
    operator, made = MUTATING[name]
    operator, arguments = getattr(torch.ops.ctx, operator).default, made(dtype, rows, grad)
    with torch.set_grad_enabled(not grad):
        checked(operator, arguments, (name, rows, grad, dtype) in SYMBOLIC)
    for returned in operator(*arguments) or ():
        assert not returned.requires_grad


def rotary(dtype, grad):
    x = drawn(B, H, T, D, dtype=dtype, grad=grad)
    return x, torch.randint(0, 100, (B, T)), *law()


def compress(dtype, grad):
    keys, values = (drawn(B, HKV, 3, C, width, dtype=dtype, grad=grad) for width in (D, DV))
    return keys, values, parameters(dtype, grad), "conv", C


def attend(dtype, grad, rows="documents", compressor="mean", memory_grads=False):
    rings, seen = memory(dtype, compressor)
    if memory_grads:
        rings = [x.requires_grad_() if i < 6 else x for i, x in enumerate(rings)]
    packed = law(compressor)
    call = plan(seen, rows, packed.settings)
    q, k, v = pairs(dtype, grad)
    with torch.no_grad():
        keys, values = torch.ops.ctx.evicted_groups(k, v, call, rings, *packed)
    slots = [x.mean(3).requires_grad_(grad) for x in (keys, values)]
    slots.append(torch.rand(keys.shape[:3]).to(keys.dtype).requires_grad_(grad))
    if compressor == "most_used":
        slots.append(torch.randint(0, 12, keys.shape[:3]))
    return (q, k, v, call, rings, slots, *scores(dtype, grad), *packed, True)


def attend_tokens(dtype, grad):
    """Slots that are tokens with their own distances, which torch's operators compute."""
    arguments = [*attend(dtype, grad, compressor="most_used")]
    arguments[9] = law("most_used", distance="token").settings
    return tuple(arguments)


def attend_inputs(dtype, grad):
    """A memory that was made out of something else."""
    return attend(dtype, grad, memory_grads=grad)


def evicted_groups(dtype, grad, keys="plain"):
    rings, seen = memory(dtype)
    packed = law(keys=keys)
    return (*pairs(dtype, grad)[1:], plan(seen, "lengths", packed.settings), rings, *packed)


def evicted_rotated(dtype, grad):
    return evicted_groups(dtype, grad, "rotated")


FUNCTIONAL = {
    "rotary": ("rotary", rotary),
    "compress": ("compress", compress),
    "attend": ("attend", attend),
    "attend tokens": ("attend", attend_tokens),
    "attend inputs": ("attend", attend_inputs),
    "evicted_groups": ("evicted_groups", evicted_groups),
    "evicted rotated": ("evicted_groups", evicted_rotated),
}


SYMBOLIC_FUNCTIONAL = pairwise(FUNCTIONAL, GRADS.values(), DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_operators(name, grad, dtype):
    operator, made = FUNCTIONAL[name]
    symbolic = (name, grad, dtype) in SYMBOLIC_FUNCTIONAL
    checked(getattr(torch.ops.ctx, operator).default, made(dtype, grad), symbolic)


def attend_backward(dtype, made=attend, memory_grads=False):
    *arguments, _ = made(dtype, False)
    out, logsumexp, _ = torch.ops.ctx.attend(*arguments, True)
    grads = torch.randn_like(out), torch.randn_like(logsumexp)
    return (*grads, out, logsumexp, *arguments, memory_grads)


@pytest.mark.parametrize("memory_grads", [False, True])
@pytest.mark.parametrize("made", [attend, attend_tokens])
def test_attend_backward(made, memory_grads):
    """The backward is an operator, too."""
    arguments = attend_backward(torch.float64, made, memory_grads)
    opcheck(torch.ops.ctx.attend_backward.default, arguments)


@pytest.mark.parametrize("made", [attend, attend_tokens])
def test_region_weights(made):
    *arguments, _ = made(torch.float64, False)
    region_weights = torch.ops.ctx.attend(*arguments, True)[2]
    assert_close(region_weights.sum(-1), torch.ones(B, H, T, dtype=torch.float64), 1e-12)


def evicted_groups_backward(dtype, keys="plain"):
    k, v, call, _, *packed = evicted_groups(dtype, False, keys)
    groups = torch.ops.ctx.evicted_groups(k, v, call, [], *packed)
    grads = [torch.randn_like(x) for x in groups]
    return (*grads, call, T, dtype, *packed)


@pytest.mark.parametrize("keys", ["plain", "rotated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evicted_groups_backward(dtype, keys):
    operator = torch.ops.ctx.evicted_groups_backward.default
    opcheck(operator, evicted_groups_backward(dtype, keys))


def clock(carried):
    """seen and rewindable."""
    both = ([29, 3], [5, 3]) if carried else ([0, 0], [0, 0])
    return tuple(map(torch.tensor, both))


def planned(rows, carried):
    """The arguments of ctx::plan."""
    return (clock(carried)[0], *ROWS[rows], T, law().settings, carried)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_plan(rows, carried):
    """One plan, whatever device makes it; and what advance_ makes of it."""
    seen, rewindable = clock(carried)
    arguments = planned(rows, carried)
    opcheck(torch.ops.ctx.plan.default, arguments)
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    made = torch.ops.ctx.plan(*arguments)
    assert torch.equal(torch.ops.ctx.plan.default._op_dk(key, *arguments), made)
    clocks = [(seen.clone(), rewindable.clone()) for _ in range(3)]
    opcheck(torch.ops.ctx.advance_.default, (*clocks[0], made, 5))
    torch.ops.ctx.advance_(*clocks[1], made, 5)
    torch.ops.ctx.advance_.default._op_dk(key, *clocks[2], made, 5)
    assert torch.equal(torch.stack(clocks[1]), torch.stack(clocks[2]))
    after = {"uniform": seen + 5, "lengths": seen + torch.tensor([3, 5])}
    want = after.get(rows, torch.tensor([1, 5]))
    assert torch.equal(clocks[1][0], want)


def test_plan_of_some_rows():
    """One that names the memory's rows that a call works on."""
    chosen = torch.tensor([1])
    reset_at = ROWS["documents"][1][:1]
    arguments = (clock(True)[0], None, reset_at, T, law().settings, True, chosen)
    opcheck(torch.ops.ctx.plan.default, arguments)
    seen, rewindable = clock(True)
    made = torch.ops.ctx.plan(*arguments)
    opcheck(torch.ops.ctx.advance_.default, (seen.clone(), rewindable.clone(), made, 5))
    torch.ops.ctx.advance_(seen, rewindable, made, 5)
    assert seen.tolist() == [29, 1]


def schemas():
    return [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("ctx::")]


def test_none_is_left_out():
    """Every operator of the library is checked above."""
    names = {schema.name.removeprefix("ctx::") for schema in schemas()}
    checked = {operator for operator, _ in (*MUTATING.values(), *FUNCTIONAL.values())}
    assert names == {*checked, "plan", "advance_", "attend_backward", "evicted_groups_backward"}


def test_operators_are_few_and_short():
    """At most ten operators of at most a dozen arguments each, backward ones apart."""
    found = schemas()
    assert len(found) <= 10
    for schema in found:
        most = 17 if schema.name.endswith("_backward") else 12
        assert len(schema.arguments) <= most, schema.name
