"""Measuring on a device: a clock that waits for it, calls as CUDA graphs, launches counted. On the
CPU each has a stand-in, so that what uses them can be tried without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["captured", "clock_of", "describe_device", "launches"]


def describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return "the CPU in place of a GPU"
    found = torch.cuda.get_device_properties(device)
    size = found.total_memory / 2**30
    return f"{found.name}, {size:.0f} GiB, {found.multi_processor_count} multiprocessors"


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, once all that was queued is done."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A call as a CUDA graph whose replay returns the tensors of the call that was captured.

    It is made three times before: what is made at the first use is then there.
    """
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()

    def replay() -> Any:
        graph.replay()
        return made

    return replay


def launches(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels that a call launches, copies apart; on the CPU operators of this library."""
    call()
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        call()
        clock_of(device)()
    events = profiled.events() or []
    if not cuda:
        return sum(event.name.startswith("ctx::") for event in events)
    kernels = (event for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)
