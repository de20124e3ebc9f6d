"""Relative positions, ALiBi, and the shares of attention: what holds besides parity."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
from ctx import reference
from ctx.positions import Relative, alibi_slopes
from strategies import (
    CLOSE,
    DTYPES,
    assert_close,
    assert_same_bits,
    assume_clear,
    cases,
    cuts,
    lengths,
    memories,
    operands,
    pieces,
    plan_of,
)

F64 = torch.float64
SCHEDULE = ctx.Schedule(4, 3, 2, 4, 1)
SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 4, "sinks": 1}


def relative(dtype=F64, heads=4, head_dim=6, width=8):
    made = Relative(heads, head_dim, width, dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def memory(position="relative", **options):
    needs = {"relative": {"relative": relative()}, "alibi": {"alibi_slopes": alibi_slopes(4)}}
    options = {**needs.get(position, {}), "max_rewind": 5, "dtype": F64, **options}
    return ctx.KVMemory(SCHEDULE, 2, 2, 6, position=position, **options)


def tokens(count, dtype=F64):
    return [torch.randn(2, heads, count, 6, dtype=dtype) for heads in (4, 2, 2)]


def attention(position, **options):
    torch.manual_seed(0)
    made = ctx.CompressiveAttention(16, 4, 2, position=position, **{**SIZES, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


class TestSlopes:
    def test_of_the_paper(self):
        assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
        assert alibi_slopes(1).tolist() == [2.0**-8]
        between = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
        assert_close(
            alibi_slopes(12), torch.tensor([*alibi_slopes(8).tolist(), *between], dtype=F64), 1e-15
        )

    @pytest.mark.parametrize("heads", range(1, 40))
    def test_equal_the_reference(self, heads):
        slopes = alibi_slopes(heads)
        assert slopes.shape == (heads,)
        assert_close(slopes, torch.tensor(reference.alibi_slopes(heads), dtype=F64), 1e-15)

    @pytest.mark.parametrize("value, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
    def test_errors(self, value, error):
        with pytest.raises(error, match=r"ctx.positions.alibi_slopes: num_heads must .* got"):
            alibi_slopes(value)

    def test_are_constants_of_a_layer(self):
        attn = attention("alibi")
        assert_close(attn.alibi_slopes, alibi_slopes(4).float(), 0.0)
        assert not any("alibi" in name for name, _ in attn.named_parameters())
        assert not any("alibi" in name for name in attn.state_dict())


class TestRelative:
    def test_first_values(self):
        made = Relative(3, 4, 64)
        shapes = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}
        assert shapes == {
            "key_bias": (3, 4),
            "position_bias": (3, 4),
            "position_weight": (3, 4, 64),
            "compressed_position_bias": (3, 4),
            "compressed_position_weight": (3, 4, 64),
        }
        for name, parameter in made.named_parameters():
            if "weight" in name:
                assert 0.05 < parameter.std() < 0.1 and parameter.abs().max() <= 1 / 8
            else:
                assert parameter.abs().max() == 0
        made.reset_parameters(0.02)
        assert 0.015 < made.position_weight.std() < 0.025

    @pytest.mark.parametrize(
        "sizes, name, error",
        [
            ((0, 4, 8), "num_heads", ValueError),
            ((2, -4, 8), "head_dim", ValueError),
            ((2, 4, 0), "width", ValueError),
            ((2, 4, 7), "width", ValueError),
            ((2, 4, 8.0), "width", TypeError),
        ],
    )
    def test_errors(self, sizes, name, error):
        with pytest.raises(error, match=rf"ctx.positions.Relative: {name} must .* got"):
            Relative(*sizes)

    def test_in_a_layer(self):
        attn = attention("relative")
        assert attn.relative.position_weight.shape == (4, 4, 16)  # P = E, as in Transformer-XL
        assert attention("relative", relative_dim=6).relative.width == 6
        assert attention("rotary").relative is None and attn.rotary_dim == 0

    def test_in_a_model(self):
        """Weights as small as the model's other projections, also after the meta device."""
        config = ctx.CompressiveTransformerConfig(
            vocab_size=9, embed_dim=32, num_layers=2, num_heads=4, position="relative", **SIZES
        )
        with torch.device("meta"):
            built = ctx.CompressiveTransformer(config)
        built.to_empty(device="cpu")
        built.reset_parameters()
        for made in (built, ctx.CompressiveTransformer(config)):
            held = made.layers[1].relative
            assert 0.015 < held.position_weight.std() < 0.025 and held.key_bias.abs().max() == 0
            assert made(torch.zeros(1, 20, dtype=torch.int64))[0].isfinite().all()

    def test_biases_are_added(self):
        """A query of zero sees u . k and v . R: with neither, every key is equal to it."""
        q, k, v = tokens(9)
        made = relative()
        with torch.no_grad():
            for name in ("key_bias", "position_bias", "compressed_position_bias"):
                getattr(made, name).zero_()
        flat = memory(relative=made).step(torch.zeros_like(q), k, v)
        plain = memory(None).step(torch.zeros_like(q), k, v)
        assert_close(flat, plain, 1e-12)

    def test_parameters_are_read_at_every_call(self):
        made = relative()
        held, twin = memory(relative=made), memory(relative=copy.deepcopy(made))
        first, second, third = tokens(7), tokens(3), tokens(2)
        assert_same_bits(held.step(*first), twin.step(*first))
        with torch.no_grad():
            made.position_weight.mul_(2)  # in place
        fresh = memory(relative=copy.deepcopy(made))
        fresh.append(*first[1:])
        got, want = held.step(*second), fresh.step(*second)
        assert_same_bits(got, want)
        assert not torch.equal(got, twin.step(*second))
        made.key_bias = torch.nn.Parameter(made.key_bias + 1)  # replaced
        other = memory(relative=copy.deepcopy(made))
        other.append(*(torch.cat(parts, 2) for parts in zip(first[1:], second[1:], strict=True)))
        assert_close(held.step(*third), other.step(*third), 1e-12)


