"""ctx.KVMemory against ctx.reference.KVMemory as a machine: whatever is done, in whatever order.

pytest applies about 2,000 rules. As many as wanted, over all dtypes and compressors:

    python tests/test_stateful.py --steps 20000
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import math
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import ctx
from ctx import reference
from ragged import GARBAGE, assert_equals_reference, marks, resets, sizes
from strategies import (
    CLOSE,
    COMPRESSORS,
    DTYPES,
    Setting,
    assert_close,
    assume_clear,
    memories,
    strided,
)

STEPS = 25  # rules per example
TOKENS = 120  # per example, over all rows: the reference is slow
ROWS = 3

#: How often each rule was applied in this process.
applied: Counter[str] = Counter()


@dataclasses.dataclass
class Twins:
    """A memory and the reference of the same streams."""

    ours: Any
    theirs: Any

    @property
    def batch(self) -> int:
        return int(self.theirs.batch_size)

    def clone(self) -> Twins:
        return Twins(self.ours.clone(), self.theirs.clone())


def action(**strategies: Any) -> Callable[[Any], Any]:
    """A rule of the machine that counts itself."""

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            applied[function.__name__] += 1
            function(*args, **kwargs)

        return rule(**strategies)(run)

    return decorate


class Machine(RuleBasedStateMachine):
    """Up to three memories of one geometry. Every rule works on one of them and must leave the
    others as they are; whatever it gives is compared at once, what is held after every rule.
    """

    compressor = "mean"
    dtypes = DTYPES

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.dtype = data.draw(st.sampled_from(self.dtypes))
        self.setting: Setting = data.draw(memories(compressor=self.compressor))
        self.setting = dataclasses.replace(self.setting, batch=data.draw(st.integers(1, ROWS)))
        self.all = [self.fresh(self.setting.batch)]
        self.saved: tuple[dict[str, Any], Any] | None = None
        self.left, self.drawn = TOKENS, 0

    def fresh(self, batch: int) -> Twins:
        setting = dataclasses.replace(self.setting, batch=batch)
        return Twins(setting.memory(ctx, self.dtype), setting.memory(reference, self.dtype))

    def pick(self, data: st.DataObject) -> Twins:
        twins: Twins = data.draw(st.sampled_from(self.all))
        return twins

    def keep(self, twins: Twins) -> None:
        self.all = [*self.all[-2:], twins]

    def close(self, got: torch.Tensor, want: torch.Tensor) -> None:
        assert_close(got, want, CLOSE[self.dtype])

    def tensors(self, batch: int, tokens: int, kind: int) -> list[torch.Tensor]:
        """New q, k and v, as views of some kind."""
        s, self.drawn = self.setting, self.drawn + 3
        shapes = (s.heads, s.head_dim), (s.kv_heads, s.head_dim), (s.kv_heads, s.value_dim)
        return [
            strided(s.random([batch, h, tokens, d], self.dtype, self.drawn + i), (kind + i) % 4)
            for i, (h, d) in enumerate(shapes)
        ]

    def step(
        self, data: st.DataObject, *, ragged: bool, resetting: bool, halves: bool = False
    ) -> None:
        twins = self.pick(data)
        most = min(12, self.left // twins.batch)
        tokens = data.draw(sizes(most))
        q, k, v = self.tensors(twins.batch, tokens, data.draw(st.integers(0, 3)))
        lengths = reset_at = None
        counts = [tokens] * twins.batch
        if ragged:
            counts = [data.draw(sizes(tokens)) for _ in range(twins.batch)]
            lengths = torch.tensor(counts)
            for x in (q, k, v):
                for b, count in enumerate(counts):
                    x[b, :, count:] = data.draw(st.sampled_from(GARBAGE))
        if resetting:
            reset_at = data.draw(resets(twins.batch, tokens))
        self.left -= sum(counts)
        want = twins.theirs.step(q, k, v, counts, reset_at)
        assume_clear(twins.theirs, CLOSE[self.dtype])
        halves = halves and not self.by_usage
        if halves:
            assert twins.ours.append(k, v, lengths, reset_at) is None
        else:
            self.close(twins.ours.step(q, k, v, lengths, reset_at), want)

    @action(data=st.data())
    def step_all(self, data: st.DataObject) -> None:
        self.step(data, ragged=False, resetting=False)

    @action(data=st.data())
    def step_ragged(self, data: st.DataObject) -> None:
        self.step(data, ragged=True, resetting=False)

    @action(data=st.data(), ragged=st.booleans())
    def step_with_resets(self, data: st.DataObject, ragged: bool) -> None:
        self.step(data, ragged=ragged, resetting=True)

    @action(data=st.data(), ragged=st.booleans(), resetting=st.booleans())
    def append(self, data: st.DataObject, ragged: bool, resetting: bool) -> None:
        self.step(data, ragged=ragged, resetting=resetting, halves=True)

    @precondition(lambda self: any(self.late()))
    @action(data=st.data())
    def attend(self, data: st.DataObject) -> None:
        """Late queries, as far back as every row can go."""
        late = [(twins, most) for twins, most in zip(self.all, self.late(), strict=True) if most]
        twins, most = data.draw(st.sampled_from(late))
        tokens = data.draw(st.integers(1, min(12, most)))
        q, _, _ = self.tensors(twins.batch, tokens, data.draw(st.integers(0, 3)))
        self.close(twins.ours.attend(q), twins.theirs.attend(q))

    def late(self) -> list[int]:
        """How many tokens back each memory can be asked about."""
        return [int(twins.theirs.rewindable.min()) for twins in getattr(self, "all", [])]

    @action(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        twins = self.pick(data)
        rows = data.draw(st.none() | st.lists(st.integers(0, twins.batch - 1), max_size=3))
        twins.theirs.reset(rows)
        twins.ours.reset(data.draw(self.spellings(rows, twins.batch)))

    @action(data=st.data())
    def select(self, data: st.DataObject) -> None:
        twins = self.pick(data)
        rows = data.draw(
            st.lists(st.integers(0, twins.batch - 1), min_size=1, max_size=ROWS)
            | st.sets(st.integers(0, twins.batch - 1), min_size=1).map(sorted)
        )
        spelled = data.draw(self.spellings(rows, twins.batch))
        self.keep(Twins(twins.ours.select(spelled), twins.theirs.select(rows)))

    @staticmethod
    def spellings(rows: list[int] | None, batch: int) -> st.SearchStrategy[Any]:
        """Ways to name these rows: an index, a list, a tensor, a mask."""
        if rows is None:
            return st.none()
        ways: list[Any] = [rows, torch.tensor(rows, dtype=torch.int64)]
        if len(rows) == 1:
            ways.append(rows[0])
        if rows == sorted(set(rows)):
            ways.append(marks(1, batch, [(0, row) for row in rows])[0])
        return st.sampled_from(ways)

    @action(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        """With itself, with another memory, or alone; at most three rows."""
        parts = [self.pick(data)]
        other = self.pick(data)
        if parts[0].batch + other.batch <= ROWS:
            parts.append(other)
        ours = ctx.KVMemory.merge([twins.ours for twins in parts])
        theirs = reference.KVMemory.merge([twins.theirs for twins in parts])
        self.keep(Twins(ours, theirs))

    @action(data=st.data(), fork=st.booleans())
    def clone(self, data: st.DataObject, fork: bool) -> None:
        """Both go on."""
        twins = self.pick(data)
        ours = twins.ours.fork() if fork else twins.ours.clone()
        self.keep(Twins(ours, twins.theirs.clone()))

    @property
    def by_usage(self) -> bool:
        """Whether tokens need their queries, and cannot be taken back."""
        return self.compressor == "most_used"

    @precondition(lambda self: not self.by_usage)
    @action(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        twins = self.pick(data)
        if data.draw(st.booleans()):
            count = data.draw(sizes(int(twins.theirs.rewindable.min())))
            counts, asked = [count] * twins.batch, count
        else:
            counts = [data.draw(sizes(most)) for most in twins.theirs.rewindable.tolist()]
            asked = torch.tensor(counts)
        twins.theirs.rewind(counts)
        twins.ours.rewind(asked)

    @action(data=st.data(), beyond=st.integers(1, 5), below=st.booleans())
    def rewind_too_far(self, data: st.DataObject, beyond: int, below: bool) -> None:
        """One row asks for too much: no row is changed."""
        twins = self.pick(data)
        most = twins.theirs.rewindable
        row = data.draw(st.integers(0, twins.batch - 1))
        asked = torch.zeros_like(most)
        asked[row] = -beyond if below else most[row] + beyond
        words = "got .most_used." if self.by_usage else "tokens must be between 0 and"
        with pytest.raises(ValueError, match=words):
            twins.ours.rewind(data.draw(st.sampled_from([asked, int(asked[row])])))

    @action(data=st.data(), way=st.sampled_from(["dict", "file", "deepcopy", "pickle", "to"]))
    def survive(self, data: st.DataObject, way: str) -> None:
        """The memory goes on as a copy of itself, made in one of these ways."""
        twins = self.pick(data)
        if way == "deepcopy":
            twins.ours = copy.deepcopy(twins.ours)
        elif way == "pickle":
            twins.ours = pickle.loads(pickle.dumps(twins.ours))
        elif way == "to":
            twins.ours = twins.ours.to(dtype=self.dtype, device="cpu")
        else:
            copied = self.used(twins.batch)
            if way == "dict":
                copied.load_state_dict(twins.ours.state_dict())
            else:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "memory.pt"
                    twins.ours.save(path)
                    copied.load(path)
            twins.ours = copied

    def used(self, batch: int) -> Any:
        """A memory of the same geometry that has held something else."""
        memory = self.fresh(batch).ours
        memory.step(*(torch.full_like(x, float("nan")) for x in self.tensors(batch, 9, 0)))
        return memory

    @action(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        twins = self.pick(data)
        self.saved = copy.deepcopy(twins.ours.state_dict()), twins.theirs.clone()

    @precondition(lambda self: getattr(self, "saved", None) is not None)
    @action()
    def restore(self) -> None:
        """Back to the snapshot, perhaps many rules later, perhaps again."""
        assert self.saved is not None
        state, theirs = self.saved
        ours = self.used(theirs.batch_size)
        ours.load_state_dict(state)
        self.keep(Twins(ours, theirs.clone()))

    @invariant()
    def same(self) -> None:
        for twins in getattr(self, "all", []):
            assert_equals_reference(self.setting, twins.ours, twins.theirs, CLOSE[self.dtype])


def machine(compressor: str, dtypes: Sequence[torch.dtype]) -> type[Machine]:
    return type("Machine", (Machine,), {"compressor": compressor, "dtypes": list(dtypes)})


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_equals_reference(compressor):
    quick = settings()
    run_state_machine_as_test(
        machine(compressor, DTYPES),
        settings=settings(quick, max_examples=quick.max_examples // 5, stateful_step_count=STEPS),
    )


@pytest.mark.slow
def test_twenty_thousand_steps():
    """Every compressor in every dtype, about as often as any other; -s prints the counts."""
    applied.clear()
    apply(20_000)
    assert sum(applied.values()) >= 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description="Apply at least so many rules, and count them.")
    parser.add_argument("--steps", type=int, default=20000)
    torch.set_num_threads(1)
    apply(parser.parse_args().steps)


def apply(asked: int) -> None:
    kinds = list(itertools.product(COMPRESSORS, DTYPES))
    started = time.perf_counter()
    for done, (compressor, dtype) in enumerate(kinds, start=1):
        while sum(applied.values()) * len(kinds) < asked * done:
            missing = asked * done / len(kinds) - sum(applied.values())
            few = settings(
                max_examples=math.ceil(missing / STEPS),
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=[HealthCheck.too_slow],
            )
            run_state_machine_as_test(machine(compressor, [dtype]), settings=few)
    seconds = time.perf_counter() - started
    for name, count in applied.most_common():
        print(f"{count:8} {name}")
    print(
        f"{sum(applied.values()):8} rules in {seconds:.1f} s, {len(COMPRESSORS)} compressors, "
        f"{len(DTYPES)} dtypes, no difference"
    )


if __name__ == "__main__":
    main()
