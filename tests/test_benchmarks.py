"""The benchmarks run, say what they should, and can fail; no figure is judged here.

What must be true of figures is in the ratios that `python -m benchmarks.*` prints.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ctx
from benchmarks import (
    _harness,
    _machine,
    _memories,
    _peer_compressive,
    _peer_transformers,
    _report,
    _segment,
    bandwidth,
    peers,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """A benchmark sets the number of threads; the next test has its own again. Turns are short:
    a dry run measures nothing."""
    monkeypatch.setitem(_harness.interleave.__kwdefaults__, "least", 1e-3)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(name, folder, *args):
    """Runs a benchmark as its command does, and returns its JSON."""
    main = importlib.import_module(f"benchmarks.{name}").main
    assert main(["--quick", "--threads", "1", "--out", str(folder), *args]) == 0
    return json.loads((folder / f"{name}.json").read_text())


# --- the harness ----------------------------------------------------------------------------------


class Clock:
    """Time passes only where a candidate says so."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def candidate(self, name, *seconds):
        def call():
            count = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds[min(count, len(seconds) - 1)]

        return call


def test_candidates_take_turns():
    clock = Clock()
    candidates = {"a": clock.candidate("a", 1.0), "b": clock.candidate("b", 2.0)}
    times = _harness.interleave(candidates, 4, clock=lambda: clock.now)
    assert "".join(clock.calls) == "aabb" + "abbaabba"
    assert times["a"].samples == (1.0,) * 4
    assert times["b"].median == 2.0


def test_median_is_that_of_the_turns():
    clock = Clock()
    candidates = {"a": clock.candidate("a", 50.0, 50.0, 1.0, 9.0, 2.0)}  # two calls are no turns
    times = _harness.interleave(candidates, 3, clock=lambda: clock.now)
    assert times["a"].samples == (1.0, 9.0, 2.0)
    assert times["a"].median == 2.0
    assert times["a"].spread == pytest.approx((5.5 - 1.5) / 2 / 2.0)


@pytest.mark.parametrize("multiple, least, calls", [(1, 0.5, 1), (4, 0.5, 4), (4, 5.0, 8)])
def test_turns_are_whole_periods(multiple, least, calls):
    clock = Clock()
    times = _harness.interleave(
        {"a": clock.candidate("a", 1.0)},
        3,
        multiple=multiple,
        least=least,
        clock=lambda: clock.now,
    )
    assert len(clock.calls) == 1 + multiple + 3 * calls
    assert times["a"].samples == (1.0, 1.0, 1.0)


def test_ratios_can_be_missed(tmp_path, capsys):
    args = argparse.Namespace(check=True, quick=False, out=tmp_path)
    report = _report.Report("made_up", args)
    report.row(who="ctx", time=_harness.Timing((1e-3, 2e-3, 3e-3)))
    report.row(who="other", share=0.5)
    report.at_least("1", "speed", 2.0, 2.0)
    report.at_most("2", "cost", 1.1, 1.1)
    assert report.finish(lambda figure, _: figure.subplots()) == 0
    report.at_least("1", "speed", 1.99, 2.0)
    report.at_most("2", "cost", 1.11, 1.1)
    assert report.finish(lambda figure, _: figure.subplots()) == 1
    out = capsys.readouterr().out
    assert "[1] speed: 2 (≥ 2) met" in out
    assert "[2] cost: 1.1 (≤ 1.1) met" in out
    assert "[1] speed: 1.99 (≥ 2) MISSED" in out
    assert "[2] cost: 1.11 (≤ 1.1) MISSED" in out
    assert "| who   | time      | share |" in out
    assert "| ctx   | 2 ms ±25% |       |" in out
    assert "| other |           | 0.5   |" in out
    written = json.loads((tmp_path / "made_up.json").read_text())
    assert [ratio["met"] for ratio in written["ratios"]] == [True, True, False, False]
    assert written["rows"][0]["time"]["samples"] == [1e-3, 2e-3, 3e-3]


