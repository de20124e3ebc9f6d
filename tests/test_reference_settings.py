"""Frequencies, rotated keys, the soft-cap and mass together: the reference against sums written
out one score at a time, and whole streams against streaming.
"""

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctx import reference
from ctx.reference.compression import is_by_usage, overlap
from strategies import (
    assert_close,
    assert_same_bits,
    cases,
    cuts,
    lengths,
    memories,
    stream,
)

F64 = torch.float64


@st.composite
def settings_of(draw, setting):
    """The options of a drawn memory, with those that this file is about."""
    options = {**setting.options, **setting.scheme(reference, F64)}
    options["slot_mass"] = draw(st.booleans())
    if options["slot_mass"]:
        options["compressed_bias"] = "none"
    if setting.bias_per_head:
        options["compressed_bias"] = setting.random([setting.heads], F64, 1).tolist()
    options["logit_softcap"] = draw(st.sampled_from([None, 0.7, 3.0]))
    if options["position"] == "rotary":
        width = options["rotary_dim"] or setting.head_dim
        number = st.floats(0, 2, allow_nan=False)
        numbers = st.lists(number, min_size=width // 2, max_size=width // 2)
        options["inv_freq"] = draw(st.none() | numbers)
        options["attention_factor"] = draw(st.sampled_from([1.0, 0.8, 1.3]))
    return options


def with_rotation(x, options):
    """x [B, Hkv, T, D], each token rotated to its number."""
    rotary = reference.Settings(**options).rotary
    return torch.stack([rotary.rotate(x[:, :, t], t) for t in range(x.shape[2])], 2)


# --- one score at a time --------------------------------------------------------------------------


def pairs_of(x, options):
    """A vector [D] as complex numbers, one per pair of channels, and the channels left over."""
    width = len(x) if options["rotary_dim"] is None else options["rotary_dim"]
    numbers, half = x.tolist(), width // 2
    if options["rotary_interleaved"]:
        pairs = [complex(numbers[2 * i], numbers[2 * i + 1]) for i in range(half)]
    else:
        pairs = [complex(numbers[i], numbers[half + i]) for i in range(half)]
    return pairs, numbers[width:]


def rotary_product(query, key, distance, options):
    """q . k, the query rotated by the distance, cosines and sines of both times the factor."""
    queries, query_rest = pairs_of(query, options)
    keys, key_rest = pairs_of(key, options)
    frequencies = options["inv_freq"]
    if frequencies is None:
        count = len(queries)
        frequencies = [options["rotary_base"] ** (-i / count) for i in range(count)]
    total = sum(a * b for a, b in zip(query_rest, key_rest, strict=True))
    for a, b, frequency in zip(queries, keys, frequencies, strict=True):
        rotated = a * cmath.exp(1j * frequency * distance)
        total += options["attention_factor"] ** 2 * (rotated * b.conjugate()).real
    return total


def gate_entropy(keys, gate, position):
    """-sum w log w of the weights exp(x . u + p) / sum."""
    powers = [math.exp(float(x @ gate) + float(p)) for x, p in zip(keys, position, strict=True)]
    weights = [power / sum(powers) for power in powers]
    return -sum(weight * math.log(weight) for weight in weights)


def slow_mass(setting, keys, kv):
    """Mass of the slot of tokens with these keys [c, D]."""
    if setting.compressor != "gated":
        return math.log(setting.ratio)
    own = setting.parameters(F64)
    return gate_entropy(keys, own["key_gate"][kv], own["key_position"][kv])


def slow_attention(setting, options, compress, q, k, v):
    """[B, H, T, Dv] by the definitions, for positions "rotary" and None."""
    law, scale = setting.law(), setting.options["scale"] or setting.head_dim**-0.5
    left = overlap(compress, setting.ratio)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=F64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            for t in range(q.shape[2]):
                sinks, groups, tokens = law.visible(t)
                distances = law.distances(t, options["distance"])
                rows = [(k[b, kv, j], v[b, kv, j], 0.0) for j in sinks]
                for g in groups:
                    members = range(law.members(g)[0] - left, law.members(g)[-1] + 1)
                    zero = [torch.zeros_like(x[:1, :, 0]) for x in (k, v)]
                    group = [
                        [x[b : b + 1, :, j] if j >= 0 else none for j in members]
                        for x, none in zip((k, v), zero, strict=True)
                    ]
                    slot = reference.compress_group(compress, *group, setting.ratio)
                    extra = 0.0
                    if options["slot_mass"]:
                        extra += slow_mass(setting, k[b, kv, list(law.members(g))], kv)
                    bias = options["compressed_bias"]
                    if bias == "log_ratio":
                        extra += math.log(setting.ratio)
                    elif bias != "none":
                        extra += bias[h]
                    rows.append((slot.key[0, kv], slot.value[0, kv], extra))
                rows += [(k[b, kv, j], v[b, kv, j], 0.0) for j in tokens]
                powers = []
                for (key, _, extra), distance in zip(rows, distances, strict=True):
                    if options["position"] == "rotary":
                        score = scale * rotary_product(q[b, h, t], key, distance, options)
                    else:
                        score = scale * float(q[b, h, t] @ key)
                    if cap := options["logit_softcap"]:
                        score = cap * math.tanh(score / cap)
                    powers.append(math.exp(score + extra))
                mixed = [p * value for p, (_, value, _) in zip(powers, rows, strict=True)]
                out[b, h, t] = sum(mixed) / sum(powers)
    return out


@cases(40)
@given(st.data())
def test_equals_sums_written_out(data):
    """Mass of every compressor, any frequencies and factor, cap, rotated keys."""
    setting = data.draw(memories(positions=["rotary", "rotary", None], by_usage=False, plain=True))
    options = data.draw(settings_of(setting))
    length = data.draw(st.integers(1, 24))
    q, k, v = setting.inputs(length, F64)
    memory = setting.memory(reference, F64)
    want = slow_attention(setting, options, memory.compress, q, k, v)
    given_keys = k
    if options["position"] == "rotary" and data.draw(st.booleans()):
        options["keys"], given_keys = "rotated", with_rotation(k, options)
    got = reference.attend(q, given_keys, v, setting.law(), compressor=memory.compress, **options)
    assert_close(got, want, 1e-11)


@cases(60)
@given(st.data())
def test_streaming_equals_whole_stream(data):
    setting = data.draw(memories(plain=True))
    options = data.draw(settings_of(setting))
    length = data.draw(lengths(setting).filter(lambda n: n > 0))
    q, k, v = setting.inputs(length, F64)
    if options["position"] == "rotary" and data.draw(st.booleans()):
        options["keys"], k = "rotated", with_rotation(k, options)
    sizes = setting.batch, setting.kv_heads, setting.head_dim, setting.value_dim
    compress = setting.memory(reference, F64).compress
    options["compressor"] = "most_used" if is_by_usage(compress) else compress
    memory = reference.KVMemory(setting.law(), *sizes, dtype=F64, **options)
    whole = reference.attend(q, k, v, setting.law(), **options)
    assert_close(stream(memory, [q, k, v], data.draw(cuts(length))), whole, 1e-12)


# --- rotation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_unrotate_is_the_inverse(interleaved):
    rotary = reference.Rotary(100.0, 6, interleaved, (0.3, 0.0, 2.5), 1.7)
    x = torch.randn(3, 8, dtype=F64)
    places = [0, 5, 12.5]
    assert_close(rotary.unrotate(rotary.rotate(x, places), places), x, 1e-14)
    still = rotary.rotate(x, places)
    assert_same_bits(still[:, 6:], x[:, 6:])
    assert_close(still[:, :6].norm(dim=-1), 1.7 * x[:, :6].norm(dim=-1), 1e-13)


def test_linear_scaling_is_a_smaller_position():
    x = torch.randn(8, dtype=F64)
    plain = reference.Rotary()
    scaled = reference.Rotary(inv_freq=tuple((plain.frequencies(8) / 4).tolist()))
    assert_close(scaled.rotate(x, 12), plain.rotate(x, 3), 1e-14)


def test_rotated_keys_are_stored_as_given():
    memory = reference.KVMemory(reference.Schedule(4, 0, 1), 1, 1, 4, dtype=F64, keys="rotated")
    k, v = torch.randn(2, 1, 1, 3, 4, dtype=F64)
    memory.append(k, v)
    assert_same_bits(memory.tensors["window_keys"][:, :, :3], k)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slot_mass": True, "compressed_bias": "log_ratio"}, "compressed_bias.*slot_mass"),
        ({"keys": "rotated", "position": None}, "keys.*'rotated'"),
        ({"keys": "turned"}, "keys.*'turned'"),
        ({"distance": "far"}, "distance.*'far'"),
        ({"position": "sinusoid"}, "position.*'sinusoid'"),
        ({"position": "alibi"}, "alibi_slopes.*'alibi'"),
        ({"logit_softcap": -1.0}, "logit_softcap.*-1"),
        ({"compressed_bias": "learned"}, "compressed_bias.*'learned'"),
    ],
)
def test_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"ctx.reference: {message}"):
        reference.Settings(**options)


def test_frequencies_must_fit():
    with pytest.raises(ValueError, match="inv_freq must be rotary_dim / 2 = 2 numbers, got 3"):
        reference.Rotary(inv_freq=(1.0, 1.0, 1.0)).rotate(torch.zeros(4), 1)
