"""Mass of slots: where compression must change nothing, by hand elsewhere, and its gradients.

`test_reference_settings.py` compares it with sums written out.
"""

import math
from functools import partial

import pytest
import torch

import ctx
from ctx import reference
from strategies import (
    COMPRESSORS,
    POOLING,
    assert_close,
    assert_same_bits,
)

F64 = torch.float64


def repeated(x, times):
    """Every token of x [B, heads, T, d] so many times."""
    return x.repeat_interleave(times, 2)


@pytest.mark.parametrize("name", POOLING)
@pytest.mark.parametrize("cap", [None, 0.8])
def test_equal_tokens_lose_nothing(name, cap):
    """c equal tokens count as c: their slot with mass log c stands for all of them."""
    ratio, length = 3, 24
    start = reference.initial_parameters(name, 1, ratio, 4, 2, F64)
    q = torch.randn(1, 2, length, 4, dtype=F64)
    k, v = (repeated(torch.randn(1, 1, length // ratio, d, dtype=F64), ratio) for d in (4, 2))
    compressor = partial(reference.COMPRESSORS[name], **start)
    options = {"position": None, "logit_softcap": cap}
    run = partial(reference.attend, q, k, v, **options)
    exact = run(reference.Schedule(length, 0, 1))
    law = reference.Schedule(0, length, ratio, 6)
    assert_close(run(law, compressor=compressor, slot_mass=True), exact, 1e-12)
    assert not torch.allclose(run(law, compressor=compressor), exact, atol=1e-3)


def test_mass_is_exact_for_the_gate_of_the_query():
    """With weights softmax(scores) a slot's score plus H(w) is the log-sum-exp of its tokens'
    scores: the slot replaces them in every softmax.
    """
    q = torch.randn(1, 1, 1, 4, dtype=F64).expand(1, 1, 12, 4)
    k, v = torch.randn(2, 1, 1, 12, 4, dtype=F64)
    gate = 4**-0.5 * q[0, :, 0]
    place = torch.zeros(1, 3, dtype=F64)
    gated = partial(
        reference.gated, key_gate=gate, key_position=place, value_gate=gate, value_position=place
    )
    run = partial(reference.attend, q, k, v, position=None)
    got = run(reference.Schedule(0, 4, 3), compressor=gated, slot_mass=True)
    assert_close(got, run(reference.Schedule(12, 0, 1)), 1e-12)


def test_one_token_has_mass_zero():
    """c = 1, and slots of "most_used"."""
    q, k, v = (torch.randn(1, 1, 20, 4, dtype=F64) for _ in range(3))
    for ratio, names in ((1, COMPRESSORS), (3, ["most_used"])):
        for name in names:
            run = partial(reference.attend, q, k, v, reference.Schedule(2, 3, ratio))
            assert_close(run(compressor=name, slot_mass=True), run(compressor=name), 1e-12)


@pytest.mark.parametrize("name", ["mean", "max", "conv", "dilated"])
def test_mass_of_these_is_the_log_ratio(name):
    q, k, v = (torch.randn(1, 1, 20, 4, dtype=F64) for _ in range(3))
    run = partial(reference.attend, q, k, v, reference.Schedule(2, 3, 3), compressor=name)
    assert_same_bits(run(slot_mass=True), run(compressed_bias="log_ratio"))


def test_mass_of_a_custom_compressor():
    """The third output, log c where there are two."""
    q, k, v = (torch.randn(1, 1, 20, 4, dtype=F64) for _ in range(3))

    def two(keys, values):
        return keys[..., 0, :], values[..., 0, :]

    def three(keys, values):
        return *two(keys, values), keys[..., 0, 0]

    run = partial(reference.attend, q, k, v, reference.Schedule(2, 3, 3), slot_mass=True)
    plain = partial(reference.attend, q, k, v, reference.Schedule(2, 3, 3))
    assert_same_bits(run(compressor=two), plain(compressor=two, compressed_bias="log_ratio"))
    group = [list(x[:, :, :3].unbind(2)) for x in (k, v)]
    assert reference.compress_group(three, *group, 3).mass.tolist() == k[:, :, 0, 0].tolist()
    shifted = partial(plain, compressor=two)
    assert not torch.allclose(run(compressor=three), shifted(compressed_bias="log_ratio"))


# --- gradients, state, losses ---------------------------------------------------------------------


def test_gradients_reach_the_gate_through_the_mass():
    k = torch.randn(1, 1, 9, 2, dtype=F64, requires_grad=True)
    q, v = torch.randn(2, 1, 1, 9, 2, dtype=F64)
    start = reference.initial_parameters("gated", 1, 3, 2, 2, F64)
    gate, place = (torch.randn_like(start[f"key_{x}"]) for x in ("gate", "position"))
    gate, place = gate.requires_grad_(), place.requires_grad_()

    def run(k, gate, place):
        own = {**start, "key_gate": gate, "key_position": place}
        return reference.attend(
            q,
            k,
            v,
            reference.Schedule(1, 3, 3),
            compressor=partial(reference.gated, **own),
            slot_mass=True,
            logit_softcap=2.0,
            attention_factor=1.2,
            inv_freq=[0.7],
        )

    assert torch.autograd.gradcheck(run, (k, gate, place))
    grads = torch.autograd.grad(run(k, gate, place).square().sum(), (k, gate, place))
    assert all(grad.abs().max() > 0 for grad in grads)


def test_mass_of_a_closed_gate_has_a_gradient():
    """A weight that underflows to zero adds nothing to the entropy, and no NaN to gradients."""
    keys = torch.zeros(1, 1, 1, 2, 2, dtype=F64)
    place = torch.tensor([[0.0, -2000.0]], dtype=F64, requires_grad=True)
    zero = torch.zeros(1, 2, dtype=F64)
    _, _, mass = reference.gated(keys, keys, zero, place, zero, zero)
    (grad,) = torch.autograd.grad(mass.sum(), place)
    assert mass.item() == 0 and grad.abs().max() == 0


@pytest.mark.parametrize("grad", ["task", "aux"])
def test_mass_is_constant_where_slots_are(grad):
    start = reference.initial_parameters("gated", 1, 3, 4, 4, F64)
    gate = torch.randn(1, 3, dtype=F64, requires_grad=True)
    compressor = partial(reference.gated, **{**start, "key_position": gate})
    q, k, v = (torch.randn(1, 1, 9, 4, dtype=F64, requires_grad=True) for _ in range(3))
    out = reference.attend(
        q,
        k,
        v,
        reference.Schedule(0, 3, 3),
        compressor=compressor,
        compressor_grad=grad,
        slot_mass=True,
    )
    (reached,) = torch.autograd.grad(out.square().sum(), gate, allow_unused=True)
    assert (reached is None) == (grad == "aux")


def test_mass_stands_beside_the_slot():
    """In a ring of its own, at the slot's place; rows, copies and rewinding keep it."""
    start = reference.initial_parameters("gated", 2, 3, 4, 4, F64)
    start["key_position"] = torch.randn(2, 3, dtype=F64)
    law = reference.Schedule(2, 2, 3)
    memory = reference.KVMemory(
        law,
        2,
        2,
        4,
        compressor=partial(reference.gated, **start),
        slot_mass=True,
        dtype=F64,
        max_rewind=4,
    )
    memory.append(*torch.randn(2, 2, 2, 14, 4, dtype=F64))
    rings = memory.tensors
    assert rings["slot_mass"].shape == rings["compressed_keys"].shape[:3]
    entropy = torch.special.entr(start["key_position"].softmax(-1)).sum(-1)
    capacity = rings["slot_mass"].shape[2]
    for g in range(law.groups(13) - 2, law.groups(13)):
        assert_close(rings["slot_mass"][0, :, g % capacity], entropy, 1e-12)
    one = memory.select([1])
    one.rewind([2])
    one.append(*torch.randn(2, 1, 2, 2, 4, dtype=F64))
    assert_same_bits(one.tensors["slot_mass"], rings["slot_mass"][1:])


def test_reconstruction_counts_mass():
    """Slots of pairs of equal tokens: no error with equal masses, and by hand with others."""
    law = reference.Schedule(0, 4, 2, 6)
    k, v = (repeated(torch.randn(1, 1, 3, 4, dtype=F64), 2)[0] for _ in range(2))
    q = torch.randn(2, 6, 4, dtype=F64)
    loss = partial(reference.attention_reconstruction, q, k, v, law)
    gated = partial(
        reference.gated,
        key_gate=torch.zeros(1, 4, dtype=F64),
        key_position=torch.zeros(1, 2, dtype=F64),
        value_gate=torch.zeros(1, 4, dtype=F64),
        value_position=torch.zeros(1, 2, dtype=F64),
    )
    assert loss(gated, slot_mass=True)[0] < 1e-24

    def other_mass(keys, values):
        key, value = reference.mean(keys, values)
        return key, value, torch.log(1 + keys[..., 0, 0].abs())

    with_mass, without = loss(other_mass, slot_mass=True)[0], loss(other_mass)[0]
    assert without < 1e-24 < with_mass
    by_hand = []
    for t in range(6):
        for h in range(2):
            scores = [float(q[h, t] @ k[0, 2 * g]) / 2 for g in range(3)]
            counts = [1 + abs(float(k[0, 2 * g, 0])) for g in range(3)]
            powers = [math.exp(score) for score in scores]
            counted = [p * count for p, count in zip(powers, counts, strict=True)]
            want = sum(p * v[0, 2 * g] for g, p in enumerate(powers)) / sum(powers)
            got = sum(p * v[0, 2 * g] for g, p in enumerate(counted)) / sum(counted)
            by_hand.append((got - want).square().mean())
    assert math.isclose(with_mass, sum(by_hand) / len(by_hand), rel_tol=1e-12)


@pytest.mark.parametrize("content", ["kv", "hidden"])
def test_layer_with_mass(content):
    """A gate that is the same for all groups gives every slot the mass H, as a bias would."""
    torch.manual_seed(0)
    attn = ctx.CompressiveAttention(
        8, 2, 2, window=0, compressed=4, ratio=2, compressor="gated", memory_content=content
    ).double()
    weights = {name: x.detach().clone() for name, x in attn.named_parameters()}
    weights.pop("compressed_bias", None)
    place = weights["compressor.key_position"]
    place += torch.randn(place.shape[1], dtype=F64)  # the same for all heads
    entropy = torch.special.entr(place[0].softmax(-1)).sum()
    x = torch.randn(2, 11, 8, dtype=F64)
    run = partial(
        reference.compressive_attention,
        x,
        schedule=reference.Schedule(0, 4, 2),
        num_heads=2,
        compressor="gated",
        memory_content=content,
    )
    bias = entropy.expand(2)
    want = run({**weights, "compressed_bias": bias})
    assert_close(run(weights, slot_mass=True), want, 1e-12)