def test_machine():
    facts = _machine.machine()
    assert facts["instruction_set"] == ctx._C.cpu_capability()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__ and facts["ctx"] == ctx.__version__
    assert all(str(facts[name]) in _machine.describe(facts) for name in ("cpu", "torch", "cores"))


def test_peak_sees_what_is_gone():
    _machine.reset_peak()
    before = _machine.peak_rss()
    torch.ones(32 << 18)  # 32 MiB
    assert _machine.peak_rss() - before > 30 << 20
    assert _machine.peak_rss() > _machine.rss()


# --- what is compared computes the same -----------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8, 4, 2, 4, 1), (16, 16, 4, 4, 0), (5, 3, 3, 3, 0)])
def test_full_memories_are_full(sizes):
    window, compressed, ratio, segment, sinks = sizes
    schedule = ctx.Schedule(window, compressed, ratio, segment, sinks)
    memory = _memories.full_memory(schedule, 2, 8)
    t = int(memory.seen[0]) - 1
    assert t % segment == 0 and schedule.slots(t) == compressed
    reference = ctx.reference.Schedule(*sizes)
    assert _memories.visible(schedule, t) == sum(len(part) for part in reference.visible(t))
    assert memory.attend(torch.randn(1, 4, 1, 8)).isfinite().all()


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2)])
def test_ways_of_sdpa_agree(heads, kv_heads):
    q = torch.randn(1, heads, 1, 16)
    k, v = torch.randn(2, 1, kv_heads, 20, 16).unbind(0)
    outs = {name: way().reshape(-1) for name, way in _memories.sdpa_ways(q, k, v).items()}
    assert ("sdpa folded" in outs) == (heads != kv_heads)
    for out in outs.values():
        torch.testing.assert_close(out, outs["sdpa"])


def test_cat_loop():
    loop = _memories.CatLoop(2, 6, 8, torch.float32)
    pairs = torch.randn(9, 2, 1, 2, 1, 8)
    q = torch.randn(1, 4, 1, 8)
    for k, v in pairs:
        out = loop.step(q, k, v)
    keys, values = (torch.cat([*pairs[-6:, i]], 2) for i in range(2))
    assert torch.equal(loop.keys, keys)
    torch.testing.assert_close(out, _memories.sdpa_ways(q, keys, values)["sdpa"]())


