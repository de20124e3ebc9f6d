"""`python -m ctx` as a user runs it: its output, its exit codes, its signals."""

import importlib.util
import json
import os
import signal
import sys
import time

import pytest
import torch

import ctx
from command_line import SOURCE, TINY, here, lines_of, run, start
from ctx.memory_rows import leaves
from ctx.recipes.loading import load_model


def wait_for_steps(process, metrics, count):
    deadline = time.monotonic() + 100
    while len(lines_of(metrics)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and a finished run."""
    path = tmp_path_factory.mktemp("cli")
    (path / "text.py").write_bytes(SOURCE[:30_000])
    code, out, err = run("train", "text.py", *TINY, "--steps", 150, "--run", "run", cwd=path)
    assert code == 0, err
    (path / "stdout.txt").write_text(out)
    (path / "stderr.txt").write_text(err)
    return path


class TestTrain:
    def test_prints_the_table(self, folder):
        out = (folder / "stdout.txt").read_text()
        rows = [line.split("  ") for line in out.splitlines()]
        names = [row[0] for row in rows]
        for name in ("both memories", "CMem off", "empty memory at every segment"):
            assert name in names, out
        assert "byte-unigram entropy" in out
        assert "40 tokens" in out  # the reach: 8 + 4 x 8
        assert "Traceback" not in (folder / "stderr.txt").read_text()

    def test_writes_the_run_folder(self, folder):
        made = {path.name for path in (folder / "run").iterdir()}
        drawn = {"curves.png"} if importlib.util.find_spec("matplotlib") else set()
        assert made == {"checkpoint.pt", "metrics.jsonl", "evaluation.json"} | drawn
        metrics = [json.loads(line) for line in lines_of(folder / "run" / "metrics.jsonl")]
        assert [line["step"] for line in metrics] == list(range(1, 151))
        assert metrics[-1]["bits_per_byte"] < metrics[0]["bits_per_byte"]
        results = json.loads((folder / "run" / "evaluation.json").read_text())
        assert [result["reach"] for result in results] == [40, 8, 0]
        assert results[0]["memory_bytes"] > results[1]["memory_bytes"]
        for picture in drawn:
            assert (folder / "run" / picture).read_bytes().startswith(b"\x89PNG")

    def test_numbers_its_runs(self, tmp_path):
        (tmp_path / "text.py").write_bytes(SOURCE[:5_000])
        (tmp_path / "runs" / "1").mkdir(parents=True)
        code, out, _ = here("train", "text.py", *TINY, "--steps", 2, cwd=tmp_path)
        assert code == 0
        assert "runs/2" in out and (tmp_path / "runs" / "2" / "checkpoint.pt").exists()

    def test_without_tqdm_and_matplotlib(self, tmp_path):
        """The extra [train] is a convenience: without it one line says what is missing."""
        (tmp_path / "text.py").write_bytes(SOURCE[:5_000])
        for name in ("tqdm", "matplotlib"):
            (tmp_path / f"{name}.py").write_text("raise ImportError\n")
        path = os.pathsep.join([str(tmp_path), *sys.path])
        code, out, err = run(
            "train", "text.py", *TINY, "--steps", 2, "--run", "run", cwd=tmp_path, PYTHONPATH=path
        )
        assert code == 0, err
        assert "pip install matplotlib" in err and "both memories" in out
        assert not (tmp_path / "run" / "curves.png").exists()


class TestInterrupted:
    """Whatever stops a run, --resume ends where the uninterrupted run ended, bit for bit."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_resume(self, folder, number):
        name = f"run-{number.name}"
        process = start(
            "train", "text.py", *TINY, "--steps", 150, "--run", name, "--checkpoint-every", 10,
            cwd=folder,
        )  # fmt: skip
        wait_for_steps(process, folder / name / "metrics.jsonl", 25)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            assert f"continue with: python -m ctx train --resume {name}" in err.decode()
        assert b"Traceback" not in err and b"both memories" not in out

        code, out, err = here("train", "--resume", name, cwd=folder)
        assert code == 0, err
        ours, theirs = (
            torch.load(folder / run_name / "checkpoint.pt", weights_only=True)
            for run_name in (name, "run")
        )
        assert ours["step"] == theirs["step"] == 150
        for key, weight in theirs["weights"].items():
            assert torch.equal(ours["weights"][key], weight), key
        mine, other = (ctx.Memory.from_state_dict(state["memory"]) for state in (ours, theirs))
        assert all(map(torch.equal, leaves(mine), leaves(other)))
        losses = [
            [
                (line["step"], line["bits_per_byte"])
                for line in map(json.loads, lines_of(folder / run_name / "metrics.jsonl"))
            ]
            for run_name in (name, "run")
        ]
        assert losses[0] == losses[1]

    def test_resume_of_a_finished_run_evaluates_again(self, folder):
        before = (folder / "run" / "metrics.jsonl").read_text()
        code, out, _ = here("train", "--resume", "run", cwd=folder)
        assert code == 0
        assert (folder / "run" / "metrics.jsonl").read_text() == before
        old = (folder / "stdout.txt").read_text()
        figure = [line.split()[2] for line in (out + old).splitlines() if "both mem" in line]
        assert len(figure) == 2 and figure[0] == figure[1]

    def test_resume_from_another_folder(self, folder, tmp_path):
        code, _, err = here("train", "--resume", folder / "run", cwd=tmp_path)
        assert code == 0, err


class TestEval:
    def test_table(self, folder):
        (folder / "other.txt").write_bytes(SOURCE[30_000:40_000])
        code, out, _ = here("eval", "run", "other.txt", cwd=folder)
        assert code == 0
        assert "both memories" in out and "10,000 bytes of text" in out

    def test_other_sizes(self, folder):
        code, out, _ = here("eval", "run", "text.py", "--window", 16, "--compressed", 0, cwd=folder)
        assert code == 0
        both, off = (line.split() for line in out.splitlines() if line[:4] in ("both", "CMem"))
        assert both[2] == off[2] and "16 tokens" in out

    def test_sizes_per_layer(self, folder):
        two = [*TINY, "--layers", 2, "--compressed", "8,0", "--ratio", "4,2"]
        two += ["--memory-content", "hidden", "--compressor-grad", "aux"]
        code, out, err = here("train", "text.py", *two, "--steps", 3, "--run", "layers", cwd=folder)
        assert code == 0, err
        assert "reach 40 tokens" in out
        code, out, err = here("eval", "layers", "text.py", "--compressed", "2,1", cwd=folder)
        assert code == 0 and "16 tokens" in out, err
        assert here("generate", "layers", "--tokens", 5, cwd=folder)[0] == 0

    def test_usage(self, folder):
        """A line per layer; the shares add up to one."""
        code, out, _ = here("eval", "run", "text.py", "--usage", cwd=folder)
        assert code == 0
        lines = [line.split() for line in out.splitlines() if line.startswith("layer ")]
        state = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
        layers = state["config"]["num_layers"]
        assert [line[:2] for line in lines] == [["layer", str(i)] for i in range(layers)]
        for line in lines:
            sinks, compressed, window = map(float, line[2:])
            assert sinks == 0 and compressed > 0 and window > 0
            assert abs(sinks + compressed + window - 1) < 2e-3


class TestGenerate:
    def test_streams_the_prompt_and_its_continuation(self, folder):
        args = ("generate", "run", "--prompt", "def é(", "--tokens", 30, "--seed", 3)
        code, out, err = here(*args, cwd=folder)
        assert (code, err) == (0, "")
        assert out.startswith("def é(") and out.endswith("\n")
        assert here(*args, cwd=folder)[1] == out
        assert here(*args[:-1], 4, cwd=folder)[1] != out

    def test_comes_as_it_is_drawn_and_may_be_cut_off(self, folder):
        process = start("generate", "run", "--tokens", 10**7, cwd=folder)
        assert process.stdout.read(20)
        process.stdout.close()  # as `| head -c 20` does
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""

    def test_interrupted(self, folder):
        process = start("generate", "run", "--tokens", 10**7, cwd=folder)
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"ctx generate: interrupted\n")


