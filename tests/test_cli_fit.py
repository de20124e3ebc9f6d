"""`python -m ctx fit` as a user runs it, and what `ctx stream` makes of its file."""

import pytest
import torch

import ctx.hf
from command_line import SOURCE, here
from test_cli_stream import llama, row, tokenizer_of_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, its tokenizer and texts."""
    path = tmp_path_factory.mktemp("fit")
    llama().save_pretrained(path / "model")
    tokenizer_of_bytes().save_pretrained(path / "model")
    (path / "text.py").write_bytes(SOURCE[:3000])
    (path / "more.py").write_bytes(SOURCE[3000:5000])
    return path


SMALL = [
    "--model", "model", "--text", "text.py", "--slots", "24", "--ratio", "2", "--excerpts", "3",
    "--validation", "1", "--excerpt-tokens", "128", "--queries", "16", "--steps", "4",
    "--end-to-end-steps", "2", "--end-to-end-tokens", "64", "--end-to-end-queries", "8",
    "--threads", "1",
]  # fmt: skip


def test_fits_and_streams(folder):
    code, out, err = here("fit", *SMALL, "--end-to-end", "--out", "a.safetensors", cwd=folder)
    assert code == 0, err
    assert "record 4/4" in err and "layers 2/2" in err and "end to end 2/2" in err
    assert "at most 24 entries in a layer, distance 'slot'" in out
    assert "KL to the full cache" in out and "written: a.safetensors" in out
    assert not (folder / "a.safetensors.partial").exists()
    model, tokenizer = ctx.hf.load_model(folder / "model")
    fitted = ctx.hf.load_compressors(folder / "a.safetensors", model)
    ids = tokenizer(SOURCE[:3000].decode(), add_special_tokens=False)["input_ids"]
    assert fitted.report["settings"]["end_to_end"] is True
    by_hand = ctx.hf.fit(model, torch.tensor(ids), **fitted.report["settings"])
    assert torch.equal(by_hand.bias, fitted.bias)
    for at, schedule in enumerate(fitted.schedules):
        assert f"{at:5d}  {schedule.window:6d}  {schedule.compressed:5d}" in out

    args = ["--model", "model", "--text", "more.py", "--compressor", "a.safetensors"]
    code, out, err = here("stream", *args, "--tokens", 300, cwd=folder)
    assert code == 0, err
    row("window + sinks, 24", out)
    assert row("a.safetensors", out)[1] is not None


def test_entries_by_layer(folder):
    args = [*SMALL, "--allocation", "measured", "--excerpt-tokens", "256", "--excerpts", "2"]
    code, out, err = here("fit", *args, "--out", "c.safetensors", cwd=folder)
    assert code == 0, err
    assert "alone 2/2" in err and "allocation" in err
    fitted = ctx.hf.load_compressors(folder / "c.safetensors")
    assert fitted.mean_slots <= 24
    most, mean = fitted.slots, fitted.mean_slots
    said = f"{most} entries" if most == mean else f"{most} entries in a layer, {mean} on average"
    assert f"at most {said}" in out
    args = ["--model", "model", "--text", "more.py", "--compressor", "c.safetensors"]
    code, out, err = here("stream", *args, "--tokens", 300, cwd=folder)
    assert code == 0, err
    row(f"window + sinks, {mean}", out)


def test_several_texts_and_a_compressor(folder):
    args = [*SMALL, "--text", "text.py", "more.py", "--compressor", "conv", "--distance", "token"]
    code, _, err = here("fit", *args, "--out", "b.safetensors", cwd=folder)
    assert code == 0, err
    fitted = ctx.hf.load_compressors(folder / "b.safetensors")
    assert fitted.distance == "token" and "end_to_end" not in fitted.report
    assert fitted.report["settings"]["compressor"] == "conv"


def test_goes_on_after_an_interruption(folder, monkeypatch):
    from ctx.hf.fitting import run as fitting

    whole = fitting._Fit._layer

    def interrupted(self, *rest):
        if self.partial.state["layers"]:  # the first one is done
            raise KeyboardInterrupt
        return whole(self, *rest)

    args = ["fit", *SMALL, "--out", "c.safetensors"]
    monkeypatch.setattr(fitting._Fit, "_layer", interrupted)
    code, out, err = here(*args, cwd=folder)
    assert (code, out) == (130, "") and "c.safetensors.partial; the same command goes on" in err
    monkeypatch.undo()
    assert "of another fit; remove it" in here(*args, "--seed", "4", cwd=folder)[2]
    code, _, err = here(*args, cwd=folder)
    assert code == 0, err
    assert not (folder / "c.safetensors.partial").exists()


WRONG = {
    "no model": (["--model", "none"], "--model must be that of a model, got none"),
    "no text": (["--text", "none.txt"], "cannot read none.txt"),
    "a short text": (["--excerpts", "90"], "texts must have 91 disjoint parts of 128 tokens"),
    "slots": (["--slots", "6"], "--slots must be at least 7"),
    "ratio": (["--ratio", "1"], "--ratio must be at least 2, got 1"),
    "short excerpts": (
        ["--excerpt-tokens", "32"],
        "--excerpt-tokens must be more than --slots + 8",
    ),
    "long excerpts": (["--excerpt-tokens", "513"], "max_position_embeddings = 512, got 513"),
    "lr": (["--lr", "0"], "--lr must be positive"),
    "compressor": (["--compressor", "median"], "--compressor: invalid choice: 'median'"),
    "characters": (["--characters", "0"], "--characters must be at least 1, got 0"),
    "few characters": (["--characters", "300"], "disjoint parts of 128 tokens"),
    "out nowhere": (["--out", "none/x"], "cannot write none/x"),
    "out a folder": (["--out", "model"], "cannot write model"),
    "threads": (["--threads", "-1"], "--threads must be at least 0, got -1"),
}


@pytest.mark.parametrize("wrong, said", WRONG.values(), ids=WRONG)
def test_errors_are_one_line(folder, wrong, said):
    code, out, err = here("fit", *SMALL, "--out", "w.safetensors", *wrong, cwd=folder)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("ctx fit: ") and said in last, err
    assert not (folder / "w.safetensors").exists()