@pytest.mark.parametrize("position", ["relative", "alibi"])
class TestPlainObjects:
    def test_copies_go_on_alike(self, position):
        held = memory(position)
        held.step(*tokens(11))
        buffer = io.BytesIO()
        torch.save(held, buffer)
        buffer.seek(0)
        others = [
            held.clone(),
            copy.deepcopy(held),
            pickle.loads(pickle.dumps(held)),
            torch.load(buffer, weights_only=False),
            ctx.KVMemory.merge([held.select([0]), held.select([1])]),
        ]
        following = tokens(4)
        want = held.step(*following)
        for other in others:
            assert_same_bits(other.step(*following), want)

    def test_in_another_dtype(self, position):
        held = memory(position)
        first, following = tokens(11), tokens(4)
        held.step(*first)
        half = held.to(dtype=torch.bfloat16)
        want = held.step(*following)
        got = half.step(*(x.bfloat16() for x in following))
        assert got.dtype == torch.bfloat16
        assert_close(got.double(), want, CLOSE[torch.bfloat16])

    def test_nothing_is_recorded(self, position):
        """Queries and parameters that want gradients get none from a stream."""
        held = memory(position)
        q, k, v = (x.requires_grad_() for x in tokens(5))
        for out in (
            *held.step(q, k, v, return_region_weights=True),
            *held.attend(q, return_region_weights=True),
        ):
            assert not out.requires_grad
        assert not any(tensor.requires_grad for tensor in held.tensors.values())

    def test_operators_record_nothing(self, position):
        attn = attention(position)
        q, k, v = (torch.randn(1, heads, 3, 4, requires_grad=True) for heads in (4, 2, 2))
        memory = attn.init_memory(1)
        plan = plan_of(attn, memory.seen, 3, carried=True)
        compressor = attn.compressor.operands()
        rings = memory.rings[0]
        outs = torch.ops.ctx.step_(q, k, v, plan, rings, compressor, *operands(attn, True))
        assert not any(x.requires_grad for x in (*outs, *rings))

    def test_autocast_ends_at_our_operators(self, position):
        attn = attention(position)
        q, k, v = (torch.randn(2, heads, 9, 4) for heads in (4, 2, 2))
        compressor = attn.compressor.operands()

        def step():
            memory = attn.init_memory(2)
            plan = plan_of(attn, memory.seen, 9, carried=True)
            with torch.no_grad():
                return torch.ops.ctx.step_(
                    q, k, v, plan, memory.rings[0], compressor, *operands(attn, True)
                )

        want = step()
        with torch.autocast("cpu", torch.bfloat16):
            got = step()
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other)


SCHEMES = {
    "rotary": "rotary",
    "relative": "relative",
    "alibi": "alibi",
    "none": None,
}


