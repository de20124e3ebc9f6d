"""`ctx train --preset` and `--param-count`: the paper's sizes, counted by hand beside."""

import dataclasses

import pytest
import torch

from ctx.cli.main import main
from ctx.compression import COMPRESSORS
from ctx.recipes.errors import RecipeError
from ctx.recipes.param_count import count, report
from ctx.recipes.presets import PRESETS
from ctx.recipes.settings import TrainSettings, model_config
from ctx.transformer import CompressiveTransformer

# The paper, section 5: layers, window, memory, compressed memory, ratio; width, heads, MLP.
PAPER = {
    "enwik8": (24, 768, 768, 1152, 3, 1024, 8, 3072),
    "wikitext103": (18, 512, 512, 512, 4, 1024, 16, 4096),
    "pg19": (36, 512, 512, 512, 2, 1024, 16, 4096),
}


def config_of(name):
    config = model_config(PRESETS[name].model)
    return dataclasses.replace(config, vocab_size=PRESETS[name].vocab_size)


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_the_papers(name):
    layers, segment, window, compressed, ratio, width, heads, inner = PAPER[name]
    config = config_of(name)
    assert (config.num_layers, config.embed_dim, config.num_heads) == (layers, width, heads)
    assert (config.segment, config.window, config.compressed) == (segment, window, compressed)
    assert (config.ratio, config.mlp_dim) == (ratio, inner)
    assert (config.compressor, config.compressor_grad) == ("conv", "aux")
    assert config.aux_loss == "reconstruction"
    assert (config.position, config.memory_content) == ("relative", "hidden")
    run = TrainSettings(**PRESETS[name].run)
    assert run.length == segment and run.clip == 0.1
    assert run.lr == 3e-4 and run.lr * run.final_lr == pytest.approx(1e-6)
    warmup, decay = (4_000, 100_000) if name == "enwik8" else (16_000, 500_000)
    assert (run.warmup, run.steps) == (warmup, warmup + decay)
    assert run.learning_rate(warmup) == 3e-4
    assert run.updates(59_999) and not run.updates(60_000) and run.updates(60_003)


@pytest.mark.parametrize("name", PAPER)
def test_counts_are_those_of_a_formula(name):
    layers, _, _, _, ratio, width, _, inner = PAPER[name]
    counts = count(config_of(name))
    assert counts == {
        "embedding": PRESETS[name].vocab_size * width,  # tied: the output layer, too
        "compressors": layers * ratio * width**2,  # of layer inputs
        "norms": (2 * layers + 1) * 2 * width,
        "MLP": layers * (2 * width * inner + inner + width),
        # Four projections; those of distances, for the window and for slots; u, v, and v of slots.
        "attention": layers * (4 * (width**2 + width) + 2 * width**2 + 3 * width),
    }


def test_what_the_paper_counts_is_near():
    """277M of Transformer-XL: it has one projection of distances a layer, not another for slots."""
    counts = count(config_of("enwik8"))
    without = sum(counts.values()) - counts["compressors"]
    assert without - 24 * (1024**2 + 1024) == pytest.approx(277e6, rel=0.005)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("changed", [{}, {"tied": False}, {"aux_loss": "autoencoding"}])
def test_every_parameter_is_counted_once(compressor, changed):
    changed = {**changed, "compressor": compressor, "mlp": "swiglu", "compressor_grad": "aux"}
    if compressor == "most_used" and "aux_loss" in changed:  # what it chooses has no gradient
        with pytest.raises(RecipeError, match="aux_loss"):
            model_config(changed)
        return
    config = model_config(changed)
    counts = count(config)
    model = CompressiveTransformer(config)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    compressors = [layer.compressor for layer in model.layers]
    held = sum(parameter.numel() for one in compressors for parameter in one.parameters())
    assert counts["compressors"] == held


@pytest.mark.parametrize("name", PRESETS)
def test_presets_construct_on_meta(name):
    with torch.device("meta"):
        model = CompressiveTransformer(config_of(name))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_report_adds_up():
    lines = report(model_config(PRESETS["pg19"].model), PRESETS["pg19"]).splitlines()
    rows = {line[:34].strip(): line for line in lines}
    figures = [int(line.split()[-1].replace(",", "")) for line in lines[:5]]
    total = next(line for line in lines if line.startswith("total  "))
    assert sum(figures) == int(total.split()[-1].replace(",", ""))
    assert any(name.startswith("published: none") for name in rows)
    assert lines[-1] == "not trained here"


class TestCommand:
    def test_param_count_writes_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["train", "--preset", "enwik8", "--param-count"]) == 0
        out = capsys.readouterr().out
        assert "published: 277M" in out and "Transformer-XL" in out and "unlike the paper" in out
        assert list(tmp_path.iterdir()) == []

    def test_options_change_a_preset(self, capsys):
        assert main(["train", "--preset", "enwik8", "--param-count", "--layers", "2",
                     "--compressor", "mean"]) == 0  # fmt: skip
        lines = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[:5])
        assert lines["compressors"] == "0"
        assert lines["MLP"] == f"{2 * (2 * 1024 * 3072 + 3072 + 1024):,}"

    def test_without_a_preset(self, capsys):
        assert main(["train", "--param-count"]) == 0
        out = capsys.readouterr().out
        assert "published" not in out and "total" in out

    def test_a_small_preset_trains(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "text.py").write_text("print(1)\n" * 300)
        monkeypatch.chdir(tmp_path)
        small = ["--width", "16", "--layers", "1", "--heads", "2", "--mlp-dim", "24", "--batch",
                 "2", "--length", "16", "--window", "8", "--compressed", "8", "--segment", "8",
                 "--steps", "3", "--held-out", "200", "--run", "run"]  # fmt: skip
        threads = torch.get_num_threads()
        assert main(["train", "text.py", "--preset", "wikitext103", *small]) == 0
        torch.set_num_threads(threads)
        saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        assert saved["config"]["vocab_size"] == 256 and saved["config"]["ratio"] == 4
        assert saved["settings"]["clip"] == 0.1 and saved["settings"]["update_every"] == 4
        capsys.readouterr()
        assert main(["train", "--resume", "run", "--preset", "pg19"]) == 2
        assert "drop --preset" in capsys.readouterr().err

    @pytest.mark.parametrize("name", PRESETS)
    def test_the_task_may_train_a_presets_compressor(self, name, capsys):
        args = ["train", "--preset", name, "--compressor-grad", "task", "--param-count"]
        assert main(args) == 0, capsys.readouterr().err
