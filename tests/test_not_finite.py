"""A number that a query does not see has no influence on it, nor, through it, on any gradient: NaN,
infinities and huge numbers planted in padding, in the future and in other documents leave outputs
and all gradients as they are with clean inputs. In random models, in both paths."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import ctx
from pairwise import pairwise
from strategies import COMPRESSORS, new_streams, operands, plan_of

F64 = torch.float64
MODELS = 300
PARTS = 12  # tests that share the models
HUGE = {torch.float32: 1e38, F64: 1e307}
CLOSE = {torch.float32: 2e-4, F64: 1e-10}


@dataclasses.dataclass
class Case:
    """A random model, a call, and tokens of it that the kept ones do not see."""

    attention: ctx.CompressiveAttention
    x: Tensor  # [B, T, E]
    memory: Any
    kept: Tensor  # bool [B, T]: what a loss looks at
    unseen: Tensor  # bool [B, T]: where something may be planted
    rows: dict[str, Tensor]

    def planted(self, draw: random.Random) -> Tensor:
        """The same inputs with one bad number or more, each somewhere in an unseen token."""
        x = self.x.clone()
        places = self.unseen.nonzero().tolist()
        huge = HUGE[x.dtype]
        for b, t in draw.sample(places, min(len(places), draw.choice([1, 2, 5]))):
            bad = draw.choice([float("nan"), float("inf"), -float("inf"), huge, -huge])
            where = slice(None) if draw.random() < 0.5 else draw.randrange(x.shape[2])
            x[b, t, where] = bad
        return x


def model(draw: random.Random, dtype: torch.dtype) -> ctx.CompressiveAttention:
    kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([2, 4, 8])
    heads = kv_heads * draw.choice([1, 2, 3])
    compressor, content = draw.choice(COMPRESSORS), draw.choice(["kv", "kv", "hidden"])
    if compressor == "most_used":
        content = "kv"
    ratio = draw.choice([1, 2, 3, 4])
    attention = ctx.CompressiveAttention(
        heads * head_dim,
        heads,
        kv_heads,
        window=draw.randrange(9),
        compressed=draw.randrange(6),
        ratio=ratio,
        segment=draw.choice([None, 1, 2, 5]),
        sinks=draw.randrange(4),
        compressor=compressor,
        compressor_kernel=ratio + draw.randrange(3) if compressor == "conv" else None,
        memory_content=content,
        position=draw.choice(["rotary", "relative", "alibi", None]),
        distance=draw.choice(["slot", "token"]),
        compressed_bias=draw.choice(["none", "log_ratio", "learned"]),
        compressor_grad=draw.choice(["task", "task", "aux"]),
        aux_loss=None if compressor == "most_used" else "reconstruction",
        bias=draw.random() < 0.5,
        dtype=dtype,
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attention


def case(seed: int, kind: str) -> Case:
    """kind: "padding", "future" (later tokens) or "document" (another one of the row)."""
    draw = random.Random(f"{seed} {kind}")
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, F64])
    attention = model(draw, dtype)
    batch, tokens = draw.choice([1, 2, 3]), draw.choice([2, 5, 9, 24, 40, 90])
    x = torch.randn(batch, tokens, attention.embed_dim, dtype=dtype)
    memory = None
    if draw.random() < 0.6:
        with torch.no_grad():
            before = torch.randn(batch, draw.choice([1, 7, 30]), attention.embed_dim, dtype=dtype)
            memory = attention(before)[1]
    place = torch.arange(tokens)
    row = torch.tensor([[draw.randrange(1, tokens)] for _ in range(batch)])
    if kind == "padding":
        kept = place < row
        rows = {"lengths": row[:, 0]}
        if draw.random() < 0.5:  # on the left, or anywhere
            kept = place >= row if draw.random() < 0.5 else torch.rand(batch, tokens) < 0.6
            rows = {"mask": kept}
        return Case(attention, x, memory, kept, ~kept, rows)
    if kind == "future":
        kept = place < row
        return Case(attention, x, memory, kept, ~kept, {})
    begins = torch.rand(batch, tokens) < 2.5 / tokens
    begins.scatter_(1, row, True)
    document = begins.cumsum(1)
    chosen = document.gather(1, row)  # a document that begins in the call; the others are unseen
    kept = document == chosen
    return Case(attention, x, memory, kept, ~kept, {"reset_at": begins})


def differentiated(case: Case, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Outputs where they are kept, and the gradient of a loss on them, by name."""
    x = x.clone().requires_grad_()
    padded = not {"lengths", "mask"}.isdisjoint(case.rows)  # the loss looks at all tokens
    aux = padded and case.attention.aux_loss is not None
    y, memory, *loss = case.attention(x, case.memory, **case.rows, return_aux=aux)
    kept = case.kept.unsqueeze(-1)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y = torch.where(kept, y, 0.0)
    total = torch.where(kept, y * weight, 0.0).sum() + sum(loss)
    named = {"x": x, **dict(case.attention.named_parameters())}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(named, found, strict=True) if g is not None}
    return y.detach(), gradients, memory


