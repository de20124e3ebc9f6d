"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import ctx
from benchmarks._harness import ROOT

__all__ = ["describe", "machine", "peak_rss", "reset_peak", "rss"]


def machine() -> dict[str, Any]:
    """CPU, versions, threads, and how busy the machine is as the benchmark begins."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "instruction_set": ctx._C.cpu_capability(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ctx": ctx.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def describe(facts: dict[str, Any]) -> str:
    """`machine()` in two lines."""
    commit = f" ({facts['commit']})" if facts["commit"] else ""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"load {facts['load']} at the start\n"
        f"ctx {facts['ctx']}{commit} {facts['instruction_set']}, "
        f"torch {facts['torch']} {facts['torch_instruction_set']}, Python {facts['python']}"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "model" in facts and "cpu family" in facts:  # a virtual machine's name says little
        name += f" (family {facts['cpu family']} model {facts['model']})"
    return name


def _commit() -> str | None:
    """Of the sources, with "+" where they have been changed since; None outside a repository."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"benchmarks: /proc/self/status must have {name}, got none")


def rss() -> int:
    """Resident memory of this process, in bytes."""
    return _status("VmRSS")


def reset_peak() -> None:
    """`peak_rss` counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The most that was resident since `reset_peak`, in bytes."""
    return _status("VmHWM")