def test_segment_computes_what_sdpa_does():
    """Without positions, torch's attention over the same parts has the same output and gradients.

    The rings hold slots and window tokens from one place on; what is due in this call is in
    `slots`.
    """
    segment = _segment.Segment(16, heads=2, head_dim=8, batch=2, rotary=False)
    names = dict(zip(ctx.state.TENSORS, segment.memory, strict=True))
    seen, schedule = segment.seen, segment.schedule
    n, w = schedule.groups(seen), schedule.window_begin(seen)
    due = n - schedule.groups(seen - 1)
    assert due == segment.slots[0].shape[2] > 0
    segment.requires_grad()
    past = []
    for part, made in zip(("keys", "values"), segment.slots, strict=True):
        ring, window = names[f"compressed_{part}"], names[f"window_{part}"]
        groups = torch.arange(n - schedule.slots(seen), n - due) % ring.shape[2]
        tokens = torch.arange(w, seen) % window.shape[2]
        past.append(torch.cat([ring[:, :, groups], made, window[:, :, tokens]], 2))
    segment.past = past
    inputs = [segment.q, segment.k, segment.v, *segment.slots]
    ours, theirs = segment.ours(), segment.theirs()
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, segment.grad),
        torch.autograd.grad(theirs, inputs, segment.grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def calculated(options, **others):
    """The calculator's model of a configuration, and a stream of it."""
    config = ctx.CompressiveTransformerConfig(**options)
    model = ctx.CompressiveTransformer(config)
    names = ("window", "compressed", "ratio", "sinks", "max_rewind")
    sizes = {name: getattr(config, name) for name in names}
    made = bandwidth.Model(
        layers=config.num_layers,
        kv_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.embed_dim // config.num_heads,
        parameters=sum(x.numel() for x in model.parameters()),
        segment=config.segment or config.ratio,
        itemsize=4,
        **sizes,
        **others,
    )
    return model, made


@pytest.mark.parametrize("int8_slots", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"window": 8, "compressed": 4, "ratio": 4},
        {"window": 5, "compressed": 3, "ratio": 2, "segment": 7, "sinks": 3, "max_rewind": 10},
        {"window": 0, "compressed": 6, "ratio": 3, "segment": 1, "num_kv_heads": 2},
        {"window": 9, "compressed": 0, "ratio": 4, "max_rewind": 1},
        {"window": 4, "compressed": 4, "ratio": 2, "compressor": "conv", "compressor_kernel": 5},
    ],
)
def test_bytes_of_a_stream(sizes, int8_slots):
    """The calculator's are those that a memory says."""
    plain = {
        "vocab_size": 8,
        "embed_dim": 32,
        "num_layers": 3,
        "num_heads": 4,
        "compressor": "mean",
    }
    overlap = sizes.get("compressor_kernel", sizes["ratio"]) - sizes["ratio"]
    model, made = calculated(plain | sizes, overlap=overlap, int8_slots=int8_slots)
    slots = torch.int8 if int8_slots else None
    for batch in (1, 3):
        memory = model.init_memory(batch, compressed_dtype=slots)
        assert memory.nbytes == batch * made.stream
    schedule = model.schedule
    begin = 4 * (schedule.reach + 1) * schedule.segment * schedule.ratio
    queries = map(schedule.visible, range(begin, begin + schedule.segment * schedule.ratio))
    pairs = [
        (len(sinks) + len(window)) * made.pair + len(slots) * made.slot
        for sinks, slots, window in queries
    ]
    over = made.layers * min(pairs) - made.read
    assert 0 <= over < made.layers * made.ratio * made.pair


def test_smollm2():
    """The model of the table is that of the benchmark."""
    config = {
        "vocab_size": 49152,
        "embed_dim": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "mlp_dim": 1536,
        "window": 512,
        "compressed": 512,
        "ratio": 4,
        "compressor": "mean",
        "compressed_bias": "none",
    }
    with torch.device("meta"):
        model, made = calculated(config)
    assert made.parameters == bandwidth.SMOLLM2.parameters
    assert model.init_memory(1).to(dtype=torch.bfloat16).nbytes == bandwidth.SMOLLM2.stream


def test_table_of_the_document(capsys):
    """What docs/cuda.md says is what its command prints."""
    assert bandwidth.main() == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "cuda.md").read_text()


def test_bandwidth_bound():
    model = bandwidth.Model(1, 1, 2, 100, 8, 4, 4, 4)
    assert model.pair == 8 and model.weights == 200 and model.read == 13 * 8
    assert bandwidth.tokens_per_second(model, 1e-6, 1) == 1000 / 304
    assert bandwidth.tokens_per_second(model, 1e-6, 10) == 10_000 / (200 + 1040)


# --- the commands ---------------------------------------------------------------------------------

# Acceptance items that each benchmark prints a ratio of, and the columns of its table.
SAYS = {
    "decode": ({"1", "2", "6"}, {"shape", "slots", "MiB", "what", "time", "GB/s"}),
    "prefill": ({"3"}, {"what", "queries", "slots", "who", "time", "MiB"}),
    "train": ({"3"}, {"what", "queries", "slots", "who", "time", "MiB"}),
    "stream": ({"4"}, {"tokens", "time", "resident MiB"}),
    "sessions": ({"3"}, {"shape", "streams", "who", "time"}),
    "cuda": ({"3", "5"}, {"shape", "MB", "rows", "what", "time", "GB/s", "kernels", "tokens/s"}),
}
HERE = {"cuda": ["--device", "cpu"]}  # options that this machine needs


@pytest.mark.parametrize("name", SAYS)
def test_command(name, tmp_path, capsys):
    written = run(name, tmp_path, *HERE.get(name, ()))
    items, columns = SAYS[name]
    assert {ratio["item"] for ratio in written["ratios"]} == items
    assert columns <= {column for row in written["rows"] for column in row}
    check_common(name, written, tmp_path, capsys.readouterr().out)


