"""Filling Inductor's cache before anything is timed: every compiled function once, several processes at a time."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import torch

from benchmarks.options import Options
from benchmarks.shapes import TARGET_BLOCKS, BlockShape, blocks
from benchmarks.suites import COMPILED
from benchmarks.training import footprint

# These compile the same functions: the first of them that is asked for stands for all.
TRAINING = tuple(suite for suite in COMPILED if suite != "prefill")
FAMILIES = (("dense*",), ("slope*",), ("torch*",))


@dataclass(frozen=True)
class Task:
    """One process: a family of variants of one model. ``nbytes`` is what it may take of the GPU's memory."""

    shape: BlockShape
    variants: tuple[str, ...]
    suites: tuple[str, ...]
    nbytes: int


class Budget:
    """GPU memory that processes share: whoever would not fit waits."""

    def __init__(self, nbytes: int) -> None:
        self._left, self._changed, self._whole = nbytes, threading.Condition(), nbytes

    def take(self, nbytes: int) -> int:
        """Wait for memory; more than there is counts as all of it."""
        nbytes = min(nbytes, self._whole)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= nbytes)
            self._left -= nbytes
        return nbytes

    def give(self, nbytes: int) -> None:
        """Return what was taken."""
        with self._changed:
            self._left += nbytes
            self._changed.notify_all()


def tasks(suites: Sequence[str], options: Options) -> list[Task]:
    """What to run, the largest first; models with the same block only once."""
    training = [suite for suite in suites if suite in TRAINING and suite != "peers"][:1]
    inference = [suite for suite in suites if suite == "prefill"]
    # In reverse, so that of equal blocks the first one stays.
    shapes = {replace(s, name=""): s for s in reversed(blocks(options.quick)) if options.wants_case(s.name)}
    made = []
    for shape in shapes.values():
        peers = ["peers"] if "peers" in suites and (options.quick or shape.name in TARGET_BLOCKS) else []
        size = max(footprint(shape, options.blocks, precision) for precision in options.precisions)
        for family in FAMILIES:
            own = inference + (peers if family == ("torch*",) else training or peers)
            if own:
                made.append(Task(shape, family, tuple(own), size))
    return sorted(made, key=lambda task: -task.nbytes)


def fill(suites: Sequence[str], options: Options, jobs: int) -> int:
    """Compile everything; returns how many processes failed, each of which has said why."""
    todo = tasks(suites, options)
    memory = torch.cuda.mem_get_info()[1] if options.device == "cuda" else 1 << 62
    budget, began, failed = Budget(int(0.85 * memory)), time.perf_counter(), 0
    print(f"Compiling: {len(todo)} processes, {jobs} at a time.", flush=True)
    # Algorithms searched while eight processes share the GPU would be the wrong ones: they are forgotten with the folder.
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_run, task, options, budget, scratch): task for task in todo}
        for count, done in enumerate(as_completed(waiting), 1):
            task, (status, output) = waiting[done], done.result()
            failed += status != 0
            took = time.perf_counter() - began
            last = output.strip().splitlines()[-1:] or [""]
            print(
                f"  {count}/{len(todo)}, {took:.0f} s: {task.shape.name} {' '.join(task.variants)}: {last[0]}",
                flush=True,
            )
    return failed


def _run(task: Task, options: Options, budget: Budget, scratch: str) -> tuple[int, str]:
    command = [
        *(sys.executable, "-m", "benchmarks.run", *task.suites, "--compile-only", "--jobs", "1"),
        *("--only", task.shape.name, "--variants", *task.variants, "--precision", *options.precisions),
        *("--device", options.device, "--blocks", str(options.blocks), "--backend", options.backend),
        *("--compiler", options.compiler, "--seed", str(options.seed)),
        *(["--quick"] if options.quick else []),
    ]
    # SLOPE_SEARCH=0 asks the sparse backend for the library's default algorithm: nothing is timed here.
    own = {
        "SLOPE_CACHE_DIR": scratch,
        "SLOPE_SEARCH": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "OMP_NUM_THREADS": "2",
    }
    taken = budget.take(task.nbytes)
    try:
        done = subprocess.run(
            command, env=os.environ | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    finally:
        budget.give(taken)
    return done.returncode, done.stdout
