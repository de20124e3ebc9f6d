"""`python -m ctx plan`: what it promises is what memories take; and `python -m ctx info`."""

import os
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ctx
from command_line import here
from ctx.cli.plan import Shape, costs, flops_per_token, nbytes

SHAPE = Shape(layers=3, heads=4, kv_heads=2, head_dim=16)
FLAGS = ["--layers", "3", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]


def plan(*args, cwd="."):
    return here("plan", *args, cwd=cwd)


@pytest.mark.parametrize(
    "compressor, slots",
    [("mean", None), ("mean", torch.int8), ("conv", None), ("dilated", None), ("most_used", None)],
)
@pytest.mark.parametrize("compressed", [0, 12])
def test_bytes_are_those_of_a_memory(compressor, slots, compressed):
    schedule = ctx.Schedule(24, compressed, 4, 8, 3)
    memory = ctx.KVMemory(
        schedule, 1, 2, 16, compressor=compressor, max_rewind=20, dtype=torch.bfloat16,
        compressed_dtype=slots,
    )  # fmt: skip
    clock = memory.seen.nbytes + memory.rewindable.nbytes
    said = nbytes(SHAPE, schedule, compressor, 20, torch.bfloat16, slots)
    assert said == 3 * (memory.nbytes - clock) + clock


def test_bytes_are_those_of_a_cache(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.17")
    hf = pytest.importorskip("ctx.hf")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    code, out, err = plan("--model", tmp_path, "--window", 16, "--compressed", 8, "--sinks", 4,
                          "--dtype", "float32", "--streams", 1000)  # fmt: skip
    assert code == 0, err
    assert "2 layers, 4 query heads over 2 of 16" in out
    hf.register()
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("ctx")
    cache = hf.CompressiveCache(config, window=16, compressed=8, slot_mass=False)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)
    mine = costs(Shape(2, 4, 2, 16), ctx.Schedule(16, 8, 4, 4, 4), dtype=torch.float32)[0][1]
    assert mine["bytes"] == cache.nbytes
    size = f"{cache.nbytes / 1024:,.1f} KiB"
    assert re.search(rf"bytes of a stream +{re.escape(size)} ", out)
    assert f"1,000 streams: {cache.nbytes * 1000 / 2**20:,.1f} MiB" in out


def test_reach_and_entries_are_the_law():
    schedule = ctx.Schedule(8, 4, 4, 8, 2)
    memory, window, full = (made for _, made in costs(SHAPE, schedule))
    assert memory["reach"] == full["reach"] == full["entries"] == schedule.reach
    assert memory["entries"] == window["entries"] == schedule.max_slots
    assert memory["bytes"] > 0 and memory["attention"] == window["attention"]


def test_flops_of_attention():
    schedule = ctx.Schedule(8, 4, 4, 8, 2)
    query, keys = torch.randn(4, 1, 16), torch.randn(4, schedule.max_slots, 16)
    with FlopCounterMode(display=False) as counter:
        _ = (query @ keys.mT).softmax(-1) @ keys
    attend, _ = flops_per_token(SHAPE, schedule, "mean")
    assert attend == SHAPE.layers * counter.get_total_flops()


def test_flops_of_convolutions():
    """Of one head's keys and values, counted from the products of the definition."""
    width, ratio = 16, 4
    tokens, kept = torch.randn(ratio, width), torch.randn(ratio, 2 * width)

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / ratio

    one = torch.randn(width, width)
    conv = counted(lambda: [tokens[i : i + 1] @ one for i in range(ratio)])
    up, hidden, down = (torch.randn(a, b) for a, b in ((16, 32), (32, 32), (32, 16)))
    dilated = counted(
        lambda: (
            [tokens @ up, tokens @ up, kept @ hidden, kept @ hidden]
            + [kept[i : i + 1] @ down for i in range(ratio)]
        )
    )
    pairs = 2 * SHAPE.kv_heads * SHAPE.layers
    schedule = ctx.Schedule(8, 4, ratio)
    assert flops_per_token(SHAPE, schedule, "conv")[1] == pairs * conv
    assert flops_per_token(SHAPE, schedule, "dilated")[1] == pairs * dilated
    assert flops_per_token(SHAPE, schedule, "mean")[1] == pairs * width
    assert flops_per_token(SHAPE, schedule.resized(compressed=0), "conv")[1] == 0


def test_table():
    code, out, err = plan(*FLAGS, "--window", 8, "--compressed", 4, "--context", 1000)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("3 layers, 4 query heads over 2 of 16, pairs in bfloat16")
    assert re.search(r"this memory +window, as many entries +full cache, 1,000 tokens$", lines[2])
    assert re.search(r"^reach, tokens +24 +\d+ +1,000$", lines[3])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--window", "8", "--compressed", "4"], "--layers must be given without --model"),
        ([*FLAGS, "--window", "-1", "--compressed", "4"], "--window must be between 0"),
        ([*FLAGS, "--window", "8", "--compressed", "4", "--ratio", "0"], "--ratio must be"),
        ([*FLAGS, "--window", "8", "--compressed", "4", "--streams", "0"], "--streams must be"),
        ([*FLAGS, "--window", "8", "--compressed", "4", "--model", "."], "--layers must be left"),
        (["--model", "none", "--window", "8", "--compressed", "4"], "--model must be that of a"),
        ([*FLAGS[:4], "--kv-heads", "3", *FLAGS[6:], "--window", "8", "--compressed", "4"],
         "--kv-heads must divide --heads = 4, got 3"),
    ],
)  # fmt: skip
def test_errors(args, message, tmp_path):
    code, out, err = plan(*args, cwd=tmp_path)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("ctx plan: ") and message in err


def test_info_says_what_a_bug_report_needs(monkeypatch):
    monkeypatch.setenv("CTX_OF_THE_TEST", "7")
    code, out, _ = here("info", cwd=".")
    said = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert said["torch"].startswith(torch.__version__)
    assert said["system"].endswith(f"{os.cpu_count()} processors")
    assert "CTX_OF_THE_TEST=7" in said["variables"].split()
    assert {"ctx", "python", "CUDA", "compiler", "instruction sets", "packages"} <= said.keys()
