"""ctx::attend on the CPU: its kernels give what the composite of torch's operators gives, which
other devices use and which the tests of attention hold to the law."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx
from strategies import (
    CLOSE,
    DTYPES,
    assert_close,
    assert_same_bits,
    cases,
    schedules,
    strided,
)

ATTEND = torch.ops.ctx.attend.default
BACKWARD = torch.ops.ctx.attend_backward.default
GRADIENTS = ["q", "sink_keys", "sink_values", "compressed_keys", "compressed_values"]
GRADIENTS += ["window_keys", "window_values", "bias", "relative", "compressed_relative"]


def composite(operator, *arguments):
    """The operator as devices without kernels of ours run it."""
    return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)


@dataclasses.dataclass
class Problem:
    """Queries at any positions, each with its own numbering of the keys."""

    schedule: ctx.Schedule
    sizes: tuple[int, int, int, int, int, int]  # B, Hkv, H, T, D, Dv
    keys: tuple[int, int, int]
    position: torch.Tensor
    first: list[torch.Tensor]
    dtype: torch.dtype
    bias: int = 0
    slopes: bool = False
    distance: str = "slot"
    rotary_dim: int = 0
    interleaved: bool = False
    seed: int = 0
    past: int | None = None  # number of the first token and slot that rings hold; None: no rings
    slots_dtype: torch.dtype = torch.float32  # of the ring of slots

    def arguments(self):
        generator = torch.Generator().manual_seed(self.seed)
        batch, kv_heads, heads, tokens, head_dim, value_dim = self.sizes

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        q = strided(normal(batch, heads, tokens, head_dim), self.seed % 4)
        spans = []
        for i, count in enumerate(self.keys):
            for width in (head_dim, value_dim):
                spans.append(strided(normal(batch, kv_heads, count, width), (self.seed + i) % 4))
        bias = normal(self.bias) if self.bias else None
        slopes = normal(heads).abs() * 0.1 if self.slopes else None
        rotary = self.rotary_dim, 10000.0, self.interleaved
        optional = None, bias, slopes, None, None
        settings = self.schedule.numbers, self.distance, *rotary, head_dim**-0.5
        first, rings = self.first, []
        if self.past is not None:
            law = self.schedule
            counts = law.max_slots - law.sinks - law.compressed, law.compressed
            first = [first[0], first[1] - counts[1], first[2] - counts[0]]
            for count, dtype in zip(counts, (self.dtype, self.slots_dtype), strict=True):
                for width in (head_dim, value_dim):
                    ring = normal(batch, kv_heads, count + self.seed % 3, width)
                    rings.append(as_int8(ring) if dtype == torch.int8 else ring.to(dtype))
            numbers = torch.full((batch, 4), self.past) + torch.arange(batch).unsqueeze(1)
            rings.append(numbers - torch.tensor([0, 1, 0, 1]))  # all of them are still seen
        return (q, self.position, *spans, *first, *optional, *settings, rings)


def as_int8(x):
    """Rows as int8 slots are stored: multiples of a scale, and the scale behind."""
    if x.numel() == 0:
        return torch.empty(*x.shape[:-1], x.shape[-1] + 4, dtype=torch.int8)
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    steps = (x.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([steps, scale.view(torch.int8)], -1)


@st.composite
def problems(draw, dtype):
    """Every query sees at least itself, or a sink: the composite divides by what it sees."""
    setting = draw(schedules(sinks=draw(st.integers(0, 4))))
    law = ctx.Schedule(**setting)
    batch, kv_heads, share = draw(
        st.tuples(*[st.integers(1, 2)] * 2, st.sampled_from([1, 2, 3, 5]))
    )
    tokens = draw(st.sampled_from([1, 2, 7, 33, 64, 65, 130]))
    head_dim = draw(st.sampled_from([2, 6, 8, 20, 64]))
    value_dim = draw(st.sampled_from([head_dim, 1, 3, 16, 40]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high):
        return torch.randint(low, high, (batch, tokens), generator=generator)

    if draw(st.booleans()):  # one stream, or any positions
        first = integers(0, 100)[:, :1]
        position = first + torch.arange(tokens)
        behind = law.max_slots - law.sinks - law.compressed
        place = torch.arange(tokens).expand(batch, tokens) + behind
        size = tokens + behind
    else:
        size = draw(st.integers(1, 140))
        position, place = integers(0, 120), integers(0, size)
    slots = draw(st.integers(0, 150))
    stored = [dtype] if dtype == torch.float64 else [dtype, torch.float32, torch.int8]
    before = draw(st.integers(0, 3))
    keys = law.sinks + before, slots, size
    numbers = [torch.full_like(position, -before), integers(-5, 30), position - place]
    return Problem(
        schedule=law,
        sizes=(batch, kv_heads, kv_heads * share, tokens, head_dim, value_dim),
        keys=keys,
        position=position,
        first=numbers,
        dtype=dtype,
        bias=draw(st.sampled_from([0, 1, kv_heads * share])),
        slopes=draw(st.booleans()),
        distance=draw(st.sampled_from(["slot", "token"])),
        rotary_dim=draw(st.sampled_from([0, 2, head_dim])),
        interleaved=draw(st.booleans()),
        seed=seed,
        past=draw(st.sampled_from([None, 0, 7, 1000])),
        slots_dtype=draw(st.sampled_from(stored)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(60)
@given(data=st.data())
def test_kernels_are_the_composite(dtype, data):
    arguments = data.draw(problems(dtype)).arguments()
    got, want = ATTEND(*arguments, True), composite(ATTEND, *arguments, True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for mine, yours, kind in zip(got, want, (dtype, wide, wide), strict=True):
        assert_close(mine, yours, CLOSE[kind])
    out, logsumexp, _ = want
    given_grads = torch.randn_like(out), torch.randn_like(logsumexp)
    arguments = (*given_grads, out, logsumexp, *arguments)
    got, want = BACKWARD(*arguments), composite(BACKWARD, *arguments)
    for name, mine, yours in zip(GRADIENTS, got, want, strict=True):
        assert mine.is_contiguous(), name
        try:
            assert_close(mine, yours, 5 * CLOSE[dtype])
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def stream(tokens=70, dtype=torch.float32, heads=(1, 2), seed=0, **options):
    """A stream from its start: all of its keys, and slots of numbers from zero on."""
    kv_heads, all_heads = heads
    position = torch.arange(tokens).unsqueeze(0)
    return Problem(
        schedule=ctx.Schedule(20, 6, 4, 8, 2),
        sizes=(1, kv_heads, all_heads, tokens, 16, 16),
        keys=(2, tokens // 4, tokens),
        position=position,
        first=[torch.zeros_like(position)] * 3,
        dtype=dtype,
        bias=all_heads,
        rotary_dim=16,
        seed=seed,
        **options,
    )


def gradients(arguments, cotangent=None):
    out, logsumexp, _ = ATTEND(*arguments, False)
    cotangent = torch.ones_like(out) if cotangent is None else cotangent
    return BACKWARD(cotangent, torch.zeros_like(logsumexp), out, logsumexp, *arguments)


def test_hidden_keys_do_not_matter():
    """The last token's pair, seen by its own query alone: any finite numbers, even if their
    products are none."""
    arguments = [x.contiguous() if torch.is_tensor(x) else x for x in stream().arguments()]
    other = list(arguments)
    other[6], other[7] = other[6].clone(), other[7].clone()
    other[6][:, :, -1], other[7][:, :, -1] = 1e20, 3e38
    want, got = ATTEND(*arguments, False)[0], ATTEND(*other, False)[0]
    assert_same_bits(got[:, :, :-1], want[:, :, :-1])
    assert not torch.equal(got[:, :, -1], want[:, :, -1])
    cotangent = torch.ones_like(want)
    cotangent[:, :, -1] = 0
    for mine, yours in zip(
        gradients(other, cotangent), gradients(arguments, cotangent), strict=True
    ):
        assert_same_bits(mine, yours)


def test_query_that_sees_nothing():
    """Before its stream, or with keys that are all others': zeros, minus infinity, no gradient."""
    problem = stream()
    problem.position = problem.position.clone()
    problem.position[:, 0] = -1
    first = problem.first[2].clone()
    first[:, 40] = 1000
    problem.first = [first, first, first]
    arguments = problem.arguments()
    out, logsumexp, region_weights = ATTEND(*arguments, True)
    blind = torch.zeros(70, dtype=torch.bool)
    blind[[0, 40]] = True
    assert (out[:, :, blind] == 0).all() and (region_weights[:, :, blind] == 0).all()
    assert (logsumexp[:, :, blind] == -torch.inf).all()
    assert out[:, :, ~blind].abs().amin() > 0 and logsumexp[:, :, ~blind].isfinite().all()
    grads = gradients(arguments)
    assert (grads[0][:, :, blind] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    seeing = torch.where(blind[:, None], 0.0, torch.ones_like(out))
    for mine, yours in zip(gradients(arguments, seeing), grads, strict=True):
        assert_same_bits(mine, yours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_output(dtype):
    """Outputs and gradients of queries bit for bit; sums over queries are cut into as many parts as
    keep all threads at work, always in the same order."""
    arguments = stream(tokens=300, dtype=dtype, heads=(1, 3)).arguments()
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            results.append((*ATTEND(*arguments, True), *gradients(arguments)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for i, (mine, yours) in enumerate(zip(other, results[0], strict=True)):
            assert_same_bits(mine, yours) if i < 4 else assert_close(mine, yours, CLOSE[dtype])
    for mine, yours in zip(results[1], results[3], strict=True):
        assert_same_bits(mine, yours)


def variant(name, program, *arguments):
    """Runs a program of this file's folder with the kernels of one instruction set."""
    environment = {**os.environ, "CTX_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"}
    paths = [os.path.dirname(__file__), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


SAVE = """
import sys, torch, test_spans
from strategies import DTYPES
results = []
for dtype in DTYPES:
    arguments = test_spans.stream(tokens=150, dtype=dtype, heads=(2, 6)).arguments()
    results += [*test_spans.ATTEND(*arguments, True), *test_spans.gradients(arguments)]
torch.save(results, sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path):
    results: dict[str, Any] = {}
    for name in ("default", "avx2", "avx512"):
        done = variant(name, SAVE, tmp_path / name)
        if done.returncode == 0:
            results[name] = torch.load(tmp_path / name)
        else:
            assert name != "default" and "CTX_CPU_CAPABILITY: must be" in done.stderr, done.stderr
    for name, got in results.items():
        for mine, yours in zip(got, results["default"], strict=True):
            assert_close(mine, yours, 5 * CLOSE[mine.dtype])
        assert len(got) == len(DTYPES) * 13, name


PEAK = """
import resource, sys, torch, test_spans
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
test_spans.gradients(test_spans.stream(heads=(4, 4)).arguments())
tokens = int(sys.argv[1])
problem = test_spans.stream(tokens=tokens, heads=(4, 4))
problem.schedule = test_spans.ctx.Schedule(tokens, 0, 4, 8, 0)
arguments = problem.arguments()
before = peak()
test_spans.gradients(arguments)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_no_scores_beyond_a_block():
    """Scores of all pairs would be 4 heads x 3000 x 3000 numbers, 137 MiB; operands are 3 MiB."""
    done = variant("", PEAK, 3000)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * 2**20
