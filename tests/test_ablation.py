"""`ctx ablation`: which models compete, that a stopped one goes on, and its table."""

import json

import pytest

from command_line import SOURCE, here
from ctx.cli.main import main
from ctx.compression import COMPRESSORS
from ctx.recipes.ablation import measure
from ctx.recipes.ablation_results import Results, table
from ctx.recipes.ablation_settings import NOTHING, WINDOW_ONLY, AblationSettings
from ctx.recipes.data import load_corpus
from ctx.recipes.errors import RecipeError

TINY = ["--steps", "2", "--batch", "2", "--length", "48", "--held-out", "2000"]
SMALL = {"steps": 2, "batch": 2, "length": 48, "held_out": 2000}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.py").write_bytes(SOURCE[:20_000])
    return tmp_path / "text.py"


def test_every_compressor_competes_with_as_many_slots():
    first, *others = AblationSettings().variants()
    assert (first.compressor, first.config.compressed) == (WINDOW_ONLY, 0)
    assert list(dict.fromkeys(v.compressor for v in others)) == list(COMPRESSORS)
    for variant in others:
        assert variant.config.window + variant.config.compressed == first.config.window
        assert variant.config.compressor == variant.compressor
    trained = {(v.compressor, v.trained_by) for v in others}
    assert {("conv", "task"), ("conv", "aux"), ("gated", "aux"), ("mean", NOTHING)} <= trained
    assert ("mean", "aux") not in trained and ("max", "task") not in trained
    aux = [v.config for v in others if v.trained_by == "aux"]
    assert {c.compressor_grad for c in aux} == {"aux"}
    assert {c.aux_loss for c in aux} == {"reconstruction"}
    assert {v.config.compressor_grad for v in others if v.trained_by != "aux"} == {"task"}


def test_one_seed_gives_one_figure(text):
    settings = AblationSettings(**SMALL)
    corpus = load_corpus([text], settings.held_out)
    variants = {(v.compressor, v.trained_by): v for v in settings.variants()}
    one, same, other = (
        measure(variants["conv", "aux"], settings, seed, corpus) for seed in (0, 0, 1)
    )
    assert (one["both"], one["off"]) == (same["both"], same["off"]) != (other["both"], other["off"])
    assert one["both"] != one["off"]  # CMem is in use
    alone = measure(variants[WINDOW_ONLY, NOTHING], settings, 0, corpus)
    assert alone["both"] == alone["off"]


def test_table_has_means_and_spreads_best_first():
    def made(compressor, trained_by, *both):
        return [
            {"compressor": compressor, "trained_by": trained_by, "seed": i, "both": x, "off": 5.0}
            for i, x in enumerate(both)
        ]

    runs = [*made(WINDOW_ONLY, NOTHING, 3.0), *made("conv", "aux", 2.0, 2.2, 2.4)]
    lines = table([*runs, *made("mean", NOTHING, 2.1)]).splitlines()
    assert lines[2] == "| mean | - (no parameters) | 2.1000 | 5.0000 | 1 |"
    assert lines[3] == "| conv | aux | 2.2000 ± 0.2000 | 5.0000 ± 0.0000 | 3 |"
    assert lines[4] == f"| {WINDOW_ONLY} | - | 3.0000 | - | 1 |"


def test_results_are_kept_and_belong_to_their_settings(tmp_path):
    settings = AblationSettings(**SMALL)
    first = Results(tmp_path, settings, "d")
    first.add({"compressor": "conv", "trained_by": "aux", "seed": 1, "both": 2.0, "off": 3.0})
    again = Results(tmp_path, AblationSettings(**SMALL, seeds=9, compressor="mean"), "d")
    assert again.runs == first.runs and again.has("conv", "aux", 1)
    assert not again.has("conv", "task", 1) and not again.has("conv", "aux", 0)
    for changed in ((AblationSettings(**{**SMALL, "steps": 3}), "d"), (settings, "other")):
        with pytest.raises(RecipeError, match="of other settings or texts"):
            Results(tmp_path, *changed)
    (tmp_path / "ablation.json").write_text("[]")
    with pytest.raises(RecipeError, match="must be written by ctx ablation"):
        Results(tmp_path, settings, "d")


class TestCommand:
    def test_goes_on_where_it_was_stopped(self, text):
        args = ["ablation", "text.py", *TINY, "--seeds", "1", "--run", "out"]
        code, out, err = here(*args, "--compressor", "mean", cwd=text.parent)
        assert code == 0, err
        assert "2 of 2 models" in out and "| mean | - (no parameters) |" in out
        assert "2/2 " in err and "Traceback" not in err
        before = json.loads((text.parent / "out" / "ablation.json").read_text())["runs"]
        code, out, err = here(*args, "--compressor", "mean,conv", "--jobs", 1, cwd=text.parent)
        assert code == 0, err
        assert "2 of 4 models" in out
        after = json.loads((text.parent / "out" / "ablation.json").read_text())["runs"]
        assert after[:2] == before
        assert [(r["compressor"], r["trained_by"]) for r in after[2:]] == [
            ("conv", "task"),
            ("conv", "aux"),
        ]

    @pytest.mark.parametrize(
        "given, message",
        [
            (["--compressor", "no"], "--compressor must be all or some of mean, max"),
            (["--compressor", "mean,mean"], "--compressor must be all or some of"),
            (["--seeds", "0"], "--seeds must be at least 1"),
            (["--steps", "0"], "--steps must be at least 1, got 0"),
            (["--jobs", "0"], "--jobs must be at least 1"),
            (["--batch", "3000"], "the text must have at least"),
            (["--run", "text.py"], "cannot write text.py"),
        ],
    )
    def test_errors_are_one_line(self, text, monkeypatch, capsys, given, message):
        monkeypatch.chdir(text.parent)
        assert main(["ablation", "text.py", "--held-out", "2000", *given]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"ctx ablation: {message}") and err.count("\n") == 1
        assert not (text.parent / "runs").exists()
