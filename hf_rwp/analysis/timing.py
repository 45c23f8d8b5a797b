"""What a piece of a training step costs: seconds, bytes, collectives."""

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import profile
from tqdm import tqdm

# Rounds that are not counted: memory is allocated, DDP's buckets are built, kernels are tried, writes are looked for.
WARM_UP = 2

Result = TypeVar("Result")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `function` takes, the GPU's work included."""
    if device.type != "cuda":
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def seconds_in_turns(
    steps: Mapping[str, Callable[[int], Any]], device: torch.device, rounds: int = 5, count: int = 10
) -> dict[str, float]:
    """The median seconds of different kinds of step, in rounds in which they take turns.

    steps: each takes the step's number. rounds: without a first one, which is not counted. count: steps to a turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(rounds + 1), desc="step times", leave=False, disable=None):
        for name, step in steps.items():
            turn = range(count * number, count * (number + 1))
            seconds[name].append(timed(partial(_each, step, turn), device) / count)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _each(step: Callable[[int], Any], numbers: Iterable[int]) -> None:
    for number in numbers:
        step(number)


def on_one_thread(function: Callable[[], Result]) -> Result:
    """What `function` returns, with one of torch's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most memory that `function` takes beyond what there was, in its first two calls, by torch's allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        function()
        function()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_of_process(make: Callable[[], Callable[[], Any]], device: torch.device, tries: int = 4) -> int:
    """The most memory that two calls of what `make` gives take beyond what there was, whichever thread asked for it.

    For a process of its own: on Linux it is the resident memory, of which a first call, of another, has loaded what is
    loaded once; the least of `tries`, since what others of its threads ask for meanwhile only adds. Elsewhere
    `peak_bytes`.
    """
    if device.type == "cuda" or not Path("/proc/self/clear_refs").exists():
        return peak_bytes(make(), device)
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # of other C libraries
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: larger blocks go back to the system as soon as they are free
    make()()
    gc.collect()
    gc.freeze()  # what is loaded: no try need go over it
    return min(_peak_resident(make(), libc) for _ in range(tries))


def _peak_resident(function: Callable[[], Any], libc: ctypes.CDLL) -> int:
    gc.collect()
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _resident("VmRSS")
    function()
    function()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def collectives(step: Callable[[], Any]) -> dict[str, int]:
    """How often a step calls each collective operation, DDP's own included."""
    with profile() as profiler:
        step()
    names = [event.name for event in profiler.events() if event.name.startswith("c10d::")]
    return {name.removeprefix("c10d::").rstrip("_"): names.count(name) for name in sorted(set(names))}
