"""`ctx train --compare` says what was compared with what; `--resume --steps` moves a run's end."""

import json
import os
import re
import signal

import pytest
import torch

from command_line import SOURCE, TINY, lines_of, run
from ctx.cli.main import main, plain
from ctx.recipes import checkpoint, compare
from ctx.recipes.data import load_corpus
from ctx.recipes.errors import RecipeError
from ctx.recipes.evaluation import stream
from ctx.recipes.loading import load_model
from ctx.recipes.settings import TrainSettings, model_config
from ctx.recipes.trainer import Trainer

NAMES = [
    "window 8 + 8 slots",
    "the same weights, CMem off",
    "the same weights, emptied at every segment",
    "window 8 alone, trained so",
    "window 16 alone, trained so",
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.py").write_bytes(SOURCE[:20_000])
    yield tmp_path
    torch.set_num_threads(threads)


def train(*args):
    return main(["train", *map(str, args)])


def figures(folder):
    results = json.loads((folder / "evaluation.json").read_text())
    return {line["name"]: line["bits_per_byte"] for line in results}


class TestCompare:
    def test_three_models_one_table(self, place, capsys):
        assert train("text.py", *TINY, "--steps", 30, "--run", "run", "--compare") == 0
        out = capsys.readouterr().out
        found = figures(place / "run")
        assert list(found) == NAMES
        for name in NAMES:
            assert re.search(rf"^{re.escape(name)} +{found[name]:.4f} ", out, re.M), out
        assert "the same text in the same order, as many steps, the same seed" in out
        # Each figure is that of a model of these sizes, trained by hand.
        corpus = load_corpus([place / "text.py"], 2000)
        state = checkpoint.load(place / "run" / "checkpoint.pt")
        settings = TrainSettings(**state["settings"])
        sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "segment": 8}
        for name, window, slots in zip(NAMES[0::3] + NAMES[4:], (8, 8, 16), (8, 0, 0), strict=True):
            config = model_config({**sizes, "window": window, "compressed": slots})
            trainer = Trainer(config, settings, corpus)
            for _ in range(30):
                trainer.train_step()
            result = stream("", trainer.model, corpus.held_out, lambda count: None)
            assert result.bits_per_byte == pytest.approx(found[name], rel=1e-6)
        assert load_model(place / "run" / "window-16").config.window == 16

    def test_without_it_the_table_says_what_it_does_not_show(self, place, capsys):
        assert train("text.py", *TINY, "--steps", 2, "--run", "run") == 0
        out = capsys.readouterr().out
        assert "--compare" in out and "same weights, streamed" in out
        assert not (place / "run" / "window-8").exists()

    @pytest.mark.parametrize("stop", [3, 8, 9, 20])
    def test_continues_where_it_was_stopped(self, place, stop, monkeypatch, capsys):
        """In whichever of the three models; and the same figures come out."""
        step, done = Trainer.train_step, []

        def counted(self):
            done.append(1)
            if len(done) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self)

        args = ("text.py", *TINY, "--steps", 8, "--compare")
        assert train(*args, "--run", "whole") == 0
        monkeypatch.setattr(Trainer, "train_step", counted)
        assert train(*args, "--run", "run") == 130
        assert "python -m ctx train --resume run" in capsys.readouterr().err
        assert train("--resume", "run") == 0
        assert len(done) == 3 * 8
        assert figures(place / "run") == figures(place / "whole")

    def test_a_finished_run_is_compared_later(self, place):
        assert train("text.py", *TINY, "--steps", 6, "--run", "run") == 0
        assert train("--resume", "run", "--compare") == 0
        assert list(figures(place / "run")) == NAMES
        assert train("text.py", *TINY, "--steps", 6, "--run", "at-once", "--compare") == 0
        assert figures(place / "run") == figures(place / "at-once")

    def test_another_model_in_the_folder_is_refused(self, place, capsys):
        assert train("text.py", *TINY, "--steps", 2, "--run", "run/window-8") == 0
        assert train("text.py", *TINY, "--steps", 2, "--run", "run", "--compare") == 2
        err = capsys.readouterr().err
        assert "run/window-8 must hold 'window 8 alone, trained so' of this run" in err

    def test_nothing_to_compare(self, place, capsys):
        code = train("text.py", *TINY, "--compressed", 0, "--compare", "--run", "run")
        assert code == 2 and not (place / "run").exists()
        assert "--compare must go with --compressed above 0, got 0" in capsys.readouterr().err

    def test_sizes_per_layer_and_the_papers_training(self):
        config = model_config(
            {"window": (8, 4, 0), "compressed": (4, 0, 4), "compressor_grad": "aux"}
        )
        first, second = compare.rivals(config)
        assert first.name == "window 8,4,0 alone, trained so"
        assert second.name == "window 12,4,4 alone, trained so"
        assert (first.folder, second.folder) == ("window-8-4-0", "window-12-4-4")
        assert (first.config.window, first.config.compressed) == ((8, 4, 0), 0)
        assert second.config.window == (12, 4, 4) and second.config.aux_loss is None
        with pytest.raises(RecipeError, match="`compare` must go with"):
            compare.rivals(first.config)


