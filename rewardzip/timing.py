"""The one timing routine: rivals in turn, so that a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

# a GPU's cycles, about a millisecond: longer than Python takes to launch a call, of an ensemble in mixed precision too
SPIN = 2_000_000


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, and the 10th and 90th percentiles."""

    p50: float
    p10: float
    p90: float


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    rest: float = 0.0,
    longest: float = math.inf,
) -> dict[str, Timing]:
    """Time each call, all of them in turn, for about ``seconds`` in all and at least 7 rounds, or 3 if those take
    ``longest`` seconds.

    On a CPU a sample is a run of calls long enough for the clock; ``time.thread_time`` as the clock leaves out the time
    that a busy machine gave to others, and all threads but this one. ``rest``: seconds before each sample, and then one
    that does not count: the threads of one engine go on spinning when its call is done, on the cores that the next one
    needs. On a GPU it is one call between two events, the L2 cache overwritten before it.
    """
    gpu = torch.device(device).type == "cuda"
    sample = _gpu_sampler(torch.device(device)) if gpu else partial(_cpu_sample, clock)
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, allocates, warms
        once = max(sample(call, 1), 1e-7)
        repeats[name] = 1 if gpu else max(1, int(2e-3 / once))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds, spent, start = 0, 0.0, time.perf_counter()
    while spent < seconds or rounds < (7 if spent < longest else 3):
        for name, call in calls.items():
            if rest:
                time.sleep(rest)
                sample(call, repeats[name])
            samples[name].append(sample(call, repeats[name]))
        rounds, spent = rounds + 1, time.perf_counter() - start
    return {name: _timing(taken) for name, taken in samples.items()}


def apart(call: Callable[[], object], device: torch.device | str, rounds: int = 21) -> dict[str, float]:
    """Medians of one call on a GPU, in seconds: its kernels with their data in the L2 cache; the call until it returns,
    which is Python and the driver; the call until its result is there. ``interleaved`` has the cold cache.
    """
    taken: dict[str, list[float]] = {"warm": [], "python": [], "wall": []}
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        taken["python"].append(time.perf_counter() - begin)
        torch.cuda.synchronize(device)
        taken["wall"].append(time.perf_counter() - begin)
        # this call has filled the cache
        taken["warm"].append(_between_events(call))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def machine(device: torch.device | str = "cpu") -> str:
    """What the times were taken on, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def _timing(taken: list[float]) -> Timing:
    seconds, points = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (taken, (0.1, 0.5, 0.9)))
    p10, p50, p90 = seconds.quantile(points).tolist()
    return Timing(p50, p10, p90)


def _cpu_sample(clock: Callable[[], float], call: Callable[[], object], repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _gpu_sampler(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)

    def sample(call: Callable[[], object], repeats: int) -> float:
        flush.zero_()
        return _between_events(call)

    return sample


def _between_events(call: Callable[[], object]) -> float:
    # the GPU is kept busy until the call is in its queue: it does not wait for Python between the events
    torch.cuda._sleep(SPIN)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
