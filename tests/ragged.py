"""Ragged batches for the property tests: random lengths and resets, padding that must not matter,
and comparison of memories row by row, where every row has come as far as it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from strategies import Setting, assert_close, assert_same_bits, strided, up_to

PAIRS = ["window", "compressed", "sink"]
GARBAGE = [float("nan"), float("inf"), -1e4]

# Streams of one batch: for every row, q [H, L, D], k [Hkv, L, D], v [Hkv, L, Dv].
Streams = list[list[Tensor]]


def sizes(most: int) -> st.SearchStrategy[int]:
    """Tokens of a call: few, none, or any number up to `most`."""
    return up_to(most, 0, *(n for n in (0, 1, 1, 2, 3) if n <= most))


def resets(batch: int, tokens: int) -> st.SearchStrategy[Tensor]:
    """bool [B, T]: nowhere, here and there, at the first token, at neighbours."""
    place = st.tuples(st.integers(0, batch - 1), st.integers(0, max(0, tokens - 1)))
    return st.lists(place, max_size=5).map(lambda places: marks(batch, tokens, places))


def marks(batch: int, tokens: int, places: Iterable[tuple[int, int]]) -> Tensor:
    """bool [B, T], true at these."""
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for row, column in places if tokens else ():
        mask[row, column] = True
    return mask


@st.composite
def cuttings(draw: st.DrawFn, totals: Sequence[int]) -> list[list[int]]:
    """How much every row brings to each call; the rows' shares add up to `totals`."""
    left, calls = [*totals], []
    while any(left):
        if len(calls) == 12:
            calls.append([*left])
        else:
            calls.append(
                [draw(up_to(n, 0, n, *(m for m in (0, 1, 1, 2, 3) if m <= n))) for n in left]
            )
        left = [n - taken for n, taken in zip(left, calls[-1], strict=True)]
    return calls


def padded(rows: Sequence[Tensor], tokens: int, garbage: float, kind: int = 0) -> Tensor:
    """Rows [heads, n, width] as a batch [B, heads, tokens, width]; garbage stands behind them."""
    heads, _, width = rows[0].shape
    batch = rows[0].new_full((len(rows), heads, tokens, width), garbage)
    for b, row in enumerate(rows):
        batch[b, :, : row.shape[1]] = row
    return strided(batch, kind)


def feed(
    memory: Any,
    streams: Streams,
    calls: Sequence[Sequence[int]],
    *,
    starts: Sequence[set[int]] | None = None,
    garbage: float = float("nan"),
    extra: int = 0,
    kind: int = 0,
) -> list[Tensor]:
    """Every row's outputs [H, L, Dv] of `memory.step` over ragged calls.

    `starts`: the tokens of each row that begin a new stream; padding is marked as well, which must
    be ignored.
    """
    at = [0] * len(streams)
    outs: list[list[Tensor]] = [[] for _ in streams]
    for lengths in calls:
        tokens = max(lengths) + extra
        cut = [[x[:, a : a + n] for x in s] for s, a, n in zip(streams, at, lengths, strict=True)]
        q, k, v = (
            padded([row[i] for row in cut], tokens, garbage, (kind + i) % 4) for i in (0, 1, 2)
        )
        reset_at = None
        if starts is not None:
            reset_at = torch.ones(len(streams), tokens, dtype=torch.bool)
            for b, n in enumerate(lengths):
                for i in range(n):
                    reset_at[b, i] = at[b] + i in starts[b]
        out = memory.step(q, k, v, torch.tensor(lengths), reset_at)
        for b, n in enumerate(lengths):
            outs[b].append(out[b, :, :n])
            assert_same_bits(out[b, :, n:], torch.zeros_like(out[b, :, n:]))
            at[b] += n
    empty = [s[0].new_empty(s[0].shape[0], 0, s[2].shape[2]) for s in streams]
    return [torch.cat([none, *parts], 1) for none, parts in zip(empty, outs, strict=True)]


