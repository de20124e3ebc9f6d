"""What is made of numbers is made where it belongs, whatever torch's default device is: every
public operation of a memory and of rows under `torch.set_default_device("meta")`.
"""

import pytest
import torch

import ctx
from ctx.memory_rows import leaves
from strategies import COMPRESSORS, assert_close, assert_same_bits

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1}
POSITIONS = ["rotary", "relative", "alibi", None]


@pytest.fixture
def nowhere():
    """A default device on which there are no numbers."""
    before = torch.get_default_device()
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(before)


def build(position, compressor):
    scheme = {
        "alibi": {"alibi_slopes": [0.5, 0.25]},
        "relative": {"relative": ctx.positions.Relative(2, 4, 6, device="cpu")},
    }.get(position, {})
    if position == "relative":
        torch.manual_seed(0)
        scheme["relative"].reset_parameters()
    return ctx.KVMemory(
        ctx.Schedule(**SIZES), 3, 1, 4, compressor=compressor, position=position,
        compressed_bias="log_ratio", **scheme,
    )  # fmt: skip


def everything(position, compressor, tensors):
    """What every operation gives, in order."""
    q, k, v = tensors
    memory = build(position, compressor)
    found = [memory.step(q, k, v), *memory.step(q, k, v, return_region_weights=True)]
    used = compressor == "most_used"
    if not used:
        memory.append(k, v)
        found.append(memory.attend(q))
        memory.rewind(2)
        memory.rewind(memory.rewindable.clamp_max(1))
        found += memory.resized(compressed=2).tensors.values()
    memory.reset(1)
    memory.reset([0])
    chosen = memory.select([2, 0])
    merged = ctx.KVMemory.merge([memory, chosen])
    merged.load_state_dict(merged.clone().state_dict())
    found += merged.to(dtype=torch.float64).tensors.values()
    layers = memory.memory
    ctx.rows.reset(layers, 2)
    ctx.rows.reset(layers, [True, False, False])
    if not used:
        ctx.rows.rewind(ctx.rows.clone(layers), 0)
        found += leaves(ctx.rows.resized(layers, memory.schedule))
    found += leaves(ctx.rows.to(ctx.rows.merge([ctx.rows.select(layers, [0, 1])] * 2)))
    memory.reset()
    return [*found, *memory.tensors.values()]


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("position", POSITIONS)
def test_a_memory(nowhere, position, compressor):
    tensors = [torch.randn(3, heads, 9, 4) for heads in (2, 1, 1)]
    want = everything(position, compressor, tensors)
    nowhere()
    got = everything(position, compressor, tensors)
    for mine, yours in zip(got, want, strict=True):
        assert mine.device.type == "cpu"
        assert_same_bits(mine, yours)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("content", ["kv", "hidden"])
def test_a_layer(nowhere, position, compressor, content):
    """Built before; both paths, padding, documents, losses, memories."""
    if compressor == "most_used" and content == "hidden":
        return
    aux = None if compressor == "most_used" else "reconstruction"
    attn = ctx.CompressiveAttention(
        8, 2, **SIZES, position=position, compressor=compressor, memory_content=content,
        compressed_bias="log_ratio", aux_loss=aux,
    )  # fmt: skip
    x = torch.randn(2, 17, 8)
    lengths, reset_at = torch.tensor([9, 17]), torch.arange(17).expand(2, -1) == 5
    mask = torch.arange(17) >= torch.tensor([[3], [0]])

    def run():
        found = []
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                memory = attn.init_memory(2)
                for rows in (
                    {"lengths": lengths},
                    {"mask": mask},
                    {"reset_at": reset_at},
                    {"return_aux": True} if aux else {},
                ):
                    y, memory, *loss = attn(x, memory, **rows)
                    found += [y, *loss, *leaves(memory)]
        return found

    want = run()
    nowhere()
    ctx.constants._MADE.clear()
    for mine, yours in zip(run(), want, strict=True):
        assert mine.device.type == "cpu"
        assert_close(mine.detach(), yours.detach(), 0.0)


def test_constants(nowhere):
    want = ctx.positions.alibi_slopes(6)
    nowhere()
    assert_same_bits(ctx.positions.alibi_slopes(6), want)
