"""`python -m ctx stream` as a user runs it: its table, its picture, its errors."""

import json
import os
import re
import shutil
import sys

import pytest
import torch

import ctx.hf
from command_line import SOURCE, here, run
from ctx.cli.stream import tokens_of
from ctx.hf.evaluation import candidates, schedule_of, stream
from hf_models import transformers

tokenizers = pytest.importorskip("tokenizers", reason="needs transformers")


def tokenizer_of_bytes():
    """A token per byte, and one to begin with."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, its tokenizer and a text."""
    path = tmp_path_factory.mktemp("stream")
    llama().save_pretrained(path / "model")
    tokenizer_of_bytes().save_pretrained(path / "model")
    (path / "text.py").write_bytes(SOURCE[:3000])
    return path


SMALL = ["--model", "model", "--text", "text.py", "--slots", "32", "--threads", "1"]
ROW = r"^{}  +([\d,.]+)  *([+-][\d.]+(?: ± [\d.]+)?)?  +([\d,]+)  +([\d,.]+) MiB$"


def row(name, out):
    """Perplexity, difference, tokens per second and MiB of one line of the table."""
    found = re.search(ROW.format(re.escape(name)), out, re.M)
    assert found, out
    return found.groups()


class TestTable:
    def test_prints_what_the_evaluation_says(self, folder):
        args = ["--compressed", "12", "--ratio", "2", "--tokens", "1200", "--chunk", "100"]
        code, out, err = here("stream", *SMALL, *args, "--plot", "loss.png", cwd=folder)
        assert code == 0, err
        assert "1,200 tokens, 100 per call, float32, 1 threads" in out
        assert err.splitlines()[-1] == "stream 2,912/2,912"  # 2 × 1,200 and 512
        model, tokenizer = ctx.hf.load_model(folder / "model")
        ids = tokens_of(tokenizer, SOURCE[:3000].decode(), 1200)
        window = candidates.window_and_sinks(32)
        mean = candidates.compressive("mean", schedule_of(32, 12, 2))
        scores = stream(model, ids, [candidates.full_cache(limit=512), window, mean])
        names = ["full cache, first 512 tokens", "window + sinks, 32", "mean, 14 + 12 × 2"]
        for name, one in zip(names, scores, strict=True):
            perplexity, over, speed, size = row(name, out)
            assert float(perplexity.replace(",", "")) == pytest.approx(
                float(one.losses.double().mean().exp()), rel=1e-3, abs=2e-3
            )
            assert int(speed.replace(",", "")) > 0 and float(size) >= 0
            if one is scores[1]:
                assert over is None
                continue
            count = len(one.losses)
            both = (one.losses - scores[1].losses[:count]).double()
            assert float(over.split()[0]) == pytest.approx(float(both.mean()), abs=2e-3)
            assert ("±" in over) == (count > 512 * 1.5)
        pytest.importorskip("matplotlib", reason="pip install matplotlib")
        assert "written: loss.png" in out
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_all_of_the_text(self, folder):
        code, out, err = here("stream", *SMALL, "--full", 0, cwd=folder)
        assert code == 0, err
        assert "3,001 tokens, 512 per call" in out and "full cache" not in out

    def test_bfloat16_and_distance(self, folder):
        args = ["--dtype", "bfloat16", "--distance", "token", "--tokens", "300"]
        code, out, err = here("stream", *SMALL, *args, cwd=folder)
        assert code == 0, err
        assert "full cache  " in out and "bfloat16" in out

    def test_compressors_of_a_file(self, folder, monkeypatch):
        """Sizes and distance are the file's."""

        class Loaded:
            schedules = (schedule_of(24, 8, 4),) * 2
            mean_slots, distance = 24, "token"

        def load(path, model):
            assert path.name == "fitted.safetensors" and model.config.model_type == "llama"
            return Loaded

        def make_cache(config, *, compressor, **sizes):
            made.append(sizes)
            if compressor is Loaded:
                assert not sizes
                return cache(config, window=10, compressed=8, ratio=4, segment=1, distance="token")
            return cache(config, compressor=compressor, **sizes)

        made, cache = [], ctx.hf.CompressiveCache
        (folder / "fitted.safetensors").touch()
        monkeypatch.setattr(ctx.hf, "load_compressors", load, raising=False)
        monkeypatch.setattr(ctx.hf, "CompressiveCache", make_cache, raising=False)
        args = [*SMALL[:4], "--compressor", "fitted.safetensors", "--tokens", "300"]
        code, out, err = here("stream", *args, cwd=folder)
        assert code == 0, err
        assert (made[0]["window"], made[0]["distance"], made[1]) == (19, "token", {})
        row("window + sinks, 24", out)
        assert row("fitted.safetensors", out)[1] is not None

    def test_without_matplotlib(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        code, out, err = here("stream", *SMALL, "--tokens", 99, "--plot", "none.png", cwd=folder)
        assert code == 0, err
        assert "no none.png: pip install matplotlib" in err and "window + sinks" in out
        assert not (folder / "none.png").exists()


def test_first_tokens():
    tokenizer = tokenizer_of_bytes()
    text = "word " * 100
    whole = tokens_of(tokenizer, text, None)
    assert len(whole) == 501 and whole[0] == 0
    for limit in (2, 20, 500, 501, 600):
        assert torch.equal(tokens_of(tokenizer, text, limit), whole[:limit])


def test_interrupted(folder, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ctx.cli.stream.stream", interrupted)
    assert here("stream", *SMALL, cwd=folder) == (130, "", "ctx stream: interrupted\n")


# --- errors ---------------------------------------------------------------------------------------

# name: arguments that replace those of SMALL or come behind them, and what the line says.
WRONG = {
    "no model": (["--model", "none"], "--model must be that of a model, got none"),
    "a file": (["--model", "text.py"], "--model must be that of a model, got text.py"),
    "empty folder": (["--model", "empty"], "--model must have a config.json or one .gguf file, "
                     "got neither in empty"),
    "two gguf files": (["--model", "two"], "got a.gguf, b.gguf in two"),
    "no tokenizer": (["--model", "mute"], "--model must have a tokenizer that transformers reads"),
    "no weights": (["--model", "empty-handed"], "--model must have a model that transformers"),
    "damaged weights": (["--model", "damaged"], "--model must have a model that transformers"),
    "damaged config": (["--model", "garbled"], "transformers reads, got garbled"),
    "damaged gguf": (["--model", "gguf"], "gguf"),
    "other tokenizer": (["--model", "narrow"], "of the model's 50 tokens, got token"),
    "learned positions": (["--model", "gpt2"], "config must be of a model with rotary positions"),
    "no text": (["--text", "none.txt"], "cannot read none.txt"),
    "binary text": (["--text", "model/model.safetensors"], "must be UTF-8 text"),
    "short text": (["--text", "short.txt", "--model", "no-bos"], "at least 2 tokens, got 1"),
    "slots": (["--slots", "4"], "--slots must be at least 5, which the other sizes need"),
    "no slots": (["--slots", "0"], "--slots must be at least 1, got 0"),
    "many compressed": (["--compressed", "30"], "--slots must be at least"),
    "negative compressed": (["--compressed", "-1"], "--compressed must be between"),
    "ratio alone": (["--ratio", "2"], "--ratio must come with --compressed"),
    "ratio": (["--compressed", "4", "--ratio", "0"], "--ratio must be at least 1, got 0"),
    "tokens": (["--tokens", "1"], "--tokens must be at least 2, got 1"),
    "full": (["--full", "-1"], "--full must be at least 0, got -1"),
    "full of one": (["--full", "1"], "--full must be 0 or at least 2, got 1"),
    "chunk": (["--chunk", "0"], "--chunk must be at least 1, got 0"),
    "threads": (["--threads", "-1"], "--threads must be at least 0, got -1"),
    "dtype": (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    "distance": (["--distance", "far"], "--distance: invalid choice: 'far'"),
    "no compressor": (["--compressor", "none"], "--compressor takes all sizes from its file: "
                      "drop --slots"),
    "plot nowhere": (["--plot", "none/x.png"], "cannot write none/x.png: no such folder"),
    "plot of what": (["--plot", "x.abc"], "--plot must end with .png, .pdf, .svg, got x.abc"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(folder):
    """The folder with whatever the wrong command lines stumble over."""
    (folder / "empty").mkdir()
    for name in ("two", "gguf"):
        (folder / name).mkdir()
        (folder / name / "a.gguf").write_bytes(b"GGUF")
    (folder / "two" / "b.gguf").touch()
    for name in ("mute", "empty-handed", "damaged", "garbled", "narrow", "no-bos"):
        shutil.copytree(folder / "model", folder / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "mute" / name).unlink()
    (folder / "empty-handed" / "model.safetensors").unlink()
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (folder / "garbled" / "config.json").write_text("{")
    narrow = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(narrow).save_pretrained(folder / "narrow")
    learned = transformers.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=4096
    )
    transformers.GPT2LMHeadModel(learned).save_pretrained(folder / "gpt2")
    tokenizer_of_bytes().save_pretrained(folder / "gpt2")
    stored = folder / "no-bos" / "tokenizer.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "post_processor": None}))
    (folder / "short.txt").write_text("x")
    return folder


def command(name):
    options = dict(zip(SMALL[::2], SMALL[1::2], strict=True))
    given, message = WRONG[name]
    options |= dict(zip(given[::2], given[1::2], strict=True))
    return ["stream", *(part for pair in options.items() for part in pair)], message


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line_and_exit_code_2(wrong, name):
    args, message = command(name)
    code, out, err = here(*args, cwd=wrong)
    assert message in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ctx stream: ")


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = here("stream", *SMALL, cwd=folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ctx stream: transformers must be installed, >=5.17 and <6")


def test_transformers_is_imported_late(folder):
    """Commands that need no model, and errors that come before it, do not wait for it."""
    (folder / "transformers.py").write_text("raise SystemExit('imported')\n")
    path = os.pathsep.join([str(folder), *sys.path])
    args, message = command("no model")
    code, out, err = run(*args, cwd=folder, PYTHONPATH=path)
    assert message in err and (code, out, err.count("\n")) == (2, "", 1)
    (folder / "transformers.py").unlink()
