"""CUDA graphs: what is measured, recorded once and replayed, so that the GPU's time shows without the host's."""

import functools
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from benchmarks.timing import Run, sample

GRAPH_MS = 0.5  # of calls in one graph: far above what launching it takes


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Work on the stream that graphs are recorded on.

    Autograd runs a backward where its forward ran: one that is to be recorded needs its forward made here.
    """
    if device.type != "cuda":
        yield
        return
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def record(run: Run, calls: int, device: torch.device, pool: Any = None) -> Run:
    """Calls in a CUDA graph; what is returned replays them all.

    Args:
        run: called before, outside: libraries set themselves up, and algorithms are searched, where that is allowed.
        calls: how many.
        device: a GPU.
        pool: of memory, shared with graphs that are not replayed any more.
    """
    graph = torch.cuda.CUDAGraph()
    with on_capture_stream(device):
        graph.capture_begin(*([] if pool is None else [pool]))
        try:
            for i in range(calls):
                run(i)
        except Exception:
            with suppress(RuntimeError):  # the recording is void; what went wrong is more telling
                graph.capture_end()
            raise
        graph.capture_end()
    return lambda _: graph.replay()


def graphed(run: Run, device: torch.device, rotate: int = 1) -> tuple[Run, int]:
    """A replay that is long enough to be timed, and how many calls are in it: whole turns over ``rotate`` inputs."""
    with on_capture_stream(device):
        for i in range(2):
            run(i)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # a graph has memory of its own
    replay = record(run, rotate, device)
    replay(0)
    took = sample(replay, 3, 0, device)()
    turns = max(1, min(50 // rotate, math.ceil(GRAPH_MS / max(took, 1e-4))))
    if turns > 1:
        replay = record(run, turns * rotate, device)
        replay(0)
    return replay, turns * rotate


def replay_time(replay: Run, samples: int) -> float:
    """Milliseconds of one replay, the median of a few: enough to choose by."""
    device = torch.device("cuda")
    return statistics.median(sample(replay, 1, 0, device)() for _ in range(samples))
