"""`python -m ctx` for tests: as a process, as a user runs it, and inside the test's own process,
which saves the two seconds that a new one takes to import torch."""

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from ctx.cli.main import main

MODEL = ["--width", "16", "--layers", "1", "--heads", "2",
         "--window", "8", "--compressed", "8", "--segment", "8"]  # fmt: skip
TINY = [
    *MODEL,
    *["--batch", "4", "--length", "16", "--warmup", "2", "--threads", "1", "--held-out", "2000"],
    *["--update-every", "3", "--update-every-after", "20"],
]
SOURCE = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()


def environment(**changed):
    """Variables with which a process finds the same packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **changed}


def start(*args, cwd, **changed):
    """A process, not waited for; `changed` are variables of its environment."""
    # A shell that runs tests in the background has them ignore SIGINT, and children inherit that.
    listening = {"preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(
        [sys.executable, "-m", "ctx", *map(str, args)],
        cwd=cwd,
        env=environment(**changed),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **listening,
    )


def run(*args, cwd, **changed):
    """A process: its exit code, what it wrote to stdout, and to stderr."""
    process = start(*args, cwd=cwd, **changed)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out.decode(), err.decode()


def here(*args, cwd):
    """The same without a process of its own."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    threads, before = torch.get_num_threads(), Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([*map(str, args)])
            except SystemExit as stop:  # the parser's own way out
                code = stop.code
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    out.flush()
    return code, out.buffer.getvalue().decode(), err.getvalue()


def lines_of(path):
    """Lines of a file, none where there is no file."""
    return path.read_text().splitlines() if path.exists() else []
