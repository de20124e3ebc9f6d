"""tests/gpu/run without a GPU: every stage has its outcome in the report, whatever it is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent / "gpu" / "run"
STAGES = ["machine", "build", "tests", "benchmarks", "sanitizers"]


@pytest.mark.skipif(not RUN.is_file(), reason="needs the sources")
def test_dry_run(tmp_path):
    path = os.pathsep.join(sys.path)  # whatever ctx is tested here
    done = subprocess.run(
        [sys.executable, RUN, "--dry-run"],
        env={**os.environ, "OUT": str(tmp_path), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    report = (tmp_path / "report.md").read_text()
    outcomes = dict(re.findall(r"^\| (\w+) \| [^|]+ \| ([\w ]+) \|", report, re.M))
    ran = {"tests": "passed", "benchmarks": "passed"}
    assert outcomes == {"stage": "outcome"} | dict.fromkeys(STAGES, "skipped") | ran
    assert " passed" in report.split("## tests")[1].split("## benchmarks")[0]
    assert json.loads((tmp_path / "cuda.json").read_text())["benchmark"] == "cuda"
