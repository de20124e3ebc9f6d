"""Operators on some rows of a memory, which the plan names: as on a copy of these rows, bit for
bit, and nothing else is touched.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
from ctx import engine
from ctx.kv_called import written
from ctx.kv_followed import parameters_of
from strategies import COMPRESSORS, assert_same_bits, cases, memories

F64 = torch.float64
ROWS = 5


def law_of(memory):
    compressor, width = memory.compressor, memory._settings["head_dim"]
    return engine.law_of(memory._attention, compressor.engine_name, width, compressor.overlap)


def step(memory, rows, tensors, lengths=None, reset_at=None):
    """KVMemory.step for some rows where they lie, out of operators."""
    q, k, v = tensors
    law, settings = law_of(memory), memory._settings
    relative = [] if memory.relative is None else [*memory.relative()]
    scores = memory._bias_on(torch.device("cpu")), settings["alibi_slopes"], relative
    rings = [*memory.tensors.values()][:9]
    with torch.no_grad():
        clock = memory.seen, memory.rewindable
        plan = torch.ops.ctx.plan(
            memory.seen, lengths, reset_at, k.shape[2], law.settings, True, rows
        )
        operands = parameters_of(memory.compressor)
        out = torch.ops.ctx.step_(q, k, v, plan, rings, operands, *scores, *law, False)[0]
        torch.ops.ctx.advance_(*clock, plan, settings["max_rewind"])
    return out


@pytest.mark.parametrize("compressor", COMPRESSORS)
@cases(25)
@given(data=st.data())
def test_rows_where_they_lie(compressor, data):
    """One token, several, more than there are spare entries, ragged, and beginning anew."""
    setting = dataclasses.replace(data.draw(memories(compressor=compressor)), batch=ROWS)
    memory = setting.memory(ctx, F64)
    counts = data.draw(st.lists(st.integers(0, 40), min_size=ROWS, max_size=ROWS))
    memory.step(*setting.inputs(40, F64), torch.tensor(counts))
    order = data.draw(st.permutations(range(ROWS)))[: data.draw(st.integers(1, ROWS))]
    rows, rest = torch.tensor(order), [row for row in range(ROWS) if row not in order]
    for call in range(2):
        copy = memory.select(rows)
        others = memory.select(rest) if rest else None
        size = data.draw(st.sampled_from([1, 1, 2, 5, 20, 70]))
        drawn = dataclasses.replace(setting, seed=setting.seed + 1 + call)
        tensors = [x[: len(order)] for x in drawn.inputs(size, F64, data.draw(st.integers(0, 3)))]
        lengths = reset_at = None
        if data.draw(st.booleans()):
            lengths = torch.tensor([data.draw(st.integers(0, size)) for _ in order])
        if data.draw(st.integers(0, 3)) == 0:
            reset_at = torch.zeros(len(order), size, dtype=torch.bool)
            reset_at[data.draw(st.integers(0, len(order) - 1)), size // 2] = True
        want = copy.step(*tensors, lengths, reset_at)
        assert_same_bits(step(memory, rows, tensors, lengths, reset_at), want)
        for name, tensor in copy.tensors.items():
            assert_same_bits(memory.tensors[name][rows], tensor)
            if others is not None:
                assert_same_bits(memory.tensors[name][rest], others.tensors[name])


def small(batch=3, **options):
    return ctx.KVMemory(ctx.Schedule(4, 3, 2), batch, 1, 4, dtype=F64, **options)


def tokens(batch, count=2):
    return torch.randn(3, batch, 1, count, 4, dtype=F64).unbind(0)


def test_groups_are_read_from_the_rows_of_the_plan():
    class Last(torch.nn.Module):
        def forward(self, keys, values):
            return keys[..., -1, :], values[..., -1, :]

    memory = small(compressor=Last())
    memory.step(*tokens(3, 9))
    copy = memory.select([2, 0])
    law, rings = law_of(memory), [*memory.tensors.values()][:9]
    q, k, v = tokens(2, 5)
    plan = torch.ops.ctx.plan(memory.seen, None, None, 5, law.settings, True, torch.tensor([2, 0]))
    own = torch.ops.ctx.plan(copy.seen, None, None, 5, law.settings, True)
    got = torch.ops.ctx.evicted_groups(k, v, plan, rings, *law)
    want = torch.ops.ctx.evicted_groups(k, v, own, [*copy.tensors.values()][:9], *law)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)
    assert written(copy, "here", q, k, v, None, None) is not None


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ([0, 3], IndexError, "rows must be between 0 and 2, got 3"),
        ([-1, 0], IndexError, "rows must be between 0 and 2, got -1"),
        ([1, 1], ValueError, "rows must be different, got 1 twice"),
        ([0.0, 1.0], TypeError, "rows must be"),
        ([[0, 1]], ValueError, "rows must be"),
    ],
)
def test_rows_are_checked(rows, error, message):
    memory = small()
    with pytest.raises(error, match=message):
        step(memory, torch.tensor(rows), tokens(2))
    assert not memory.seen.any()


def test_a_plan_belongs_to_rows_of_the_memory():
    memory, large = small(), small(6)
    law, rings = law_of(memory), [*memory.tensors.values()][:9]
    q, k, v = tokens(2)
    none = [], None, None, []
    few = torch.ops.ctx.plan(memory.seen[:2], None, None, 2, law.settings, True)
    for call, message in [
        (lambda: torch.ops.ctx.step_(q, k, v, few, rings, *none, *law, False), "k must be"),
        (lambda: torch.ops.ctx.advance_(memory.seen, memory.rewindable, few, 4), "plan must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    far = torch.ops.ctx.plan(large.seen, None, None, 2, law.settings, True, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="plan must be one of this memory's rows, 0 to 2, got 5"):
        torch.ops.ctx.step_(q, k, v, far, rings, *none, *law, False)
    with pytest.raises(ValueError, match="plan must be one of this memory's rows, 0 to 2, got 5"):
        torch.ops.ctx.evicted_groups(k, v, far, rings, *law)
    with pytest.raises(ValueError, match="plan must be one of this memory's rows, 0 to 2, got 5"):
        torch.ops.ctx.advance_(memory.seen, memory.rewindable, far, 4)
    assert not memory.seen.any() and not memory.tensors["window_keys"].any()
