"""Random settings, streams and ways to cut them, for the property tests.

Sizes are tiny, so that a shrunk failure can be worked through by hand, and stand on and beside the
edges of the law: 0, 1, S-1, S, S+1, 3S+2. Inputs are views with strides of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor

import ctx
from ctx import reference

F64 = torch.float64
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPRESSORS = list(ctx.compression.COMPRESSORS)
# Those that are functions of groups: the others choose by usage.
POOLING = [name for name, kind in ctx.compression.COMPRESSORS.items() if not kind.by_usage]

# Rotary positions have the most settings.
POSITIONS = ["rotary", "rotary", "rotary", "relative", "alibi", None]

# Largest error allowed, relative to the largest number expected: two ways of computing the same
# thing round at different places; a rotated key that rounds the other way moves by one unit.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# The same computation cut differently.
CLOSER = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def cases(number: int) -> Callable[[Any], Any]:
    """Decorates a test that wants this many random cases under the default profile."""
    return settings(max_examples=max(1, number * settings().max_examples // 100))


@dataclass(frozen=True)
class Setting:
    """One memory: what `Schedule` and `KVMemory` are called with."""

    schedule: dict[str, int | None]
    batch: int
    kv_heads: int
    heads: int
    head_dim: int
    value_dim: int
    compressor: str
    seed: int
    overlap: int = 0  # of "conv"
    max_rewind: int = 64
    bias_per_head: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # those that no option gives

    def law(self, module: ModuleType = reference) -> Any:
        """The schedule as `module` (ctx or ctx.reference) makes it."""
        return module.Schedule(**self.schedule)

    def memory(self, module: ModuleType, dtype: torch.dtype, **changes: Any) -> Any:
        """The memory as `module` makes it, with the random parameters that the seed stands for."""
        options = {"max_rewind": self.max_rewind, **self.options, **self.scheme(module, dtype)}
        options.update(changes)
        if self.bias_per_head:
            options["compressed_bias"] = self.random([self.heads], torch.float64, 1).tolist()
        if self.compressor in ("mean", "max", "most_used"):
            compressor: Any = self.compressor
        elif module is reference:
            compressor = partial(reference.COMPRESSORS[self.compressor], **self.parameters(dtype))
        else:
            compressor = self.module(dtype)
        sizes = self.batch, self.kv_heads, self.head_dim, self.value_dim
        first = self.law(module)
        if self.settings and module is reference:
            options |= self.settings
        elif self.settings:
            if options["compressed_bias"] == "log_ratio" or self.bias_per_head:
                bias = "learned" if self.bias_per_head else "log_ratio"
                numbers = options["compressed_bias"] if self.bias_per_head else "none"
            else:
                bias = numbers = "none"
            options["compressed_bias"] = numbers
            given = {field.name for field in fields(ctx.AttentionSettings)} - {"compressed_bias"}
            named = {name: options.pop(name) for name in [*options] if name in given}
            named |= {"compressed_bias": bias, **self.settings}
            first = ctx.AttentionSettings(schedule=first, **named)
        return module.KVMemory(first, *sizes, compressor=compressor, dtype=dtype, **options)

    def module(self, dtype: torch.dtype) -> torch.nn.Module:
        """The compressor as a module of ctx.compression, holding `parameters`."""
        sizes = self.kv_heads, self.ratio, self.head_dim, self.value_dim
        kernel = self.ratio + self.overlap if self.compressor == "conv" else None
        module: torch.nn.Module = ctx.compression.make_compressor(
            self.compressor, *sizes, kernel=kernel
        )
        module.to(reference.working_dtype(dtype))
        parameters = self.parameters(dtype)
        assert {name for name, _ in module.named_parameters()} == set(parameters)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(parameters[name])
        return module

    def scheme(self, module: ModuleType, dtype: torch.dtype) -> dict[str, Any]:
        """What the position scheme needs besides its name, as `module` takes it."""
        position = self.options["position"]
        if position == "alibi":  # no power of two among them
            return {"alibi_slopes": (0.5 * self.random([self.heads], F64, 30).abs()).tolist()}
        if position != "relative":
            return {}
        made = ctx.positions.Relative(self.heads, self.head_dim, 2 + self.seed % 3 * 2)
        made.to(reference.working_dtype(dtype))
        with torch.no_grad():
            for number, parameter in enumerate(made.parameters(), start=31):
                parameter.copy_(0.5 * self.random(parameter.shape, F64, number))
        if module is reference:
            return {"relative": [operand.detach() for operand in made.operands()]}
        return {"relative": made}

    @property
    def ratio(self) -> int:
        """Tokens per slot."""
        ratio = self.schedule["ratio"]
        assert ratio is not None
        return ratio

    def parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random parameters of the compressor, around those it starts with."""
        sizes = self.kv_heads, self.ratio, self.head_dim, self.value_dim
        dtype = reference.working_dtype(dtype)
        kernel = self.ratio + self.overlap
        start = reference.initial_parameters(self.compressor, *sizes, dtype, kernel)
        drawn = enumerate(start.items(), start=10)
        spread = {"conv": 0.2, "dilated": 0.2, "gated": 1.0}.get(self.compressor, 0.0)
        return {name: x + spread * self.random(x.shape, dtype, i) for i, (name, x) in drawn}

    def random(self, shape: Any, dtype: torch.dtype, number: int = 0) -> Tensor:
        """The same normal numbers every time for the same seed and number."""
        generator = torch.Generator().manual_seed(self.seed * 100 + number)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def inputs(self, length: int, dtype: torch.dtype, strides: int = 0) -> list[Tensor]:
        """q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] as views of the drawn kind."""
        shapes = (self.heads, self.head_dim), (self.kv_heads, self.head_dim)
        shapes += ((self.kv_heads, self.value_dim),)
        return [
            strided(self.random([self.batch, h, length, d], dtype, 2 + i), (strides + i) % 4)
            for i, (h, d) in enumerate(shapes)
        ]