class TestAnotherEnd:
    def test_a_finished_run_goes_on(self, place, capsys):
        """Bit for bit a run whose learning rate is from there on that of the longer one."""
        assert train("text.py", *TINY, "--steps", 30, "--run", "run") == 0
        assert train("--resume", "run", "--steps", 50) == 0
        metrics = [json.loads(line) for line in lines_of(place / "run" / "metrics.jsonl")]
        assert [line["step"] for line in metrics] == list(range(1, 51))
        state = checkpoint.load(place / "run" / "checkpoint.pt")
        assert state["step"] == state["settings"]["steps"] == 50
        short, long = (TrainSettings(**{**state["settings"], "steps": n}) for n in (30, 50))
        rates = [short.learning_rate(i) for i in range(30)]
        rates += [long.learning_rate(i) for i in range(30, 50)]
        assert [line["lr"] for line in metrics] == rates
        corpus = load_corpus([place / "text.py"], 2000)
        config = load_model(place / "run").config
        torch.manual_seed(0)
        by_hand = Trainer(config, short, corpus)
        for step in range(50):
            by_hand.settings = short if step < 30 else long
            by_hand.train_step()
        for name, weight in by_hand.model.state_dict().items():
            assert torch.equal(state["weights"][name], weight), name

    def test_an_unfinished_run_gets_another_end(self, place, capsys):
        assert train("text.py", *TINY, "--steps", 30, "--run", "run") == 0
        assert train("--resume", "run", "--steps", 29) == 2
        assert "--steps must be at least the 30 that run has done" in capsys.readouterr().err
        assert train("--resume", "run", "--steps", 30) == 0

    def test_its_comparisons_go_on_too(self, place):
        assert train("text.py", *TINY, "--steps", 6, "--run", "run", "--compare") == 0
        assert train("--resume", "run", "--steps", 9) == 0
        for name in (".", "window-8", "window-16"):
            assert checkpoint.load(place / "run" / name / "checkpoint.pt")["step"] == 9

    def test_a_killed_extension_knows_its_end(self, place, monkeypatch):
        assert train("text.py", *TINY, "--steps", 6, "--run", "run") == 0

        class KilledError(BaseException):
            pass

        def killed(self):
            raise KilledError

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "train_step", killed)
            with pytest.raises(KilledError):
                train("--resume", "run", "--steps", 9)
        assert train("--resume", "run") == 0
        assert checkpoint.load(place / "run" / "checkpoint.pt")["step"] == 9

    def test_other_settings_are_still_refused(self, place, capsys):
        assert train("text.py", *TINY, "--steps", 2, "--run", "run") == 0
        assert train("--resume", "run", "--steps", 3, "--lr", 1) == 2
        assert "drop --lr\n" in capsys.readouterr().err


class TestHelp:
    COMMANDS = ("", "train", "eval", "generate", "plan", "recall", "ablation", "info")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_shows_no_markup(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and len(out) > 50
        assert not re.search(r"`|::|:\w+:|\*\*", out), out

    def test_plain(self):
        assert plain("`a b`: :class:`Schedule` is 1:2") == "a b: Schedule is 1:2"

    def test_as_a_process(self, place):
        code, out, _ = run("--help", cwd=place)
        assert code == 0 and "`" not in out
