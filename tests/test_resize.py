"""A running memory carried over to other sizes is one that had these sizes from the start."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
from ctx.memory_rows import leaves
from strategies import assert_same_bits, cases, cuts, lengths, memories, stream

F64 = torch.float64


def begun(setting, dtype, inputs, sizes, **changed):
    """A ctx.KVMemory of the setting, with some sizes changed, after these calls."""
    memory = setting.memory(ctx, dtype)
    if changed:
        again = dict(memory._settings)
        schedule = memory.schedule.resized(**changed)
        settings = dataclasses.replace(memory._attention, schedule=schedule)
        memory = ctx.KVMemory(
            settings, setting.batch, **again, compressor=memory.compressor, dtype=dtype
        )
    stream(memory, inputs, sizes)
    return memory


def assert_same_memory(got, want):
    assert got.schedule == want.schedule
    for name, tensor in want.tensors.items():
        assert_same_bits(got.tensors[name], tensor)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
@cases(100)
@given(data=st.data())
def test_other_numbers_of_slots(dtype, data):
    """Bit-equal where the law allows it, and goes on as such; refused where slots are missing."""
    setting = data.draw(memories(by_usage=False))
    length, new = data.draw(lengths(setting)), data.draw(st.integers(0, 8))
    inputs, sizes = setting.inputs(length, dtype), data.draw(cuts(length))
    memory = begun(setting, dtype, inputs, sizes)
    before = memory.clone()
    made = memory.schedule.groups(length - 1) if length else 0
    if made > memory.schedule.compressed < new:
        with pytest.raises(ValueError, match=r"ctx.KVMemory.resized: compressed must be .*got"):
            memory.resized(compressed=new)
        assert_same_memory(memory, before)
        return
    other = memory.resized(compressed=new)
    want = begun(setting, dtype, inputs, sizes, compressed=new)
    assert_same_memory(memory, before)
    assert_same_memory(other, want)
    more = setting.inputs(9, dtype, strides=1)
    assert_same_bits(other.step(*more), want.step(*more))
    assert_same_memory(other, want)


@cases(100)
@given(st.data())
def test_other_windows(data):
    """Where both windows have let go the same, all that is visible is the same; refused else."""
    setting = data.draw(memories(by_usage=False))
    length, window = data.draw(lengths(setting)), data.draw(st.integers(0, 14))
    inputs, sizes = setting.inputs(length, F64), data.draw(cuts(length))
    memory = begun(setting, F64, inputs, sizes)
    want = begun(setting, F64, inputs, sizes, window=window)
    made = [one.schedule.groups(length - 1) if length else 0 for one in (memory, want)]
    if made[0] != made[1]:
        with pytest.raises(ValueError, match=r"resized: window must leave .* got"):
            memory.resized(window=window)
        return
    other = memory.resized(window=window)
    most = int(other.rewindable.min())
    assert (other.rewindable <= want.rewindable).all()
    for count in range(most + 1):  # tokens to take back: what was made then must be the same, too
        t = length - 1 - count
        assert t < 0 or memory.schedule.groups(t) == want.schedule.groups(t)
    back = data.draw(st.sampled_from([most, 0]) | st.integers(0, most))
    for one in (other, want):
        one.rewind(back)
    more = setting.inputs(9, F64, strides=1)
    assert_same_bits(other.step(*more), want.step(*more))


def test_rewinding_ends_where_the_windows_disagree():
    schedule = ctx.Schedule(window=1, compressed=4, ratio=4, segment=3)
    made = [[one.groups(t) for t in range(9, 15)] for one in (schedule, schedule.resized(window=2))]
    assert made == [[2, 2, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2]]
    memory = ctx.KVMemory(schedule, 2, 1, 4, max_rewind=12)
    pair = torch.randn(2, 1, 15, 4)
    memory.append(pair, pair, lengths=torch.tensor([14, 15]))
    assert memory.rewindable.tolist() == [12, 12]
    assert memory.resized(window=2).rewindable.tolist() == [1, 2]
    assert memory.resized(compressed=2).rewindable.tolist() == [12, 12]


def test_after_a_rewind_and_a_reset():
    """What stands in the rings from before is nowhere to be seen."""
    torch.manual_seed(0)
    schedule = ctx.Schedule(window=3, compressed=4, ratio=2, segment=3, sinks=1)
    pairs = [torch.randn(3, 1, 40, 4, dtype=F64) for _ in range(3)]
    made = {}
    for compressed in (4, 2):
        memory = ctx.KVMemory(
            schedule.resized(compressed=compressed), 3, 1, 4, max_rewind=8, dtype=F64
        )
        memory.step(*(x[:, :, :20] for x in pairs))
        memory.rewind(torch.tensor([0, 5, 8]))
        memory.reset(2)
        made[compressed] = memory
    other = made[4].resized(compressed=2)
    more = [x[:, :, 20:] for x in pairs]
    assert_same_bits(other.step(*more), made[2].step(*more))


class TestModel:
    def model(self):
        torch.manual_seed(1)
        sizes = {"window": 8, "compressed": [6, 4], "ratio": 4, "segment": [8, 4]}
        config = {"vocab_size": 50, "embed_dim": 32, "num_layers": 2, "num_heads": 4, **sizes}
        model = ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def test_goes_on_with_fewer_slots(self):
        """Layer by layer; the first layer's memory is bit-equal, later ones saw other inputs."""
        model, text = self.model(), torch.randint(0, 50, (2, 70))
        twin = model.with_memory(compressed=[2, 4])
        with torch.no_grad():
            _, memory = model(text)
            _, wanted = twin(text)
            kept = memory.clone()
            other = ctx.rows.resized(memory, twin.schedules)
            assert type(other) is ctx.Memory and other.spec == twin.spec
            for name, tensor in wanted[0].tensors.items():
                assert_same_bits(other[0][name], tensor)
            assert all(map(torch.equal, leaves(memory), leaves(kept)))
            logits, _ = twin(text[:, :5], other)
            assert logits.isfinite().all()
            with pytest.raises(ValueError, match=r"compressed=6, got .* compressed=2"):
                model(text[:, :5], other)

    @pytest.mark.parametrize(
        "tokens, new",
        [(70, [20, 20]), (22, [20, 20]), (22, [3, 4]), (22, [6, 3])],
        ids=["more", "few tokens", "fewer", "fewer below"],
    )
    def test_what_holds_of_a_whole_model(self, tokens, new):
        """As if it had had these sizes all along, while no query would have seen anything else;
        later that is true of the first layer only, and deeper ones keep the pairs that they made.
        """
        model, text = self.model(), torch.randint(0, 50, (2, tokens + 5))
        held = model.with_memory(compressed=[16, 16])  # 15 and 15 slots of 70 tokens: none dropped
        twin = model.with_memory(compressed=new)
        with torch.no_grad():
            _, memory = held(text[:, :tokens])
            _, wanted = twin(text[:, :tokens])
            other = ctx.rows.resized(memory, twin.schedules)
            for layer, want in zip(other, wanted, strict=True):
                for name, tensor in want.tensors.items():
                    if name != "rewindable":
                        assert_same_bits(layer[name], tensor)
            assert_same_bits(twin(text[:, tokens:], other)[0], twin(text[:, tokens:], wanted)[0])

    def test_what_does_not_hold_of_a_whole_model(self):
        """Queries saw slots that the new sizes would have dropped: below the first layer the
        memory is that of a model whose sizes changed at this token.
        """
        model, text = self.model(), torch.randint(0, 50, (2, 70))
        twin = model.with_memory(compressed=[2, 4])
        with torch.no_grad():
            _, memory = model(text)
            _, wanted = twin(text)
            other = ctx.rows.resized(memory, twin.schedules)
        for name, tensor in wanted[0].tensors.items():
            assert_same_bits(other[0][name], tensor)
        for name, tensor in memory[1].tensors.items():  # of the same sizes, and holds the same
            assert_same_bits(other[1][name], tensor)
        difference = (other[1]["window_values"] - wanted[1]["window_values"]).abs().max()
        assert difference > 1e-3

    def test_one_schedule_serves_a_layer(self):
        attn = self.model().layers[0]
        with torch.no_grad():
            _, memory = attn(torch.randn(2, 30, 32))
        smaller = attn.schedule.resized(compressed=1)
        other = ctx.rows.resized(memory, smaller)
        attn.schedule = smaller
        with torch.no_grad():
            attn(torch.randn(2, 3, 32), other)

    @pytest.mark.parametrize(
        "change, error, words",
        [
            (lambda old: old[:1], ValueError, "schedule must be one or 2, .*got 1"),
            (lambda old: [None, old[1]], TypeError, "schedule must be a .*got NoneType"),
            (lambda old: [old[0].resized(ratio=2), old[1]], ValueError, "ratio must stay .*got 2"),
            (lambda old: [old[0].resized(sinks=2), old[1]], ValueError, "sinks must stay .*got 2"),
            (lambda old: [old[0].resized(segment=5), old[1]], ValueError, "segment must .*got 5"),
            (lambda old: [old[0].resized(window=0), old[1]], ValueError, "window must .*got 0"),
            (lambda old: [old[0].resized(compressed=9), old[1]], ValueError, "compressed .*got 9"),
        ],
    )  # fmt: skip
    def test_errors(self, change, error, words):
        model = self.model()
        with torch.no_grad():
            _, memory = model(torch.randint(0, 50, (2, 70)))
        with pytest.raises(error, match=rf"ctx.Memory.resized: {words}"):
            ctx.rows.resized(memory, change(list(model.schedules)))

    def test_a_memory_of_another_schedule(self):
        """Its specification says the schedule, and its tensors must be of these sizes."""
        model = self.model()
        memory = model.init_memory(1)
        for changed, name in (
            ({"compressed": 3}, "compressed_keys"),
            ({"window": 1000}, "window_keys"),
        ):
            spec = model.with_memory(**changed).spec
            wrong = ctx.Memory(spec, memory.seen, memory.rewindable, memory.rings)
            with pytest.raises(ValueError, match=rf"ctx.Memory.resized: .*{name}.* must be .*got"):
                ctx.rows.resized(wrong, model.schedules)


@pytest.mark.parametrize("sizes", [{"compressed": -1}, {"window": 2**31}, {"compressed": 1.5}])
def test_kv_memory_refuses_sizes(sizes):
    memory = ctx.KVMemory(ctx.Schedule(4, 4, 2), 1, 1, 4)
    with pytest.raises((ValueError, TypeError), match=next(iter(sizes))):
        memory.resized(**sizes)
