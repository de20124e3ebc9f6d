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
from ctx import engine
from ctx.state import TENSORS
from strategies import CLOSE, DTYPES, assert_close, assert_same_bits, cases, schedules, strided

ATTEND = torch.ops.ctx.attend.default
BACKWARD = torch.ops.ctx.attend_backward.default
GROUPS = torch.ops.ctx.evicted_groups.default
GRADIENTS = ["q", "k", "v", "slot keys", "slot values", "slot mass", "bias"]
GRADIENTS += [f"relative {i}" for i in range(5)] + [f"memory {i}" for i in range(6)]


def composite(operator, *arguments):
    """The operator as devices without kernels of ours run it."""
    return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)


@dataclasses.dataclass
class Problem:
    """A call over a memory in the middle of a stream, or over none."""

    settings: ctx.AttentionSettings
    sizes: tuple[int, int, int, int, int, int]  # B, Hkv, H, T, D, Dv
    seen: int | None = None  # tokens in the memory; None: there is none
    dtype: torch.dtype = torch.float32
    slots_dtype: torch.dtype | None = None
    compressor: str = "mean"
    ragged: str = "uniform"
    bias: int = 0
    relative_dim: int = 0
    seed: int = 0

    def call(self):
        """k, v, plan, memory, packed settings, and the rest of the operator's arguments."""
        generator = torch.Generator().manual_seed(self.seed)
        batch, kv_heads, heads, tokens, head_dim, value_dim = self.sizes

        def normal(*shape, dtype=self.dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def pairs(count):
            shapes = (heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim)
            return [
                strided(normal(batch, n, count, width), (self.seed + i) % 4)
                for i, (n, width) in enumerate(shapes)
            ]

        settings, position = self.settings, self.settings.position
        resolved = settings.resolved(head_dim)
        packed = engine.law_of(resolved, self.compressor, head_dim, 0)
        slopes = normal(heads).abs() * 0.1 if position == "alibi" else None
        relative = []
        if position == "relative":
            sizes = [(heads, head_dim), (heads, head_dim, self.relative_dim)]
            relative = [normal(*sizes[i]) for i in (0, 0, 1, 0, 1)]
        rings: list[Any] = []
        seen = torch.zeros(batch, dtype=torch.int64)
        if self.seen is not None:
            made = ctx.KVMemory(
                dataclasses.replace(settings, position=None, keys="plain"),
                *(batch, kv_heads, head_dim, value_dim),
                compressor=self.compressor, dtype=self.dtype, compressed_dtype=self.slots_dtype,
                max_rewind=3,
            )  # fmt: skip
            counts = torch.arange(batch) + max(0, self.seen - batch + 1)
            most = int(counts.max())
            made.step(*pairs(most), counts) if most else None
            rings, seen = [made.tensors[name] for name in TENSORS], made.seen
        lengths, reset_at = None, None
        if self.ragged == "lengths":
            lengths = torch.randint(0, tokens + 1, (batch,), generator=generator)
        if self.ragged == "documents":
            reset_at = torch.rand(batch, tokens, generator=generator) < 0.1
        plan = torch.ops.ctx.plan(
            seen, lengths, reset_at, tokens, packed.settings, self.seen is not None
        )
        q, k, v = pairs(tokens)
        keys, values = GROUPS(k, v, plan, rings, *packed)
        slots = [keys.mean(3), values.mean(3)]
        if settings.slot_mass:
            slots.append(normal(*keys.shape[:3], dtype=keys.dtype))
        if self.compressor == "most_used":
            slots += [] if settings.slot_mass else [keys.new_zeros(0)]
            slots.append(torch.randint(0, 200, keys.shape[:3], generator=generator))
        bias = normal(self.bias) if self.bias else None
        return (q, k, v, plan, rings, slots, bias, slopes, relative, *packed)


@st.composite
def problems(draw, dtype):
    setting = draw(schedules(sinks=draw(st.integers(0, 4))))
    position = draw(st.sampled_from(["rotary", "alibi", "relative", None]))
    head_dim = draw(st.sampled_from([2, 6, 8, 20, 64]))
    batch, kv_heads, share = draw(
        st.tuples(*[st.integers(1, 2)] * 2, st.sampled_from([1, 2, 3, 5]))
    )
    stored = [dtype] if dtype == torch.float64 else [dtype, torch.float32, torch.int8]
    compressor = draw(st.sampled_from(["mean", "mean", "most_used"]))
    rotary = position == "rotary"
    settings = ctx.AttentionSettings(
        schedule=ctx.Schedule(**setting),
        position=position,
        distance=draw(st.sampled_from(["slot", "token"])),
        rotary_dim=draw(st.sampled_from([2, head_dim])) if rotary else None,
        rotary_interleaved=draw(st.booleans()),
        attention_factor=draw(st.sampled_from([1.0, 1.0, 1.25])) if rotary else 1.0,
        keys=draw(st.sampled_from(["plain", "plain", "rotated"])) if rotary else "plain",
        slot_mass=draw(st.booleans()),
        logit_softcap=draw(st.sampled_from([None, None, 2.0])),
    )
    return Problem(
        settings=settings,
        sizes=(
            *(batch, kv_heads, kv_heads * share),
            draw(st.sampled_from([1, 2, 7, 33, 64, 65, 130])),
            head_dim,
            draw(st.sampled_from([head_dim, 1, 3, 16, 40])),
        ),
        seen=draw(st.sampled_from([None, 0, 1, 7, 60])),
        dtype=dtype,
        slots_dtype=draw(st.sampled_from(stored)),
        compressor=compressor,
        ragged=draw(st.sampled_from(["uniform", "lengths", "documents"])),
        bias=draw(st.sampled_from([0, 1, kv_heads * share])),
        relative_dim=draw(st.sampled_from([2, 8, 18])),
        seed=draw(st.integers(0, 2**31)),
    )


def whole_groups(plan, settings, tokens):
    """bool [B, G]: groups whose last token is the call's or comes before it; others are any."""
    ratio, sinks = settings[2], settings[4]
    header = torch.ops.ctx.plan(torch.zeros(1, dtype=torch.int64), None, None, 0, settings, False)
    columns = plan[:, header.shape[1] :]
    position, groups = columns[:, :tokens], columns[:, 4 * tokens :]
    groups = groups[:, : groups.shape[1] // 2 * 2]  # a last column says that rows may begin anew
    place, number = groups.chunk(2, 1)
    last = place + ratio - 1
    token = number * ratio + sinks + ratio - 1
    inside = position.gather(1, last.clamp(0, max(tokens - 1, 0)))
    return torch.where(last < 0, plan[:, :1] + last == token, (last < tokens) & (inside == token))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(60)
@given(data=st.data())
def test_kernels_are_the_composite(dtype, data):
    arguments = data.draw(problems(dtype)).call()
    _, k, v, plan, rings, *_ = arguments
    due = whole_groups(plan, arguments[9], k.shape[2])[:, None, :, None, None]
    for mine, yours in zip(
        GROUPS(k, v, plan, rings, *arguments[9:]),
        composite(GROUPS, k, v, plan, rings, *arguments[9:]),
        strict=True,
    ):
        assert_close(mine.where(due, 0.0), yours.where(due, 0.0), CLOSE[mine.dtype])
    got, want = ATTEND(*arguments, True), composite(ATTEND, *arguments, True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Relative queries are rounded to the dtype of the content queries for the kernels.
    loose = 4 if arguments[8] else 1
    tolerance = CLOSE[dtype] if loose > 1 else CLOSE[wide]
    for mine, yours, close in zip(got, want, (CLOSE[dtype], tolerance, tolerance), strict=True):
        assert torch.equal(mine.isinf(), yours.isinf())  # the log-sum-exp of padding
        assert_close(mine.nan_to_num(neginf=0), yours.nan_to_num(neginf=0), loose * close)
    out, logsumexp, _ = want
    given_grads = torch.randn_like(out), torch.randn_like(logsumexp)
    floats = bool(rings) and rings[2].dtype == dtype
    arguments = (*given_grads, out, logsumexp, *arguments, floats)
    got, want = BACKWARD(*arguments), composite(BACKWARD, *arguments)
    for name, mine, yours in zip(GRADIENTS, got, want, strict=False):
        assert mine.is_contiguous(), name
        try:
            assert_close(mine, yours, loose * 5 * CLOSE[dtype])
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
    assert len(got) == len(want) == 7 + len(arguments[12]) + 6 * floats


def stream(tokens=70, dtype=torch.float32, heads=(1, 2), seed=0, schedule=None):
    """A stream from its start."""
    kv_heads, all_heads = heads
    settings = ctx.AttentionSettings(schedule=schedule or ctx.Schedule(20, 6, 4, 8, 2))
    return Problem(
        settings,
        (1, kv_heads, all_heads, tokens, 16, 16),
        dtype=dtype,
        bias=all_heads,
        seed=seed,
    )


def gradients(arguments, cotangent=None):
    out, logsumexp, _ = ATTEND(*arguments, False)
    cotangent = torch.ones_like(out) if cotangent is None else cotangent
    return BACKWARD(cotangent, torch.zeros_like(logsumexp), out, logsumexp, *arguments, False)


def test_hidden_keys_do_not_matter():
    """The last token's pair, seen by its own query alone: any finite numbers, even if their
    products are none."""
    arguments = [x.contiguous() if torch.is_tensor(x) else x for x in stream().call()]
    other = list(arguments)
    other[1], other[2] = other[1].clone(), other[2].clone()
    other[1][:, :, -1], other[2][:, :, -1] = 1e20, 3e38
    want, got = ATTEND(*arguments, False)[0], ATTEND(*other, False)[0]
    assert_same_bits(got[:, :, :-1], want[:, :, :-1])
    assert not torch.equal(got[:, :, -1], want[:, :, -1])
    cotangent = torch.ones_like(want)
    cotangent[:, :, -1] = 0
    for mine, yours in zip(
        gradients(other, cotangent), gradients(arguments, cotangent), strict=True
    ):
        assert_same_bits(mine, yours)


def test_padding_sees_nothing():
    """Zeros, minus infinity, and no gradient, whatever the gradient of its output is."""
    problem = dataclasses.replace(stream(), ragged="lengths", seed=3)
    arguments = problem.call()
    count = int(arguments[3][0, 1])
    assert 0 < count < 70
    out, logsumexp, region_weights = ATTEND(*arguments, True)
    assert (out[:, :, count:] == 0).all() and (region_weights[:, :, count:] == 0).all()
    assert (logsumexp[:, :, count:] == -torch.inf).all()
    assert out[:, :, :count].abs().amin() > 0 and logsumexp[:, :, :count].isfinite().all()
    grads = gradients(arguments)
    assert (grads[0][:, :, count:] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    seeing = torch.ones_like(out)
    seeing[:, :, count:] = 0
    for mine, yours in zip(gradients(arguments, seeing), grads, strict=True):
        assert_same_bits(mine, yours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype):
    """Sums over queries are cut by sizes alone, always in the same order."""
    arguments = stream(tokens=600, dtype=dtype, heads=(1, 3)).call()
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append((*ATTEND(*arguments, True), *gradients(arguments)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for mine, yours in zip(other, results[0], strict=True):
            assert_same_bits(mine, yours)


def variant(name, program, *arguments):
    """Runs a program of this file's folder with the kernels of one instruction set."""
    environment = {**os.environ, "CTX_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"}
    paths = [os.path.dirname(__file__), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


SAVE = """
import sys, torch, test_attend
from strategies import DTYPES
results = []
for dtype in DTYPES:
    arguments = test_attend.stream(tokens=150, dtype=dtype, heads=(2, 6)).call()
    results += [*test_attend.ATTEND(*arguments, True), *test_attend.gradients(arguments)]
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
        assert len(got) == len(DTYPES) * 10, name


PEAK = """
import resource, sys, torch, test_attend
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
test_attend.gradients(test_attend.stream(heads=(4, 4)).call())
tokens = int(sys.argv[1])
schedule = test_attend.ctx.Schedule(tokens, 0, 4, 8, 0)
arguments = test_attend.stream(tokens=tokens, heads=(4, 4), schedule=schedule).call()
before = peak()
test_attend.gradients(arguments)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_no_scores_beyond_a_block():
    """Scores of all pairs would be 4 heads x 3000 x 3000 numbers, 137 MiB; operands are 3 MiB."""
    done = variant("", PEAK, 3000)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * 2**20