def strided(x: Tensor, kind: int) -> Tensor:
    """The same numbers in another place; what lies between them must never be read."""
    if kind == 1:  # as projections come: heads inside tokens
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 2:  # the last dimension is not contiguous
        wide = x.new_full((*x.shape[:3], 2 * x.shape[3] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if kind == 3:  # a slice of a longer stream of a wider projection
        padded = torch.nn.functional.pad(x, (1, 2, 3, 4), value=float("nan"))
        return padded[:, :, 3 : 3 + x.shape[2], 1 : 1 + x.shape[3]]
    return x


# Making a strategy takes longer than drawing from it: what can be is made once.
SCHEDULES = st.fixed_dictionaries(
    {
        "window": st.integers(0, 12),
        "compressed": st.integers(0, 6),
        "ratio": st.integers(1, 5),
        "segment": st.none() | st.integers(1, 9),
        "sinks": st.integers(0, 4),
    }
)
OPTIONS = st.fixed_dictionaries(
    {
        "rotary_base": st.sampled_from([10000.0, 20.0]),
        "rotary_interleaved": st.booleans(),
        "distance": st.sampled_from(["slot", "token"]),
        "compressed_bias": st.sampled_from(["none", "log_ratio"]),
        "scale": st.sampled_from([None, None, 0.3]),
    }
)
HEAD_DIMS = st.sampled_from([2, 4, 6, 8, 10])
ONE_OR_TWO, ONE_TO_THREE = st.integers(1, 2), st.integers(1, 3)
OVERLAPS = st.sampled_from([0, 1, 2, 5, 9])
SEEDS = st.integers(0, 2**31)
MAX_REWINDS = st.sampled_from([1, 2, 3, 7, 64])
BOOLEANS = st.booleans()


@cache
def sampled(*values: Any) -> st.SearchStrategy[Any]:
    """One of the values, simpler ones first."""
    return st.sampled_from(values)


@cache
def up_to(most: int, least: int, *simplest: int) -> st.SearchStrategy[int]:
    """One of the simplest numbers, or any one from `least` to `most`."""
    return st.sampled_from(simplest) | st.integers(least, most)


@st.composite
def schedules(draw: st.DrawFn, **fixed: Any) -> dict[str, int | None]:
    """Arguments of a small Schedule."""
    return {**draw(SCHEDULES), **fixed}


@st.composite
def memories(
    draw: st.DrawFn,
    schedule: dict[str, Any] | None = None,
    compressor: str | None = None,
    bias: str | None = None,
    positions: Sequence[str | None] = POSITIONS,
    by_usage: bool = True,
    plain: bool = False,
) -> Setting:
    """A Setting; the arguments fix parts of it. Not `by_usage`: its compressor is of POOLING.
    `plain`: without what only ctx.AttentionSettings gives.
    """
    kv_heads = draw(ONE_OR_TWO)
    head_dim = draw(HEAD_DIMS)
    options = {
        "position": draw(sampled(*positions)),
        "rotary_dim": draw(sampled(None, None, *range(2, head_dim + 1, 2))),
        **draw(OPTIONS),
    }
    if bias is not None:
        options["compressed_bias"] = bias
    settings: dict[str, Any] = {}
    if not plain and draw(BOOLEANS):
        settings = {"logit_softcap": draw(sampled(None, 3.0))}
        settings["slot_mass"] = options["compressed_bias"] == "none" and draw(BOOLEANS)
        if options["position"] == "rotary":
            width = options["rotary_dim"] or head_dim
            settings["attention_factor"] = draw(sampled(1.0, 1.25))
            settings["inv_freq"] = draw(sampled(None, tuple(0.7**i for i in range(width // 2))))
    names = COMPRESSORS if by_usage else POOLING
    name = draw(sampled(*names)) if compressor is None else compressor
    return Setting(
        settings=settings,
        schedule={**draw(SCHEDULES), **(schedule or {})},
        batch=draw(ONE_OR_TWO),
        kv_heads=kv_heads,
        heads=kv_heads * draw(ONE_TO_THREE),
        head_dim=head_dim,
        value_dim=draw(sampled(head_dim, head_dim, 1, 3, 8)),
        compressor=name,
        overlap=draw(OVERLAPS) if name == "conv" else 0,
        seed=draw(SEEDS),
        max_rewind=draw(MAX_REWINDS),
        bias_per_head=bias is None and draw(BOOLEANS),
        options=options,
    )


@st.composite
def lengths(draw: st.DrawFn, setting: Setting, most: int = 60) -> int:
    """A stream length on or beside an edge, or any."""
    law = setting.law()
    full = law.sinks + law.window
    edges = [0, 1, law.segment - 1, law.segment, law.segment + 1, 3 * law.segment + 2]
    edges += [full, full + law.segment, law.reach, law.reach + law.segment + 1]
    return draw(up_to(most, 1, *(n for n in edges if n <= most)))


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[int]:
    """A ragged cutting: sizes that add up to `length`, empty calls among them."""
    sizes: list[int] = []
    piece = up_to(max(1, length), 1, length, 1, 1, 2, 3, 0)
    while sum(sizes) < length:
        sizes.append(min(draw(piece), length - sum(sizes)))
    return sizes


def assume_clear(memory: Any, tolerance: float) -> None:
    """Leaves out cases in which rounding may decide which tokens were the most used."""
    assume(memory.margin > 4 * tolerance)


def pieces(tensors: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    """q, k, v cut along their tokens (dimension 2)."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        [x[:, :, end - size : end] for x in tensors] for size, end in zip(sizes, ends, strict=True)
    ]


def stream(memory: Any, tensors: list[Tensor], sizes: list[int]) -> Tensor:
    """All outputs of `memory.step` over the pieces, [B, H, T, Dv]."""
    q, _, v = tensors
    outs = [memory.step(*piece) for piece in pieces(tensors, sizes)]
    return torch.cat([q.new_empty(*q.shape[:2], 0, v.shape[3]), *outs], 2)


def operands(attn: ctx.CompressiveAttention, region_weights: bool = False) -> tuple[Any, ...]:
    """What operators that attend take of a layer, after the tensors of the call."""
    return (*attn.scores(torch.device("cpu")), *attn.law, region_weights)


def plan_of(
    attn: ctx.CompressiveAttention,
    seen: Tensor,
    tokens: int,
    lengths: Tensor | None = None,
    reset_at: Tensor | None = None,
    carried: bool = False,
) -> Tensor:
    """The plan of a call of a layer, as operators take it."""
    plan: Tensor = torch.ops.ctx.plan(seen, lengths, reset_at, tokens, attn.law[0], carried)
    return plan


def new_streams(rows: int) -> Tensor:
    """`seen` of rows that begin."""
    return torch.zeros(rows, dtype=torch.int64)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Worst absolute error within `tolerance` of the largest expected number, at least of one."""
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype)
    if want.numel():
        size = max(1.0, want.double().abs().max().item())
        error = (got.double() - want.double()).abs().max().item()
        assert error <= tolerance * size, f"error {error:.3g}, allowed {tolerance * size:.3g}"


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bit for bit, NaN and the sign of zero included."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.is_floating_point():
        as_bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
        got, want = got.contiguous().view(as_bits), want.contiguous().view(as_bits)
    assert torch.equal(got, want)