def check_common(name, written, folder, out):
    assert written["benchmark"] == name
    assert written["machine"]["threads"] == 1 == written["options"]["threads"]
    assert {"cpu", "cores", "instruction_set", "torch", "ctx"} <= written["machine"].keys()
    for row in written["rows"]:
        if "time" in row and name != "stream":
            assert len(row["time"]["samples"]) == 3
            assert 0 < min(row["time"]["samples"]) <= row["time"]["median"]
    for ratio in written["ratios"]:
        assert ratio["measured"] >= 0
        assert f"[{ratio['item']}] {ratio['what']}: " in out
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_peers_without_packages(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    written = run("peers", tmp_path)
    assert {row["peer"] for row in written["rows"]} == {"one layer, one token"}
    assert {"ctx step", "cat + SDPA", "sdpa alone"} <= {row["who"] for row in written["rows"]}
    assert [note for note in written["notes"] if _peer_compressive.INSTALL in note]
    assert [note for note in written["notes"] if _peer_transformers.INSTALL in note]
    check_common("peers", written, tmp_path, capsys.readouterr().out)


def test_peer_compressive(tmp_path, capsys):
    pytest.importorskip("compressive_transformer_pytorch", reason=_peer_compressive.INSTALL)
    written = run("peers", tmp_path, "--only", "compressive")
    assert [ratio["item"] for ratio in written["ratios"]] == ["5", "5"]
    assert _peer_compressive.DEFECTS in written["notes"]
    check_common("peers", written, tmp_path, capsys.readouterr().out)


def test_peer_transformers(tmp_path, capsys):
    pytest.importorskip("transformers", reason=_peer_transformers.INSTALL)
    written = run("peers", tmp_path, "--only", "transformers")
    assert len(written["rows"]) == 8
    assert {"DynamicCache", "ctx, exact"} <= {row["who"] for row in written["rows"]}
    check_common("peers", written, tmp_path, capsys.readouterr().out)


def test_hf(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5.17", reason=_peer_transformers.INSTALL)
    written = run("hf", tmp_path)
    assert {(row["dtype"], row["tokens"]) for row in written["rows"]} == {
        (dtype, tokens) for dtype in ("float32", "bfloat16") for tokens in (64, 200)
    }
    sizes = {row["MiB"] for row in written["rows"] if row["who"].startswith("ctx, 16")}
    assert len(sizes) == 2  # one for each dtype, however many tokens were seen
    check_common("hf", written, tmp_path, capsys.readouterr().out)


def test_long_context(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5.17", reason=_peer_transformers.INSTALL)
    written = run("long_context", tmp_path, "--text", "a/b.txt")
    assert written["options"]["text"] == "b.txt" and written["options"]["compressor"] == []
    kinds = {row["what"] for row in written["rows"]}
    assert {"windows", "passage again after 20", "needle at 0.1", "needles"} <= kinds
    rows = [row for row in written["rows"] if row["what"] == "windows"]
    assert len(rows) == 1 + 2 * (1 + 2)  # full, and for each budget a window and two ratios
    assert rows[0]["over_full"] is None and rows[2]["KL"].keys() == {"value", "error"}
    probed = [row["who"] for row in written["rows"] if row["what"] == "needles"]
    assert probed[:2] == ["full cache", "window + sinks, 24"] and len(probed) == 4
    out = capsys.readouterr().out
    assert "| slots | window + sinks | ratio 2 | ratio 4 |" in " ".join(out.split())
    check_common("long_context", written, tmp_path, out)


def test_bad_options(capsys):
    for args in (["--repeat", "0"], ["--tokens", "10"]):
        with pytest.raises(SystemExit):
            importlib.import_module("benchmarks.stream").main(args)
    err = capsys.readouterr().err
    assert "must be at least 1, got 0" in err
    assert "--tokens must be at least 1500, got 10" in err


def test_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "--quick" in done.stdout and "--only" in done.stdout
