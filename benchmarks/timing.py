"""Clocks: interleaved samples and percentiles.

Candidates take turns (A B A B ...): a GPU that warms up or lowers its clock does so to all of them alike.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[int], object]
"""One call of what is measured; the argument counts calls, so that it can rotate over several inputs."""

BATCH = 8  # rounds between two waits for the GPU: bounds the queue and the events in flight
SAMPLE_MS = 1.0  # of calls in one sample: far above the resolution of CUDA events (0.5 us)


@dataclass(frozen=True)
class Stats:
    """Of one measured quantity: middle, tenth and ninetieth percentile, and how many samples they are of."""

    median: float
    p10: float
    p90: float
    n: int

    def plus(self, amount: float) -> "Stats":
        """Every sample later by the same amount."""
        return Stats(self.median + amount, self.p10 + amount, self.p90 + amount, self.n)

    def over(self, count: int) -> "Stats":
        """Of one call, where a sample was of ``count``."""
        return Stats(self.median / count, self.p10 / count, self.p90 / count, self.n)


def summarise(samples: Sequence[float]) -> Stats:
    """Percentiles by linear interpolation between the sorted samples."""
    ordered = sorted(samples)
    if len(ordered) == 1:
        return Stats(ordered[0], ordered[0], ordered[0], 1)
    tenths = statistics.quantiles(ordered, n=10, method="inclusive")
    return Stats(statistics.median(ordered), tenths[0], tenths[8], len(ordered))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing pending."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies_beyond_l2(nbytes: int, device: torch.device, most: int = 16) -> int:
    """How many buffers of a size are needed so that a call never finds its own in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(most, max(1, math.ceil(3 * cache / max(nbytes, 1))))


def interleave(
    runs: Mapping[str, Run], device: torch.device, *, seconds: float, least: int = 5, most: int = 200
) -> dict[str, Stats]:
    """Time candidates in turns.

    Args:
        runs: what to time, warmed up already.
        device: where they run.
        seconds: roughly, for all of them together.
        least: samples of each, whatever it takes.
        most: samples of each.

    Returns:
        milliseconds of one call. On a GPU by events around as many calls as make a millisecond, without waiting in between:
        a call that takes the host longer than the GPU counts with the host's time.
    """
    if not runs:
        return {}
    repeats, rough = {}, 0.0
    for name, run in runs.items():
        one = sample(run, 2, 0, device)()
        one = sample(run, 2, 0, device)()  # the first of them may find the GPU asleep
        repeats[name] = max(1, min(50, math.ceil(SAMPLE_MS / max(one, 1e-4))))
        rough += one * repeats[name]
    rounds = max(least, min(most, int(1e3 * seconds / max(rough, 1e-3))))
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        if i % BATCH == 0 and device.type == "cuda":
            [*runs.values()][-1](i)  # untimed: so that the first sample finds the GPU as busy as the others do
        for name, run in runs.items():
            pending[name].append(sample(run, repeats[name], i * repeats[name], device))
        if (i + 1) % BATCH == 0 or i == rounds - 1:
            for name, readings in pending.items():
                samples[name] += [reading() for reading in readings]
                readings.clear()
    return {name: summarise(values) for name, values in samples.items()}


def sample(run: Run, repeats: int, first: int, device: torch.device) -> Callable[[], float]:
    """Make calls; what is returned gives the milliseconds of one of them, once they are through."""
    if device.type != "cuda":
        began = time.perf_counter()
        for i in range(first, first + repeats):
            run(i)
        took = 1e3 * (time.perf_counter() - began) / repeats
        return lambda: took
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(first, first + repeats):
        run(i)
    end.record()

    def reading() -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats

    return reading


def interleave_host(
    runs: Mapping[str, Run], device: torch.device, *, calls: int = 100, rounds: int = 30
) -> dict[str, Stats]:
    """Host time of calls in microseconds, in turns.

    The queue is empty when a sample begins, and is waited for after the clock was read; shapes must be so small that the
    GPU keeps up, else the host waits for a full queue and the number is the GPU's.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize(device)
            began = time.perf_counter()
            for i in range(calls):
                run(i)
            samples[name].append(1e6 * (time.perf_counter() - began) / calls)
    synchronize(device)
    return {name: summarise(values) for name, values in samples.items()}


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> Stats:
    """GB/s of a copy on the device, bytes read and bytes written both counted; random data."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    took = interleave({"copy": lambda _: target.copy_(source)}, device, seconds=0.2, least=10, most=50)["copy"]
    rate = [2 * source.nbytes / ms / 1e6 for ms in (took.median, took.p90, took.p10)]
    return Stats(rate[0], rate[1], rate[2], took.n)
