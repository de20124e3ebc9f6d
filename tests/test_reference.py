"""The reference against consequences of the law that can be computed some other way."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from ctx import reference
from ctx.reference.compression import overlap
from strategies import (
    assert_close,
    assert_same_bits,
    cases,
    cuts,
    lengths,
    memories,
    pieces,
    stream,
)

F64 = torch.float64
WITHOUT_OPERANDS = ["rotary", "rotary", "rotary", None]
DISTANCES = ["slot", "token"]


def rotated(x, options):
    """x [B, heads, T, D] with token t rotated to t."""
    if options["position"] != "rotary":
        return x
    rotary = reference.Rotary(
        options["rotary_base"], options["rotary_dim"], options["rotary_interleaved"]
    )
    return rotary.rotate(x, list(range(x.shape[2])))


def masked_attention(setting, q, k, v, sees):
    """torch's own attention where `sees(t, j)` says whether token t sees token j."""
    length = q.shape[2]
    mask = torch.tensor([[sees(t, j) for j in range(length)] for t in range(length)])
    q, k = rotated(q, setting.options), rotated(k, setting.options)
    scale = setting.options["scale"]
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


@cases(100)
@given(st.data())
def test_whole_stream_equals_streaming(data):
    """attend() rotates keys by distances, KVMemory rotates to clocks: one law, computed twice."""
    setting = data.draw(memories())
    length = data.draw(lengths(setting).filter(lambda n: n > 0))
    tensors = setting.inputs(length, F64)
    memory = setting.memory(reference, F64)
    sizes = data.draw(cuts(length))
    options = {**setting.options, **setting.scheme(reference, F64), **setting.settings}
    options["compressed_bias"] = memory.settings.compressed_bias
    whole = reference.attend(*tensors, setting.law(), compressor=memory.compress, **options)
    assert_close(stream(memory, tensors, sizes), whole, 1e-12)


@cases(60)
@given(st.data())
def test_full_window_is_causal_attention(data):
    """A + M >= length: nothing is ever evicted."""
    setting = data.draw(memories(positions=WITHOUT_OPERANDS, plain=True))
    law = setting.law()
    length = data.draw(st.integers(1, max(1, law.sinks + law.window)))
    setting.options["distance"] = "token" if law.sinks else data.draw(st.sampled_from(DISTANCES))
    tensors = setting.inputs(length, F64)
    out = stream(setting.memory(reference, F64), tensors, [length])
    if law.sinks + law.window >= length:
        assert_close(out, masked_attention(setting, *tensors, lambda t, j: j <= t), 1e-12)


@cases(60)
@given(st.data())
def test_no_slots_is_a_sliding_window(data):
    """C = 0: what left the window is gone, sinks excepted (StreamingLLM)."""
    setting = data.draw(memories({"compressed": 0}, positions=WITHOUT_OPERANDS, plain=True))
    law = setting.law()
    setting.options["distance"] = "token" if law.sinks else data.draw(st.sampled_from(DISTANCES))
    length = data.draw(lengths(setting).filter(lambda n: n > 0))
    tensors = setting.inputs(length, F64)

    def sees(t, j):
        return j <= t and (j < law.sinks or j >= law.window_begin(t))

    out = stream(setting.memory(reference, F64), tensors, [length])
    assert_close(out, masked_attention(setting, *tensors, sees), 1e-12)


LOCAL = {"window": 0, "compressed": 0, "ratio": 1, "segment": 5, "sinks": 0}