def streams_of(setting: Setting, totals: Sequence[int], dtype: torch.dtype) -> Streams:
    """Random streams of these lengths, one per row; a row's numbers are its own."""
    shapes = (setting.heads, setting.head_dim), (setting.kv_heads, setting.head_dim)
    shapes += ((setting.kv_heads, setting.value_dim),)
    return [
        [setting.random([h, n, d], dtype, 20 + 3 * b + i) for i, (h, d) in enumerate(shapes)]
        for b, n in enumerate(totals)
    ]


def held(law: Any, seen: int, back: int) -> dict[str, range]:
    """Numbers of the tokens and groups that a row must hold: whatever a query of the last `back`
    tokens, of the next one, or an eviction to come needs, also once `back` tokens were taken back.
    """
    first = seen - back
    groups = range(law.groups(first) - law.slots(first), law.groups(seen - 1))
    return {
        "window": range(law.window_begin(first - 1), seen),
        "compressed": groups if law.compressed else range(0),
        "sink": range(min(law.sinks, seen)),
    }


def parts_of(memory: dict[str, Tensor], row: int, numbers: dict[str, range]) -> dict[str, Tensor]:
    """Those entries of a row's rings, [Hkv, n, width], by the rings' names."""
    found = {}
    for region in PAIRS:
        for part in ("keys", "values"):
            ring = memory[f"{region}_{part}"][row]
            found[f"{region}_{part}"] = ring[:, [n % ring.shape[1] for n in numbers[region]]]
    return found


def assert_same_row(
    law: Any,
    got: dict[str, Tensor],
    row: int,
    want: dict[str, Tensor],
    other: int,
    tolerance: float,
    *,
    exact: bool = True,
    rewindable: bool = True,
) -> None:
    """Row `row` of one memory holds what row `other` of another does.

    Bookkeeping is equal; slots are close; tokens are equal bit for bit if `exact`, else close.
    `law` is their schedule. Without `rewindable`, the two may differ in what they can take back.
    """
    seen, back = int(want["seen"][other]), int(want["rewindable"][other])
    assert int(got["seen"][row]) == seen
    if rewindable:
        assert int(got["rewindable"][row]) == back
    numbers = held(law, seen, min(back, int(got["rewindable"][row])))
    mine, yours = parts_of(got, row, numbers), parts_of(want, other, numbers)
    for name, tensor in mine.items():
        try:
            if exact and not name.startswith("compressed"):
                assert_same_bits(tensor, yours[name])
            else:
                assert_close(tensor, yours[name], tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name} of row {row}, {numbers}: {error}") from None


def assert_equals_usage(ours: Any, theirs: Any, row: int, numbers: Any, tolerance: float) -> None:
    """What a row of a ctx.KVMemory counts, and which tokens its slots are, is what the reference's
    does."""
    stream = theirs.rows[row]
    tokens = [t for t in numbers["window"] if t >= theirs.schedule.sinks]
    for name, counted, places in (
        ("attention_received", [used.tolist() for used in stream.usage], tokens),
        ("slot_positions", stream.positions, numbers["compressed"]),
    ):
        ring = ours.tensors[name][row]
        got = ring[:, [n % ring.shape[1] for n in places]]
        want = torch.tensor([counted[n] for n in places], dtype=ring.dtype)
        if len(places):
            assert_close(got, want.T, tolerance if name == "attention_received" else 0)


def assert_equals_reference(setting: Setting, ours: Any, theirs: Any, tolerance: float) -> None:
    """A ctx.KVMemory holds what a ctx.reference.KVMemory does, row by row."""
    assert_same_bits(ours.seen, theirs.seen)
    assert_same_bits(ours.rewindable, theirs.rewindable)
    for b, row in enumerate(theirs.rows):
        numbers = held(setting.law(), len(row.tokens), row.rewindable)
        mine = parts_of(ours.tensors, b, numbers)
        if theirs.by_usage:
            assert_equals_usage(ours, theirs, b, numbers, tolerance)
        for region in PAIRS:
            pairs = row.slots if region == "compressed" else row.tokens
            for i, part in enumerate(("keys", "values")):
                got = mine[f"{region}_{part}"]
                want = [pairs[n][i] for n in numbers[region]]
                if not want:
                    continue
                stacked = torch.stack(want, 1)
                assert_close(got, stacked, tolerance)
                if region != "compressed" and part == "values":
                    assert_same_bits(got, stacked)
