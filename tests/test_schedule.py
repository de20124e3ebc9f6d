"""The law as integers: identities on the reference, and ctx.Schedule equal to it everywhere."""

import dataclasses
import itertools
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ctx
from ctx import reference
from strategies import cases, schedules

WINDOWS = [0, 1, 3, 8]


def grid(window):
    """All settings with this window: (window, compressed, ratio, segment, sinks)."""
    return itertools.product([window], [0, 1, 4], [1, 2, 3, 5], [None, 1, 2, 4, 7], [0, 1, 3])


@pytest.mark.parametrize("module", [ctx, reference], ids=["ctx", "reference"])
class TestBoth:
    def test_segment_defaults_to_ratio(self, module):
        law = module.Schedule(6, 2, 3)
        assert (law.window, law.compressed, law.ratio, law.segment, law.sinks) == (6, 2, 3, 3, 0)
        assert law == module.Schedule(6, 2, 3, 3)
        assert law != module.Schedule(6, 2, 3, 2)

    def test_is_a_frozen_value(self, module):
        law = module.Schedule(window=6, compressed=2, ratio=3, segment=4, sinks=1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            law.window = 7
        assert hash(law) == hash(dataclasses.replace(law))
        assert pickle.loads(pickle.dumps(law)) == law
        assert dataclasses.asdict(law) == {
            "window": 6,
            "compressed": 2,
            "ratio": 3,
            "segment": 4,
            "sinks": 1,
        }

    @pytest.mark.parametrize("name, least", reference.schedule.LEAST.items())
    def test_refuses_impossible_numbers(self, module, name, least):
        good = {"window": 4, "compressed": 2, "ratio": 2, "segment": 2, "sinks": 1}
        module.Schedule(**{**good, name: least})
        with pytest.raises(ValueError, match=f"{name}.*{least - 1}"):
            module.Schedule(**{**good, name: least - 1})
        for wrong in (2.0, "2", True):
            with pytest.raises(TypeError, match=name):
                module.Schedule(**{**good, name: wrong})

    def test_the_paper(self, module):
        """n_s = n_m = 8, n_cm = 4, c = 4: two slots per segment, from the third segment on."""
        law = module.Schedule(window=8, compressed=4, ratio=4, segment=8)
        assert [law.groups(8 * i) for i in range(6)] == [0, 0, 2, 4, 6, 8]
        assert law.visible(16) == (range(0), range(2), range(8, 17))
        assert law.visible(47) == (range(0), range(4, 8), range(32, 48))
        assert (law.reach, law.max_slots) == (24, 4 + 8 + 8 + 3)

    def test_tokens_wait_for_their_group(self, module):
        law = module.Schedule(window=3, compressed=2, ratio=5, segment=1, sinks=2)
        assert [law.groups(t) for t in (9, 10, 14, 15)] == [0, 1, 1, 2]
        assert law.visible(14) == (range(2), range(1), range(7, 15))


@pytest.mark.parametrize("window", WINDOWS)
def test_ctx_equals_reference(window):
    far = [10**6, 2**31 - 1, 2**31, 2**40 + 3]
    for numbers in grid(window):
        ours, theirs = ctx.Schedule(*numbers), reference.Schedule(*numbers)
        assert dataclasses.astuple(ours) == dataclasses.astuple(theirs)
        assert (ours.reach, ours.max_slots) == (theirs.reach, theirs.max_slots)
        for t in [*range(80), *far]:
            assert ours.groups(t) == theirs.groups(t)
            assert ours.window_begin(t) == theirs.window_begin(t)
            assert ours.slots(t) == theirs.slots(t)
            assert ours.visible(t) == theirs.visible(t)


@pytest.mark.parametrize("window", WINDOWS)
def test_every_token_is_exact_or_grouped_or_gone(window):
    """Semantics section 2: nothing else is visible, nothing twice, nothing missing."""
    for numbers in grid(window):
        law = reference.Schedule(*numbers)
        for t in range(60):
            sinks, groups, tokens = law.visible(t)
            exact = [*sinks, *tokens]
            grouped = [j for g in groups for j in law.members(g)]
            gone = range(law.sinks, law.sinks + law.ratio * (law.groups(t) - law.slots(t)))
            assert sorted(exact + grouped) == [j for j in range(t + 1) if j not in gone]
            assert set(range(max(0, t - law.window), t + 1)) <= set(exact)
            assert len(tokens) <= law.window + law.segment + law.ratio - 1
            assert len(exact) + len(groups) <= law.max_slots
            assert not gone or len(exact) + len(grouped) >= law.reach
            assert law.groups(t) == law.groups(law.boundary(t))


@pytest.mark.parametrize("window", WINDOWS)
def test_evicting_leaves_the_remainder(window):
    """floor((carried + evicted) / c) new slots at a boundary, the rest waits in the window."""
    for numbers in grid(window):
        law = reference.Schedule(*numbers)
        carried = 0
        for boundary in range(law.segment, 80, law.segment):
            old, new = law.groups(boundary - 1), law.groups(boundary)
            guaranteed = max(law.sinks, boundary - law.window)
            evicted = guaranteed - max(law.sinks, boundary - law.segment - law.window)
            assert new - old == (carried + evicted) // law.ratio
            carried = (carried + evicted) % law.ratio
            assert law.window_begin(boundary) + carried == guaranteed


@pytest.mark.parametrize("window", WINDOWS)
def test_max_slots_is_reached(window):
    """The bound is not just safe: where segment and ratio have no common divisor it is met."""
    for numbers in grid(window):
        law = reference.Schedule(*numbers)
        if math.gcd(law.segment, law.ratio) == 1:
            counts = [sum(len(part) for part in law.visible(t)) for t in range(100)]
            assert max(counts) == law.max_slots, law


@cases(300)
@given(schedules(), st.integers(0, 300))
def test_slot_distances_are_contiguous(numbers, t):
    """From 0 (itself) through the window and the slots to the oldest sink, without a gap."""
    law = reference.Schedule(**numbers)
    counted = law.distances(t, "slot")
    assert counted == list(reversed(range(len(counted))))
    assert max(counted) < law.max_slots


@cases(300)
@given(schedules(), st.integers(0, 300))
def test_token_distances_are_true(numbers, t):
    law = reference.Schedule(**numbers)
    sinks, groups, tokens = law.visible(t)
    middles = [sum(law.members(g)) / law.ratio for g in groups]
    assert law.distances(t, "token") == [t - j for j in [*sinks, *middles, *tokens]]


def test_reference_needs_only_torch():
    """It can be read and run without the compiled library, and imports nothing else."""
    folder = Path(reference.__file__).parent
    code = (
        "import sys, torch; before = set(sys.modules); import reference;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['reference']"
