"""Derivatives beyond the first reverse one: second and third, forward mode, torch.func. Each has
its value, by finite differences, or is refused by name."""

import itertools
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck

import ctx
from strategies import COMPRESSORS

F64 = torch.float64
SIZES = {"window": 3, "compressed": 2, "ratio": 2, "sinks": 1}
ROWS = ["fresh", "carried", "padded", "documents"]
# position, compressor, memory content, distance, and how rows are laid out: every two of them meet,
# and every three of the first.
KINDS = [
    (
        *(position, compressor, content),
        *("token" if (i + j) % 2 else "slot", ROWS[(i + j // 2 + 2 * k) % len(ROWS)]),
    )
    for (i, position), (j, compressor), (k, content) in itertools.product(
        *(enumerate(["rotary", "relative", "alibi", None]), enumerate(COMPRESSORS)),
        enumerate(["kv", "hidden"]),
    )
    if not (content == "hidden" and compressor == "most_used")
]
WALK = pytest.mark.parametrize("position, compressor, content, distance, rows", KINDS)


def test_every_two_meet():
    """What is left out of the product is only the meeting of three."""
    for a, b in itertools.combinations(range(5), 2):
        met = {(kind[a], kind[b]) for kind in KINDS}
        product = itertools.product(*({kind[i] for kind in KINDS} for i in (a, b)))
        assert set(product) - met <= {("most_used", "hidden")}


def layer(position: Any, compressor: str, content: str, distance: str, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "position": position,
        "compressor": compressor,
        "memory_content": content,
        "distance": distance,
        "rotary_interleaved": distance == "token",
    }
    made = ctx.CompressiveAttention(4, 2, 1, **SIZES, **(options | changes), dtype=F64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def call_of(attention: Any, rows: str) -> tuple[Any, dict[str, Any]]:
    """A memory and the options of a call, for one way in which rows can be laid out."""
    if rows == "fresh":
        return None, {}
    with torch.no_grad():
        carried = attention(torch.randn(2, 7, 4, dtype=F64))[1]
    options: dict[str, dict[str, Any]] = {
        "carried": {},
        "padded": {"lengths": torch.tensor([8, 5])},
        "documents": {"reset_at": torch.eye(2, 8, dtype=torch.bool)},
    }
    return carried, options[rows]


def copy(memory: Any) -> Any:
    return None if memory is None else memory.clone()


@WALK
def test_second_derivatives(position, compressor, content, distance, rows):
    """With respect to inputs and parameters, over a carried memory."""
    attention = layer(position, compressor, content, distance)
    names, values = zip(*attention.named_parameters(), strict=True)
    memory, options = call_of(attention, rows)

    def run(x, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, weights, (x, memory), options)[0].sin()

    x = torch.randn(2, 8, 4, dtype=F64, requires_grad=True)
    assert gradgradcheck(run, (x, *values), fast_mode=True, atol=1e-6)


def test_the_smallest_gradient_penalty():
    """One layer, two tokens: the penalty's gradient, by finite differences in every number."""
    attention = ctx.CompressiveAttention(4, 1, window=4, compressed=2, ratio=2).double()

    def penalty(x):
        value = attention(x)[0].sin().sum()
        return torch.autograd.grad(value, x, create_graph=True)[0].square().sum()

    x = torch.randn(1, 2, 4, dtype=F64, requires_grad=True)
    gradient = torch.autograd.grad(penalty(x), x)[0]
    assert gradient.abs().max() > 1e-4
    assert gradcheck(penalty, (x,))


def test_third_derivatives():
    attention = layer("relative", "gated", "kv", "slot")

    def slope(x):
        value = attention(x)[0].sin().sum()
        return torch.autograd.grad(value, x, create_graph=True)[0].sin()

    x = torch.randn(1, 5, 4, dtype=F64, requires_grad=True)
    assert gradgradcheck(slope, (x,), fast_mode=True, atol=1e-6)


def test_a_gradient_of_zero_has_derivatives():
    """The product of a Jacobian and a vector by two backwards, the first of them at zero."""
    attention = layer("rotary", "conv", "kv", "slot")
    x = torch.randn(1, 6, 4, dtype=F64, requires_grad=True)
    direction = torch.randn_like(x)
    y = attention(x)[0]
    zero = torch.zeros_like(y, requires_grad=True)
    (back,) = torch.autograd.grad(y, x, zero, create_graph=True)
    (product,) = torch.autograd.grad(back, zero, direction)
    step = 1e-6 * direction
    with torch.no_grad():
        expected = (attention(x + step)[0] - attention(x - step)[0]) / 2e-6
    torch.testing.assert_close(product, expected, atol=1e-8, rtol=1e-6)


@WALK
def test_forward_mode(position, compressor, content, distance, rows):
    """Under grad and without, where the memory is written in place as if there were no tangent."""
    attention = layer(position, compressor, content, distance)
    memory, options = call_of(attention, rows)

    def run(x):
        return attention(x, copy(memory), **options)[0]

    x = torch.randn(2, 8, 4, dtype=F64)
    tangent = torch.randn_like(x)
    with torch.no_grad():
        expected = (run(x + 1e-6 * tangent) - run(x - 1e-6 * tangent)) / 2e-6
        after = attention(x, copy(memory), **options)[1]
    for grad in (True, False):
        given = copy(memory)
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            dual, written = attention(forward_ad.make_dual(x, tangent), given, **options)
            got = forward_ad.unpack_dual(dual).tangent
            torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-6)
        if given is not None and not grad:
            assert written is given
        for name, part in after.tensors.items():
            torch.testing.assert_close(written[name], part, atol=1e-12, rtol=1e-12)


@WALK
def test_forward_mode_in_the_parameters(position, compressor, content, distance, rows):
    """Tangents of weights, biases of slots and relative positions, with and without writing."""
    attention = layer(position, compressor, content, distance)
    values = {name: x.detach() for name, x in attention.named_parameters()}
    tangents = {name: torch.randn_like(x) for name, x in values.items()}
    memory, options = call_of(attention, rows)
    x = torch.randn(2, 8, 4, dtype=F64)

    def run(weights, update=True):
        given = {**options, "update": update}
        return torch.func.functional_call(attention, weights, (x, copy(memory)), given)[0]

    def moved(step):
        return {name: w + step * tangents[name] for name, w in values.items()}

    with torch.no_grad():
        expected = (run(moved(1e-6)) - run(moved(-1e-6))) / 2e-6
    for grad, update in itertools.product((True, False), (True, False)):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(w, tangents[n]) for n, w in values.items()}
            got = forward_ad.unpack_dual(run(duals, update)).tangent
            torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("position", ["rotary", "relative", "alibi", None])
def test_transforms(position):
    """torch.func's derivatives are those of autograd."""
    attention = layer(position, "gated", "kv", "slot")

    def run(x):
        return attention(x)[0].sin().sum()

    x = torch.randn(1, 6, 4, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(run(x), x, create_graph=True)
    torch.testing.assert_close(torch.func.grad(run)(x.detach()), gradient)
    rows = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in gradient.flatten()]
    hessian = torch.stack([row.flatten() for row in rows])
    found = torch.func.hessian(run)(x.detach()).reshape(hessian.shape)
    torch.testing.assert_close(found, hessian)
    value, product = torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(value, run(x))
    torch.testing.assert_close(product, gradient.sum())


def test_a_model_learns_to_learn():
    """One step of MAML: the gradient through an inner step is that of finite differences."""
    config = ctx.CompressiveTransformerConfig(
        vocab_size=7, embed_dim=4, num_layers=2, num_heads=2, **SIZES
    )
    model = ctx.CompressiveTransformer(config).double()
    names, values = zip(*model.named_parameters(), strict=True)
    tokens = torch.randint(7, (2, 9))

    def loss(parameters):
        weights = dict(zip(names, parameters, strict=True))
        logits, _ = torch.func.functional_call(model, weights, (tokens[:, :-1],))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def outer(*parameters):
        slopes = torch.autograd.grad(loss(parameters), parameters, create_graph=True)
        return loss([p - 0.5 * s for p, s in zip(parameters, slopes, strict=True)])

    assert gradcheck(outer, values, fast_mode=True, atol=1e-6)


def test_what_writes_refuses_a_tangent():
    """KVMemory records nothing; its operators say so, and nothing has been written."""
    memory = ctx.KVMemory(ctx.Schedule(3, 2, 2), 1, 1, 4, dtype=F64)
    before = {name: x.clone() for name, x in memory.tensors.items()}
    q, k, v = torch.randn(3, 1, 1, 2, 4, dtype=F64)
    refused = pytest.raises(NotImplementedError, match=r"forward AD with ctx::(step_|append_|att)")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(k, torch.ones_like(k))
        for call in (
            lambda: memory.step(q, dual, v),
            lambda: memory.step(q, k, dual),
            lambda: memory.step(dual, k, v),
            lambda: memory.append(dual, v),
        ):
            with refused:
                call()
        for name, part in memory.tensors.items():
            torch.testing.assert_close(part, before[name], rtol=0, atol=0)
        memory.append(k, v)
        with refused:
            memory.attend(dual)