class TestExport:
    def test_writes_a_package(self, folder, monkeypatch):
        """Of the run's weights; what the compiler makes of them is another test's."""

        def compiler(program, *, package_path, inductor_configs):
            torch.export.save(program, package_path)
            return package_path

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
        code, out, err = here("export", "run", "--out", "model.pt2", cwd=folder)
        assert (code, out, err) == (0, "written: model.pt2\n", "")
        step = torch.export.load(folder / "model.pt2").module()
        model = load_model(folder / "run")
        ours, theirs, tokens = model.init_memory(1), model.init_memory(1), torch.tensor([[9, 65]])
        with torch.no_grad():
            expected, _ = model(tokens, theirs, last_only=True)
        assert torch.allclose(step(tokens, torch.tensor([2]), leaves(ours)), expected, atol=1e-6)


class TestOther:
    def test_version(self, tmp_path):
        assert run("--version", cwd=tmp_path)[:2] == (0, f"ctx {ctx.__version__}\n")

    def test_cmake_prefix_path(self, tmp_path):
        assert here("--cmake-prefix-path", cwd=tmp_path)[:2] == (0, f"{ctx.cmake_prefix_path}\n")

    def test_help_names_every_default(self, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        code, out, _ = here("train", "--help", cwd=tmp_path)
        assert code == 0
        assert out.count("(default: ") >= 20


WRONG = {
    "no command": ([], "a command is missing"),
    "command": (["walk"], "invalid choice: 'walk'"),
    "option": (["train", "--walk"], "unrecognized arguments: --walk"),
    "not a number": (["train", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    "missing file": (["train", "none.txt"], "cannot read none.txt: No such file or directory"),
    "directory": (["train", "."], "cannot read .: Is a directory"),
    "empty file": (["train", "empty.txt"], "empty.txt must be a text file, got an empty one"),
    "binary": (["train", "binary"], "binary must be UTF-8 text, got byte 0x80 at 2"),
    "too short": (["train", "text.py", "--batch", "999"], "the text must have at least"),
    "heads": (["train", "text.py", "--heads", "3"], "--width must be a multiple of --heads = 3"),
    "kv heads": (["train", "text.py", "--kv-heads", "3"], "--kv-heads must divide"),
    "ratio": (["train", "text.py", "--ratio", "0"], "--ratio must be"),
    "window": (["train", "text.py", "--window", "-1"], "--window must be"),
    "sizes": (["train", "text.py", "--window", "8,x"], "argument --window: invalid sizes value"),
    "sizes per layer": (
        ["train", "text.py", "--compressed", "8,0"],
        "--compressed must be one int or --layers = 3 of them, got [8, 0]",
    ),
    "size of a layer": (
        ["train", "text.py", "--window", "8,8,-1"],
        "--window must be between 0 and 1073741824, got -1 in layer 2",
    ),
    "many layers": (["train", "text.py", "--layers", str(2**60)], "do not fit"),
    "content": (["train", "text.py", "--memory-content", "x"], "--memory-content must be one of"),
    "compressor": (["train", "text.py", "--compressor", "zip"], "--compressor must be one of"),
    "steps": (["train", "text.py", "--steps", "0"], "--steps must be at least 1, got 0"),
    "lr": (["train", "text.py", "--lr", "nan"], "--lr must be at least 0, got nan"),
    "huge width": (["train", "text.py", "--width", str(2**40)], "do not fit"),
    "huge window": (["train", "text.py", "--window", str(2**29)], "do not fit"),
    "huge memory": (["train", "text.py", "--compressed", str(2**29)], "do not fit"),
    "beyond int64": (
        ["train", "text.py", "--window", str(2**70)],
        "--window must fit into 64 bits",
    ),
    "run exists": (["train", "text.py", *TINY, "--run", "run"], "run already holds a run"),
    "run is a file": (["train", "text.py", *TINY, "--run", "text.py"], "cannot write text.py"),
    "resume nothing": (["train", "--resume", "none"], "none must be a run folder"),
    "resume and set": (["train", "--resume", "run", "--lr", "1"], "drop --lr"),
    "resume a file": (["train", "text.py", "--resume", "run"], "drop FILES"),
    "resume a changed text": (["train", "--resume", "changed"], "the texts must be those"),
    "eval no run": (["eval", "none", "text.py"], "none must be a run folder"),
    "eval version": (["eval", "future", "text.py"], "of version 1, got version 99"),
    "eval corrupt": (["eval", "corrupt", "text.py"], "got a damaged or foreign file"),
    "eval no file": (["eval", "run", "none.txt"], "cannot read none.txt"),
    "eval one byte": (["eval", "run", "short.txt"], "at least 2 bytes, got 1"),
    "eval window": (["eval", "run", "text.py", "--window", "-3"], "--window must be"),
    "generate no run": (["generate", "text.py"], "text.py must be a checkpoint of ctx"),
    "generate prompt": (["generate", "run", "--prompt", ""], "--prompt must have at least one"),
    "generate tokens": (
        ["generate", "run", "--tokens", "-1"],
        "--tokens must be at least 0, got -1",
    ),
    "generate top-k": (["generate", "run", "--top-k", "0"], "--top-k must be at least 1, got 0"),
    "export no run": (["export", "none", "--out", "m.pt2"], "none must be a run folder"),
    "export name": (["export", "run", "--out", "m.so"], "--out must be a file that ends with .pt2"),
    "export folder": (
        ["export", "run", "--out", "none/m.pt2"],
        "cannot write none/m.pt2: No such file",
    ),
    "threads": (["generate", "run", "--threads", "-1"], "--threads must be at least 0, got -1"),
}


# One of each command also as a process of its own: what main returns is the exit code.
AS_PROCESSES = ["no command", "missing file", "eval corrupt", "generate tokens"]


@pytest.fixture(scope="module")
def wrong(folder):
    """The folder with whatever the wrong command lines stumble over."""
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_bytes(b"x")
    (folder / "binary").write_bytes(b"ab\x80\x00" * 100)
    state = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    for name in ("future", "corrupt", "changed"):
        (folder / name).mkdir()
    torch.save({**state, "version": 99}, folder / "future" / "checkpoint.pt")
    torch.save({**state, "digest": "other"}, folder / "changed" / "checkpoint.pt")
    half = (folder / "run" / "checkpoint.pt").read_bytes()[:5000]
    (folder / "corrupt" / "checkpoint.pt").write_bytes(half)
    return folder


def check_error(name, code, out, err):
    assert WRONG[name][1] in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ctx")


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line_and_exit_code_2(wrong, name):
    check_error(name, *here(*WRONG[name][0], cwd=wrong))
    assert not (wrong / "runs").exists()


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_errors_of_processes(wrong, name):
    check_error(name, *run(*WRONG[name][0], cwd=wrong))