def assert_same(case: Case, got: Tensor, want: Tensor, what: str) -> None:
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    error = float((got - want).abs().max()) if want.numel() else 0.0
    assert error <= CLOSE[want.dtype] * scale, f"{what}: {error} of {scale} in {case.attention}"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", ["padding", "future", "document"])
def test_what_is_not_seen(kind, part):
    """Outputs and all gradients of a differentiable call, and outputs of a streaming one."""
    for seed in range(part, MODELS, PARTS):
        one = case(seed, kind)
        dirty = one.planted(random.Random(seed))
        want, clean_gradients, _ = differentiated(one, one.x)
        got, gradients, memory = differentiated(one, dirty)
        assert_same(one, got, want, "output")
        assert gradients.keys() == clean_gradients.keys()
        for name, gradient in clean_gradients.items():
            assert_same(one, gradients[name], gradient, f"gradient of {name}")
        with torch.no_grad():
            streamed = None if one.memory is None else ctx.rows.clone(one.memory)
            y, written = one.attention(dirty, streamed, **one.rows)
        kept = one.kept.unsqueeze(-1)
        assert_same(one, torch.where(kept, y, 0.0), want, "streamed output")
        if kind == "padding":  # nothing of it is remembered: the streams go on as if it were clean
            more = torch.randn_like(one.x[:, :3])
            clean = one.attention(one.x, one.memory, **one.rows)[1]
            with torch.no_grad():
                expected = one.attention(more, clean)[0]
                for held in (memory, written):
                    assert_same(one, one.attention(more, held)[0], expected, "what follows")