@pytest.mark.parametrize("other", SCHEMES)
@pytest.mark.parametrize("own", SCHEMES)
def test_a_state_belongs_to_its_scheme(own, other):
    held, theirs = memory(SCHEMES[own]), memory(SCHEMES[other])
    theirs.step(*tokens(9))
    if own == other:
        held.load_state_dict(theirs.state_dict())
        return
    with pytest.raises(ValueError, match=rf'position must be "{own}" .*got "{other}"'):
        held.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=rf'one position = "{own}", got "{other}"'):
        ctx.KVMemory.merge([held, theirs])


class TestShares:
    """What share of its attention a query gives to sinks, compressed slots and window."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @cases(40)
    @given(data=st.data())
    def test_of_a_stream(self, dtype, data):
        """Equal to the reference's, however the stream is cut; they add up to one."""
        setting = data.draw(memories())
        length = data.draw(lengths(setting).filter(lambda n: n > 0))
        tensors = setting.inputs(length, dtype, data.draw(st.integers(0, 3)))
        ours, theirs = setting.memory(ctx, dtype), setting.memory(reference, dtype)
        want = theirs.step(*tensors, return_region_weights=True)
        assume_clear(theirs, CLOSE[dtype])
        assert_close(want[1].sum(-1), torch.ones_like(want[1][..., 0]), 1e-6)
        steps = [
            ours.step(*p, return_region_weights=True)
            for p in pieces(tensors, data.draw(cuts(length)))
        ]
        for part, wanted in zip(zip(*steps, strict=True), want, strict=True):
            assert_close(torch.cat(part, 2), wanted, CLOSE[dtype])
        late = min(setting.max_rewind, length)
        q = tensors[0][:, :, length - late :]
        for part, wanted in zip(ours.attend(q, return_region_weights=True), want, strict=True):
            assert_close(part, wanted[:, :, length - late :], CLOSE[dtype])

    @pytest.mark.parametrize("position", SCHEMES.values(), ids=SCHEMES)
    def test_padding_has_none(self, position):
        held = memory(position)
        held.step(*tokens(9))
        twin = held.clone()
        q, k, v = tokens(7)
        out, region_weights = held.step(q, k, v, torch.tensor([3, 0]), return_region_weights=True)
        assert region_weights[0, :, 3:].abs().sum() == 0 and region_weights[1].abs().sum() == 0
        assert_close(region_weights[0, :, :3].sum(-1), torch.ones(4, 3, dtype=F64), 1e-12)
        want, whole = twin.step(q, k, v, return_region_weights=True)
        assert_close(out[0, :, :3], want[0, :, :3], 1e-12)
        assert_close(region_weights[0, :, :3], whole[0, :, :3], 1e-12)

    def test_documents(self):
        """A document's first token sees itself alone; sinks are its own."""
        for position in SCHEMES.values():
            held = memory(position)
            held.step(*tokens(12))
            reset_at = torch.zeros(2, 6, dtype=torch.bool)
            reset_at[0, 2] = True
            region_weights = held.step(*tokens(6), None, reset_at, return_region_weights=True)[1]
            assert (region_weights[0, :, 1, 1] > 0).all() and region_weights[
                0, :, 2:, 1
            ].abs().sum() == 0
            assert_close(region_weights[0, :, 2, 0], torch.ones(4, dtype=F64), 1e-12)
            assert_close(region_weights.sum(-1), torch.ones(2, 4, 6, dtype=F64), 1e-12)

    @pytest.mark.parametrize("how", ["whole", "lengths", "mask", "reset_at"])
    @pytest.mark.parametrize("position", SCHEMES.values(), ids=SCHEMES)
    def test_of_a_layer(self, position, how):
        """With and without gradients: the same, constant, and zero at padding."""
        attn = attention(position).double()
        x = torch.randn(3, 23, 16, dtype=F64)
        mask = torch.rand(3, 23) < 0.7
        rows = {
            "whole": {},
            "lengths": {"lengths": torch.tensor([23, 0, 9])},
            "mask": {"mask": mask},
            "reset_at": {"reset_at": torch.rand(3, 23) < 0.2},
        }[how]
        y, _, usage = attn(x, **rows, return_region_weights=True)
        assert usage.shape == (3, 4, 23, 3) and not usage.requires_grad and y.requires_grad
        with torch.no_grad():
            streamed, _, same = attn(x, attn.init_memory(3), **rows, return_region_weights=True)
        assert_close(streamed, y.detach(), 1e-11)
        assert_close(same, usage, 1e-11)
        there = {
            "lengths": torch.arange(23) < torch.tensor([[23], [0], [9]]),
            "mask": mask,
        }.get(how, torch.ones(3, 23, dtype=torch.bool))
        assert_close(usage.sum(-1), there[:, None].expand(3, 4, 23).double(), 1e-11)
        assert_same_bits(attn(x, **rows)[0].detach(), y.detach())

    def test_order_of_what_is_returned(self):
        """Output, memory, loss, shares."""
        attn = attention("relative", aux_loss="reconstruction", compressor_grad="aux")
        x = torch.randn(2, 20, 16)
        y, memory, aux, usage = attn(x, return_aux=True, return_region_weights=True)
        assert torch.equal(y, attn(x)[0]) and isinstance(memory, ctx.Memory)
        assert aux.shape == () and torch.equal(aux, attn(x, return_aux=True)[2])
        assert torch.equal(usage, attn(x, return_region_weights=True)[2])

    @pytest.mark.parametrize("position", ["rotary", "relative"])
    def test_of_a_model(self, position):
        config = ctx.CompressiveTransformerConfig(
            vocab_size=9,
            embed_dim=16,
            num_layers=3,
            num_heads=2,
            position=position,
            aux_loss="autoencoding",
            **SIZES,
        )
        built = ctx.CompressiveTransformer(config).eval()
        text, mask = torch.randint(9, (2, 30)), torch.ones(2, 30, dtype=torch.bool)
        mask[1, :11] = False
        logits, memory, usage = built(text, mask=mask, return_region_weights=True)
        assert usage.shape == (3, 2, 2, 30, 3) and len(memory) == 3
        assert_close(usage.sum(-1)[:, 0], torch.ones(3, 2, 30), 1e-5)
        assert usage[:, 1, :, :11].abs().sum() == 0
        with torch.no_grad():
            same = built(text, built.init_memory(2), mask=mask, return_region_weights=True)
        assert_close(same[0], logits.detach(), 1e-5)
        assert_close(same[2], usage, 1e-5)
        both = built(text, return_aux=True, return_region_weights=True)
        assert len(both) == 4 and both[2].shape == () and both[3].shape == usage.shape
        assert torch.equal(both[2], built(text, return_aux=True)[2])

    def test_asked_for_by_a_bool(self):
        held = memory()
        for call in (
            lambda: held.step(*tokens(1), return_region_weights=1),
            lambda: held.attend(tokens(1)[0], return_region_weights="yes"),
        ):
            with pytest.raises(TypeError, match=r"\w+: return_region_weights must be a bool, got"):
                call()
        assert held.seen.tolist() == [0, 0]

    def test_empty_call(self):
        for position in SCHEMES.values():
            held = memory(position)
            held.step(*tokens(9))
            for out, region_weights in (
                held.step(*tokens(0), return_region_weights=True),
                held.attend(tokens(0)[0], return_region_weights=True),
            ):
                assert out.shape == (2, 4, 0, 6) and region_weights.shape == (2, 4, 0, 3)
            attn = attention(position)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    usage = attn(torch.randn(2, 0, 16), return_region_weights=True)[2]
                assert usage.shape == (2, 4, 0, 3)


