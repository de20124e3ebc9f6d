"""The CPU kernels: every width, sharing of heads, splitting and instruction set gives one result.

test_memory.py compares whole streams of small memories with the reference; here are the sizes at
which the kernels take another way: vectors with and without a rest, several rows at once, slots
that are split over threads.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import ctx
from ctx import _C, engine, reference
from strategies import CLOSE, COMPRESSORS, DTYPES, assert_close, assert_same_bits, pieces

F64 = torch.float64
# Head widths: multiples of 8 up to 256, of every vector and of none.
EVEN = [2, 6, 8, 10, 16, 24, 40, 64, 72, 80, 96, 128, 136, 200, 256]
ODD = [1, 3, 7, 33, 65]
SHARES = [1, 2, 3, 4, 5, 7, 8]


def drawn(*sizes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator, dtype=F64).to(dtype)


def inputs(batch, heads, kv_heads, length, head_dim, value_dim, dtype):
    q = drawn(batch, heads, length, head_dim, dtype=dtype, seed=1)
    k = drawn(batch, kv_heads, length, head_dim, dtype=dtype, seed=2)
    return [q, k, drawn(batch, kv_heads, length, value_dim, dtype=dtype, seed=3)]


def streamed(module, tensors, sizes, compressor="mean", **options):
    """Outputs and memory over a stream through all three regions."""
    q, k, v = tensors
    law = module.Schedule(window=9, compressed=5, ratio=3, segment=4, sinks=2)
    memory = module.KVMemory(
        law, len(q), k.shape[1], k.shape[3], v.shape[3], compressor=compressor, **options
    )
    return torch.cat([memory.step(*piece) for piece in pieces(tensors, sizes)], 2), memory


CUTS = [1, 1, 40, 3, 1]  # single queries, more of them than a block of tokens, and few


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", EVEN + ODD)
def test_widths(head_dim, dtype):
    """Keys of any width, values of another, equal the reference."""
    value_dim = ([*EVEN, *ODD] * 2)[(EVEN + ODD).index(head_dim) + 4]
    share = SHARES[head_dim % len(SHARES)]
    options = {"dtype": dtype, "position": "rotary" if head_dim % 2 == 0 else None}
    tensors = inputs(2, 2 * share, 2, sum(CUTS), head_dim, value_dim, dtype)
    got, _ = streamed(ctx, tensors, CUTS, **options)
    want, _ = streamed(reference, tensors, [sum(CUTS)], **options)
    assert_close(got, want, CLOSE[dtype])


@pytest.mark.parametrize("share", [*SHARES, 40])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_shares(share, tokens):
    """Any number of query heads for a kv head, any number of tokens at once."""
    tensors = inputs(1, 2 * share, 2, 66, 16, 8, F64)
    got, _ = streamed(ctx, tensors, [tokens] * (66 // tokens), dtype=F64)
    want, _ = streamed(reference, tensors, [66], dtype=F64)
    assert_close(got, want, CLOSE[F64])


def long_window(slots, kv_heads, head_dim, dtype):
    """A memory whose last token sees exactly `slots` tokens, around the end of its ring."""
    law = ctx.Schedule(window=slots - 1, compressed=0, ratio=1, segment=1)
    memory = ctx.KVMemory(law, 1, kv_heads, head_dim, dtype=dtype, position=None, max_rewind=40)
    k = drawn(1, kv_heads, slots + 100, head_dim, dtype=dtype, seed=2)
    v = drawn(1, kv_heads, slots + 100, head_dim, dtype=dtype, seed=3)
    memory.append(k, v)
    return memory, k[:, :, -slots:], v[:, :, -slots:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [255, 256, 511, 512, 513, 1700])
def test_split_slots(slots, dtype):
    """Slots attended to in parts, and the parts merged, are attended to: torch agrees."""
    memory, k, v = long_window(slots, 2, 8, dtype)
    q = 3 * drawn(1, 6, 1, 8, dtype=dtype, seed=1)
    want = scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert_close(memory.attend(q).double(), want, CLOSE[dtype])


def test_split_slots_of_scores_far_apart():
    """The largest score may be in any part; the others' weights vanish and nothing overflows."""
    memory, k, v = long_window(1700, 1, 8, torch.float32)
    for scale in (1e-30, 1.0, 300.0, 1e20):
        q = scale * drawn(1, 1, 1, 8, dtype=torch.float32, seed=1)
        want = scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert_close(memory.attend(q).double(), want, 1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_number_of_threads_changes_no_bit(tokens):
    memory, _, _ = long_window(1700, 2, 24, torch.float32)
    q = drawn(1, 6, tokens, 24, dtype=torch.float32, seed=1)
    alone = memory.attend(q)
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert_same_bits(memory.attend(q), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_tokens_do_not_see_later_ones_of_their_call(poison):
    """Queries that share their reading of slots share nothing else."""
    tensors = inputs(1, 4, 2, 60, 8, 8, F64)
    want, _ = streamed(ctx, tensors, [60], dtype=F64)
    for at in (0, 17, 40, 59):
        poisoned = [x.clone() for x in tensors]
        for x in poisoned:
            x[:, :, at:] = poison
        got, _ = streamed(ctx, poisoned, [60], dtype=F64)
        assert_close(got[:, :, :at], want[:, :, :at], CLOSE[F64])
        assert got[:, :, at:].isnan().all()


def law(rotary_dim, base=10000.0):
    """What operators take of settings, of which the rotation matters."""
    settings = ctx.AttentionSettings(
        schedule=ctx.Schedule(1, 1, 1), rotary_dim=rotary_dim, rotary_base=base
    )
    return engine.law_of(settings.resolved(rotary_dim), "mean", rotary_dim, 0)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_angles(dtype):
    """Cosines and sines of any angle, those that a short reduction cannot reach among them."""
    near = [quarter * math.pi / 2 + e for quarter in range(-9, 10) for e in (-1e-9, 0, 1e-9, 0.7)]
    edge = 2.0**20 * math.pi / 2  # where reduction in three steps ends
    far = [edge * f for f in (0.5, 0.999, 1, 1.001, 3)] + [1e9 + 1, 2.0**53 - 1, 1e15 / 3]
    positions = torch.tensor([*near, *far, *[-x for x in far]], dtype=F64)
    x = torch.tensor([1.0, 0.0], dtype=dtype).expand(1, 1, len(positions), 2)
    # The operator takes whole positions; the base scales them for none of the two channels.
    whole = positions.round().long()
    got = torch.ops.ctx.rotary(x, whole[None], *law(2))[0, 0]
    want = torch.stack([whole.double().cos(), whole.double().sin()], -1).to(dtype)
    assert_close(got, want, 3e-16 if dtype == F64 else 1e-7)
    base = 7.3e3
    wide = torch.arange(1, 21, dtype=F64).to(dtype).expand(1, 1, 50, 20)
    steps = torch.arange(50) * 977
    got = torch.ops.ctx.rotary(wide, steps[None], *law(20, base))[0, 0]
    assert_close(got, reference.Rotary(base).rotate(wide[0, 0], steps.tolist()), CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compressor", ["conv", "gated"])
@pytest.mark.parametrize("head_dim", [6, 64, 72])
def test_many_groups_at_once(compressor, head_dim, dtype):
    """A slot has the same bits whether it is made alone or beside others."""
    tensors = inputs(2, 2, 2, 120, head_dim, 24, dtype)
    torch.manual_seed(0)
    module = getattr(ctx.compression, compressor.capitalize())(2, 3, head_dim, 24)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    _, whole = streamed(ctx, tensors, [120], module, dtype=dtype, max_rewind=120)
    _, single = streamed(ctx, tensors, [1] * 120, module, dtype=dtype, max_rewind=120)
    for name in ("compressed_keys", "compressed_values"):
        assert_same_bits(whole.tensors[name], single.tensors[name])


# --- instruction sets ---------------------------------------------------------------------------


def variant_cases():
    """What all instruction sets compute: {name: tensor}."""
    results = {}
    for number, head_dim in enumerate(EVEN + ODD):
        dtype = DTYPES[number % len(DTYPES)]
        compressor = COMPRESSORS[number // 2 % len(COMPRESSORS)]
        share = SHARES[number % len(SHARES)]
        options = {"dtype": dtype, "position": "rotary" if head_dim % 2 == 0 else None}
        tensors = inputs(2, 2 * share, 2, sum(CUTS), head_dim, head_dim + number % 3, dtype)
        out, memory = streamed(ctx, tensors, CUTS, compressor, **options)
        results[f"{head_dim} out"] = out
        results.update({f"{head_dim} {name}": x for name, x in memory.tensors.items()})
    for dtype in DTYPES:
        memory, _, _ = long_window(1700, 2, 40, dtype)
        results[f"{dtype} long"] = memory.attend(drawn(1, 6, 1, 40, dtype=dtype, seed=1))
    return results


def run_variant(name, *arguments):
    return subprocess.run(
        [sys.executable, __file__, *arguments],
        env={
            **os.environ,
            "CTX_CPU_CAPABILITY": name,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def unsupported(result):
    return "must be an instruction set of this processor" in result.stderr


@pytest.mark.parametrize("name", _C.cpu_capabilities())
def test_instruction_sets_agree(name, tmp_path):
    """Each instruction set, in a process of its own, computes what this one does."""
    result = run_variant(name.lower(), str(tmp_path / "results.pt"))
    if unsupported(result):
        pytest.skip(f"this processor has no {name}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [name]
    got, want = torch.load(tmp_path / "results.pt"), variant_cases()
    assert list(got) == list(want)
    for case, x in want.items():
        if x.is_floating_point():
            assert_close(got[case], x, CLOSE[x.dtype])
        else:
            assert_same_bits(got[case], x)


def test_unknown_instruction_set_is_refused():
    result = run_variant("sse9", os.devnull)
    assert result.returncode != 0
    assert "ValueError: CTX_CPU_CAPABILITY: must be one of DEFAULT" in result.stderr
    assert "got sse9" in result.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_C.cpu_capability())
    torch.save(variant_cases(), sys.argv[1])
