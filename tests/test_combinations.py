"""Every compressor with every position scheme, both distances, shared heads and every dtype: one
differentiable call, streaming and the reference agree, and gradients are those of the function.

The table of what passed is printed at the end of the run (conftest.py).
"""

import math

import pytest
import torch

import ctx
from combinations_table import COVERED, DISTANCES, NAMES, SHARES, position_name
from ctx import reference
from strategies import CLOSE, DTYPES, assert_close

F64 = torch.float64
SCHEDULE = {"window": 3, "compressed": 2, "ratio": 2, "segment": 3, "sinks": 1}
BIASES = ["none", "log_ratio", "learned"]

every_compressor = pytest.mark.parametrize("compressor", list(ctx.compression.COMPRESSORS))
every_position = pytest.mark.parametrize("position", ctx.positions.POSITIONS, ids=position_name)
every_distance = pytest.mark.parametrize("distance", DISTANCES)
every_share = pytest.mark.parametrize("share", SHARES, ids=lambda share: f"H={share}Hkv")


def layer(compressor, position, distance, share, number=0, **options):
    """A layer whose parameters are random everywhere, those that start as zeros too."""
    options = {
        "compressor": compressor,
        "position": position,
        "distance": distance,
        "compressed_bias": BIASES[number % len(BIASES)],
        "relative_dim": 6,
        **SCHEDULE,
        **options,
    }
    torch.manual_seed(number)
    attn = ctx.CompressiveAttention(4 * share, 2 * share, 2, **options, dtype=F64)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn


def expected(attn, x, dtype):
    """What the reference gives, and the share of attention of each region."""
    weights = {**dict(attn.named_parameters()), "alibi_slopes": attn.alibi_slopes}
    if attn.compressed_bias is not None:
        weights["compressed_bias"] = attn.compressed_bias
    with torch.no_grad():
        return reference.compressive_attention(
            x,
            weights,
            reference.Schedule(**SCHEDULE),
            num_heads=attn.num_heads,
            num_kv_heads=attn.num_kv_heads,
            compressor=attn.compressor.name,
            position=attn.position,
            distance=attn.distance,
            memory_dtype=dtype,
            return_region_weights=True,
        )


@every_compressor
@every_position
@every_distance
@every_share
def test_parity(compressor, position, distance, share):
    """Two calls under grad, ragged calls without, and the reference: outputs and shares."""
    for number, dtype in enumerate(DTYPES):
        attn = layer(compressor, position, distance, share, number)
        attn.to(reference.working_dtype(dtype))
        x = torch.randn(2, 17, attn.embed_dim, dtype=attn.k_proj.weight.dtype)
        want, shares = expected(attn, x, dtype)
        for grad, sizes in ((True, [9, 8]), (False, [1, 4, 7, 0, 5])):
            memory, parts = attn.init_memory(2, dtype=dtype), []
            with torch.set_grad_enabled(grad):
                for piece in x.split(sizes, 1):
                    y, memory, usage = attn(piece, memory, return_region_weights=True)
                    parts.append((y.detach(), usage))
            out, usage = (torch.cat(part, dim) for part, dim in zip(zip(*parts), (1, 2)))  # noqa: B905
            assert_close(out, want, CLOSE[dtype])
            assert_close(usage, shares, CLOSE[dtype])
            assert_close(usage.sum(-1), torch.ones_like(usage[..., 0]), CLOSE[dtype])
        COVERED.add((compressor, position, distance, share, NAMES[dtype]))


@every_compressor
@every_position
@every_distance
@every_share
def test_gradcheck(compressor, position, distance, share):
    """Of the input and of every parameter, float64, with a carried memory."""
    attn = layer(compressor, position, distance, share, 2)
    names, parameters = zip(*attn.named_parameters(), strict=True)
    assert ("relative.compressed_position_weight" in names) == (position == "relative")
    with torch.no_grad():
        _, carried = attn(torch.randn(1, 5, attn.embed_dim, dtype=F64))

    def run(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attn, named, (x, carried))[0]

    x = torch.randn(1, 9, attn.embed_dim, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    used = torch.autograd.grad(run(x, *parameters).square().sum(), parameters, allow_unused=True)
    for name, gradient in zip(names, used, strict=True):
        assert gradient is not None and math.isfinite(gradient.sum()), name
        assert gradient.abs().sum() > 0, name
    COVERED.add((compressor, position, distance, share, "grad"))