def test_heads_of_the_slopes_are_those_of_queries():
    held = memory("alibi", alibi_slopes=alibi_slopes(2))
    with pytest.raises(ValueError, match=r"step: alibi_slopes must be \[H\] = \[4\], got \[2\]"):
        held.step(*tokens(3))
    held = memory(relative=relative(heads=2))
    with pytest.raises(ValueError, match=r"step: relative .*_weight|key_bias must be .*got \[2, 6"):
        held.step(*tokens(3))
    assert held.seen.tolist() == [0, 0]


@cases(40)
@given(st.data())
def test_a_far_stream_is_as_near(data):
    """Distances by slots are bounded: far down a stream only what is within reach has an effect."""
    setting = data.draw(
        memories({"sinks": 0}, positions=["relative", "alibi"], by_usage=False, plain=True)
    )
    setting.options["distance"] = "slot"
    setting = dataclasses.replace(setting, batch=1)
    law = setting.law()
    period = law.segment * law.ratio
    start = period * (10**12 // period)
    need = law.window + law.compressed * law.ratio + 2 * law.segment + law.ratio
    need = period * -(-need // period) + 1
    tensors = setting.inputs(need + 3, F64)
    far, near = setting.memory(ctx, F64), setting.memory(ctx, F64)
    far.tensors["seen"].fill_(start)
    outs = [[m.step(*p) for p in pieces(tensors, [need, 3])][1] for m in (far, near)]
    assert_close(outs[0], outs[1], 1e-10)