@pytest.mark.parametrize("position", ["rotary", "relative", "alibi", None])
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("distance", ["slot", "token"])
def test_a_bad_token_is_felt_from_where_it_stands(position, compressor, distance):
    """One call or token by token: the tokens before it are finite and alike, it is not, and a
    stream that begins anew afterwards is as clean as a fresh one."""
    options = {"window": 3, "compressed": 2, "ratio": 2, "distance": distance}
    attention = ctx.CompressiveAttention(
        8, 2, 1, position=position, compressor=compressor, dtype=F64, **options
    )
    x = torch.randn(1, 12, 8, dtype=F64)
    x[0, 5] = float("nan")
    anew = torch.zeros(1, 12, dtype=torch.bool)
    anew[0, 8] = True
    fresh = attention(x[:, 8:])[0]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            whole = attention(x, reset_at=anew)[0]
            parts, memory = [], None
            for t in range(12):
                y, memory = attention(x[:, t : t + 1], memory, reset_at=anew[:, t : t + 1])
                parts.append(y)
        for y in (whole, torch.cat(parts, 1)):
            assert y[0, 5].isnan().all() and y[0, :5].isfinite().all()
            torch.testing.assert_close(y[:, 8:], fresh, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(whole[:, :5], torch.cat(parts, 1)[:, :5], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("position", ["rotary", "relative", "alibi", None])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_operators_alone(position, compressor):
    """ctx::attend_sequence and ctx::evicted_groups: NaN at padding of q, k and v reaches no
    gradient, of the bias and of the compressor neither."""
    attention = ctx.CompressiveAttention(
        8, 2, 1, window=2, compressed=2, ratio=2, position=position, compressor=compressor
    ).double()
    tensors = [torch.randn(2, heads, 9, 4, dtype=F64) for heads in (2, 1, 1)]
    lengths = torch.tensor([9, 6])
    dirty = [x.clone() for x in tensors]
    for x in dirty:
        x[1, :, 6:] = float("nan")
    weight = torch.randn(2, 2, 9, 4, dtype=F64)
    parameters = [p for name, p in attention.named_parameters() if "proj" not in name]

    def gradients(inputs):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        plan = plan_of(attention, new_streams(2), 9, lengths)
        keys, values = torch.ops.ctx.evicted_groups(k, v, plan, [], *attention.law)
        if compressor == "most_used":
            slots = keys[:, :, :, 0], values[:, :, :, 0]
        else:
            slots = attention.compressor(keys, values)
        out, *_ = torch.ops.ctx.attend(q, k, v, plan, [], slots, *operands(attention))
        named = [q, k, v, *parameters]
        return torch.autograd.grad((out * weight).sum(), named, allow_unused=True)

    for got, want in zip(gradients(dirty), gradients(tensors), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_a_loss_that_depends_on_a_bad_token_says_so():
    """Kept apart is not swept away: where the loss sees the token, gradients are NaN."""
    attention = ctx.CompressiveAttention(8, 2, window=3, compressed=2, ratio=2)
    x = torch.randn(1, 6, 8)
    x[0, 2] = float("nan")
    y = attention(x)[0]
    y[:, 3].square().sum().backward()
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert attention.get_submodule(name).weight.grad.isnan().any(), name


@pytest.mark.parametrize(
    "compressor, position, threads", pairwise(COMPRESSORS, ["rotary", "relative", "alibi"], [2, 3])
)
def test_gradients_do_not_depend_on_threads(compressor, position, threads):
    """One row or kv head and several, short calls and long: not a bit of any gradient of ours."""

    def gradients(batch, kv_heads, tokens, dtype, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            attention = ctx.CompressiveAttention(
                4 * 16, 4, kv_heads, window=32, compressed=16, ratio=4, position=position,
                compressor=compressor, dtype=dtype,
            )  # fmt: skip
            x = torch.randn(batch, tokens, 64, dtype=dtype)
            q, k, v = (
                torch.randn(batch, heads, tokens, 16, dtype=dtype, requires_grad=True)
                for heads in (4, kv_heads, kv_heads)
            )
            # Projections are torch's: whole tensors stand for them.
            attention.q_proj = Given(q)
            attention.k_proj, attention.v_proj = Given(k), Given(v)
            attention.out_proj = torch.nn.Identity()
            y = attention(x)[0]
            ours = [q, k, v, *attention.parameters()]
            weight = torch.randn_like(y)
            return torch.autograd.grad((y * weight).sum(), ours, allow_unused=True)
        finally:
            torch.set_num_threads(before)

    for sizes in (
        (1, 1, 700, torch.float32),
        (1, 1, 64, torch.float32),
        (1, 2, 700, torch.bfloat16),
        (3, 1, 300, torch.float32),
    ):
        alone, several = (gradients(*sizes, count) for count in (1, threads))
        for one, other in zip(alone, several, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


class Given(torch.nn.Module):
    """A projection whose result is a tensor [B, heads, T, D], whatever comes in."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return self.result.transpose(1, 2).flatten(2)