@cases(40)
@given(memories(LOCAL, positions=WITHOUT_OPERANDS, plain=True))
def test_no_memory_is_segment_local(setting):
    """M = C = 0: attention inside blocks of S tokens."""
    tensors = setting.inputs(13, F64)
    out = stream(setting.memory(reference, F64), tensors, [13])
    local = masked_attention(setting, *tensors, lambda t, j: j <= t and t // 5 == j // 5)
    assert_close(out, local, 1e-12)


@cases(40)
@given(st.data())
def test_identity_slots_are_window(data):
    """c = 1 and true distances: a window of M + C tokens."""
    schemes = [*WITHOUT_OPERANDS, "alibi"]  # relative positions tell slots from tokens
    setting = data.draw(memories({"ratio": 1}, "mean", "none", schemes, plain=True))
    setting.options["distance"] = "token"
    wide = dict(setting.schedule)
    wide["window"] += wide["compressed"]
    wide["compressed"] = 0
    length = data.draw(lengths(setting))
    tensors = setting.inputs(length, F64)
    slots = setting.memory(reference, F64)
    window = dataclasses.replace(setting, schedule=wide).memory(reference, F64)
    assert_close(stream(slots, tensors, [length]), stream(window, tensors, [length]), 1e-12)


def test_slot_bias_counts_a_slot_as_its_tokens():
    """c equal tokens and their mean slot with the bias log c give the same output."""
    q, k, v = torch.randn(1, 2, 12, 4), torch.randn(1, 1, 1, 4), torch.randn(1, 1, 12, 3)
    k = k.expand(1, 1, 12, 4)
    options = {"position": None, "compressed_bias": "log_ratio"}
    slots = reference.attend(q, k, v, reference.Schedule(0, 4, 3, 6), **options)
    exact = reference.attend(q, k, v, reference.Schedule(12, 0, 1), **options)
    assert_close(slots[:, :, 6:], exact[:, :, 6:], 1e-6)


def test_fresh_after_reset_and_rows_independent():
    schedule = reference.Schedule(3, 2, 2, 4, 1)
    make = partial(reference.KVMemory, schedule, kv_heads=1, head_dim=4, dtype=F64)
    q, k, v = (torch.randn(2, 1, 15, 4, dtype=F64) for _ in range(3))
    both, one = make(batch_size=2), make(batch_size=1)
    first = both.step(q, k, v)
    assert_same_bits(one.step(q[1:], k[1:], v[1:]), first[1:])
    both.reset()
    assert both.seen.tolist() == [0, 0]
    assert_same_bits(both.step(q, k, v), first)


def test_what_is_stored_is_rounded():
    """bfloat16 memory holds rotated keys in bfloat16, and slots made of the rounded keys."""
    schedule = reference.Schedule(0, 2, 2, 2)
    memory = reference.KVMemory(schedule, 1, 1, 4, dtype=torch.bfloat16, max_rewind=1)
    k, v = torch.randn(2, 1, 1, 5, 4).bfloat16()
    memory.append(k, v)
    rotate = reference.Rotary().rotate
    stored = [rotate(k[0, 0, t].float(), t).bfloat16() for t in range(5)]
    back = [rotate(stored[t].float(), -t) for t in range(5)]
    slot = rotate((back[2] + back[3]) / 2, 1.0).bfloat16()  # group 1
    rings = memory.tensors
    assert_same_bits(rings["window_keys"][0, 0, 4 % 4], stored[4])
    assert_same_bits(rings["window_values"][0, 0, 3], v[0, 0, 3])
    assert_same_bits(rings["compressed_keys"][0, 0, 1], slot)


def test_append_copies_its_input():
    memory = reference.KVMemory(reference.Schedule(4, 0, 1), 1, 1, 2, position=None)
    k, v = torch.ones(2, 1, 1, 1, 2)
    memory.append(k, v)
    k.zero_(), v.zero_()
    assert memory.tensors["window_keys"].sum() == 2 == memory.tensors["window_values"].sum()


class TestCompressors:
    keys = torch.randn(2, 3, 4, 5, 6, dtype=F64)
    values = torch.randn(2, 3, 4, 5, 2, dtype=F64)

    @pytest.mark.parametrize("name", ["conv", "dilated", "gated"])
    def test_start_as_mean(self, name):
        start = reference.initial_parameters(name, 3, 5, 6, 2, F64, 9)
        compressor = partial(reference.COMPRESSORS[name], **start)
        left = overlap(compressor, 5)
        assert left == {"conv": 4, "dilated": 7, "gated": 0}[name]
        before = [
            torch.randn(*x.shape[:3], left, x.shape[4], dtype=F64) for x in (self.keys, self.values)
        ]
        slots = compressor(
            torch.cat([before[0], self.keys], 3), torch.cat([before[1], self.values], 3)
        )
        for slot, mean in zip(slots[:2], reference.mean(self.keys, self.values), strict=True):
            assert_close(slot, mean, 1e-14)

    def test_conv_is_torch_conv(self):
        """Per head, torch's conv1d with stride = kernel over the tokens of all groups."""
        weight, bias = torch.randn(3, 5, 6, 6, dtype=F64), torch.randn(3, 6, dtype=F64)
        eye = torch.eye(2, dtype=F64).expand(3, 5, 2, 2)
        slots, _ = reference.conv(self.keys, self.values, weight, eye, key_bias=bias)
        for h in range(3):
            tokens = self.keys[:, h].flatten(1, 2).transpose(1, 2)  # [B, D, G c]
            kernel = weight[h].permute(2, 1, 0)  # [out, in, c]
            want = torch.nn.functional.conv1d(tokens, kernel, bias[h], stride=5)
            assert_close(slots[:, h], want.transpose(1, 2), 1e-12)

    def test_dilated_is_torch_conv(self):
        """Per head, conv1d with dilation 1, 2, 4 and ReLU over a stream that begins with zeros."""
        shapes = (3, 2, 6, 12), (3, 2, 2, 12, 12), (3, 5, 12, 6)
        own = [torch.randn(shape, dtype=F64) for shape in shapes]
        tokens = torch.randn(2, 3, 15, 6, dtype=F64)
        padded = torch.nn.functional.pad(tokens, (0, 0, 7, 0))
        groups = torch.stack([padded[:, :, 5 * g : 5 * g + 12] for g in range(3)], 2)
        first, hidden, weight = own
        own_names = {"key_first": first, "key_hidden": hidden, "key_weight": weight}
        own_names |= {"value_first": first, "value_hidden": hidden, "value_weight": weight}
        slots, _ = reference.dilated(groups, groups, **own_names)
        for h in range(3):
            x = tokens[:, h].transpose(1, 2)
            for layer, weight in enumerate([own[0][h], *own[1][h]]):
                back = torch.nn.functional.pad(x, (2**layer, 0))
                kernel = weight.permute(2, 1, 0)
                x = torch.nn.functional.conv1d(back, kernel, dilation=2**layer).relu()
            want = torch.nn.functional.conv1d(x, own[2][h].permute(2, 1, 0), stride=5)
            assert_close(slots[:, h], want.transpose(1, 2), 1e-12)

    def test_most_used_by_hand(self):
        usage = torch.tensor([[0.5, 2.0, 2.0, 0.1], [1.0, 1.0, 1.0, 1.0], [0.0, 0.1, 0.2, 3.0]])
        assert reference.most_used(usage, 2) == [[1, 2], [0, 1], [2, 3]]
        assert reference.most_used(usage, 1) == [[1], [0], [3]]

    def test_gated_by_hand(self):
        """exp(x . u + p), normalised, one token at a time; values are weighed by their keys."""
        gates = [torch.randn(3, 6, dtype=F64) for _ in range(2)]
        places = [torch.randn(3, 5, dtype=F64) for _ in range(2)]
        *slots, mass = reference.gated(
            self.keys, self.values, gates[0], places[0], gates[1], places[1]
        )
        for x, slot, gate, place in zip(
            (self.keys, self.values), slots, gates, places, strict=True
        ):
            for b, h, g in [(0, 0, 0), (1, 2, 3), (1, 1, 0)]:
                shares = [
                    math.exp(self.keys[b, h, g, i].dot(gate[h]) + place[h, i]) for i in range(5)
                ]
                mixed = sum(share * x[b, h, g, i] for i, share in enumerate(shares))
                assert_close(slot[b, h, g], mixed / sum(shares), 1e-12)
                if x is self.keys:
                    entropy = -sum(s * math.log(s / sum(shares)) for s in shares) / sum(shares)
                    assert math.isclose(mass[b, h, g], entropy, rel_tol=1e-12)

    def test_max_by_hand(self):
        key, value = reference.maximum(self.keys, self.values)
        assert key[1, 2, 3, 4] == max(self.keys[1, 2, 3, :, 4].tolist())
        assert value[0, 1, 2, 1] == max(self.values[0, 1, 2, :, 1].tolist())


class TestRotary:
    @cases(50)
    @given(st.floats(-50, 50), st.floats(-50, 50), st.booleans(), st.sampled_from([None, 2, 4, 6]))
    def test_product_depends_on_distance(self, p, r, interleaved, dim):
        q, k = torch.randn(2, 8, dtype=F64)
        rotate = reference.Rotary(100.0, dim, interleaved).rotate
        assert torch.isclose(rotate(q, p) @ rotate(k, r), rotate(q, p - r) @ k, atol=1e-10)

    def test_pairs(self):
        """Rotating the first pair by one radian, in both pairings, leaves the rest unchanged."""
        x = torch.arange(1.0, 7.0, dtype=F64)
        cos, sin = math.cos(1), math.sin(1)
        halves = reference.Rotary(dim=2).rotate(x, 1)
        assert_close(halves[:2], torch.tensor([cos - 2 * sin, 2 * cos + sin], dtype=F64), 1e-15)
        assert torch.equal(halves[2:], x[2:])
        slow = 100.0**-0.5
        halves = reference.Rotary(100.0, 4).rotate(x, 1)
        assert torch.isclose(halves[0], x[0] * cos - x[2] * sin)
        assert torch.isclose(halves[3], x[3] * math.cos(slow) + x[1] * math.sin(slow))
        pairs = reference.Rotary(100.0, 4, interleaved=True).rotate(x, 1)
        assert torch.isclose(pairs[1], x[1] * cos + x[0] * sin)
        assert torch.isclose(pairs[2], x[2] * math.cos(slow) - x[3] * math.sin(slow))


class TestGradients:
    schedule = reference.Schedule(2, 3, 2, 3, 1)

    def inputs(self):
        shapes = (1, 2, 9, 2), (1, 1, 9, 2), (1, 1, 9, 2)
        return [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]

    @pytest.mark.parametrize("name", ["mean", "max", "conv", "dilated", "gated"])
    def test_gradcheck(self, name):
        start = reference.initial_parameters(name, 1, 2, 2, 2, F64, 3)
        start = {key: x + 0.1 * torch.randn_like(x) for key, x in start.items()}
        parameters = [x.requires_grad_() for x in start.values()]
        bias = torch.randn(2, dtype=F64, requires_grad=True)

        def run(q, k, v, bias, *parameters):
            named = dict(zip(start, parameters, strict=True))
            compressor = partial(reference.COMPRESSORS[name], **named)
            return reference.attend(
                q, k, v, self.schedule, compressor=compressor, compressed_bias=bias
            )

        inputs = (*self.inputs(), bias, *parameters)
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)

    def test_carried_tokens_are_constant(self):
        q, k, v = self.inputs()
        out = reference.attend(q[:, :, 5:], k, v, self.schedule)
        whole = reference.attend(q, k, v, self.schedule)
        assert_same_bits(out, whole[:, :, 5:])
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        for grad in grads:
            assert grad[:, :, :5].abs().max() == 0
            assert (grad[:, :, 5:].abs().amax((0, 1, 3)) > 0).all()

    def test_aux_makes_slots_constant(self):
        q, k, v = self.inputs()
        run = partial(reference.attend, q, k, v, reference.Schedule(0, 3, 2, 2))
        task = run()[:, :, 8].square().sum()
        aux = run(compressor_grad="aux")[:, :, 8].square().sum()
        assert aux == task
        assert torch.autograd.grad(task, k)[0][:, :, :8].abs().amax((0, 1, 3))[2:].min() > 0
        assert torch.autograd.grad(aux, k)[0][:, :, :8].abs().max() == 0


def test_attend_after_append_gives_last_tokens():
    memory = reference.KVMemory(reference.Schedule(3, 2, 2), 1, 1, 4, dtype=F64)
    other = reference.KVMemory(reference.Schedule(3, 2, 2), 1, 1, 4, dtype=F64)
    tensors = [torch.randn(1, 1, 20, 4, dtype=F64) for _ in range(3)]
    for q, k, v in pieces(tensors, [9, 4, 7]):
        memory.append(k, v)
        assert_same_bits(memory.attend(q), other.step(q, k, v))
