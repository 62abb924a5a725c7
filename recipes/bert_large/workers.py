"""Several runs at a time, in threads or in worker processes that may die."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any, Generic, TypeVar

import torch

from recipes import children
from recipes.launching import RunError, threads_each

_RUNS_A_PROCESS = 100  # then a fresh one: what leaks in a library stays bounded
Key = TypeVar("Key")
Outcome = TypeVar("Outcome")


class Workers(Generic[Key, Outcome]):
    """Makes runs side by side.

    A worker process that dies (most often the system kills it, for want of memory) takes those beside it along, and nobody
    knows whose fault it was. What was not finished is made again by half as many; of one alone, it is its run's fault.

    Args:
        jobs: how many at a time.
        processes: in workers of their own; else in threads of this process, each of which starts a process for its run.
    """

    def __init__(self, jobs: int, processes: bool) -> None:
        self._jobs, self._processes = jobs, processes and jobs > 1

    def outcomes(
        self, function: Callable[..., Outcome], arguments: Mapping[Key, tuple[Any, ...]]
    ) -> Iterator[tuple[Key, Outcome | RunError]]:
        """What a function gives for each of its arguments, or the error of that run, as they come.

        Args:
            function: raises :class:`RunError` for a run that failed. Other errors end all of it.
            arguments: of each run, in the order to begin in.
        """
        left = dict(arguments)
        while left:
            yield from self._until_a_worker_dies(function, left)
            if left and self._jobs == 1:
                culprit = next(iter(left))
                del left[culprit]
                yield culprit, RunError("its process died without a word; too little memory?")
            elif left:
                self._jobs //= 2
                print(
                    f"A worker process died (too little memory?): {len(left)} runs go on, {self._jobs} at a time.",
                    flush=True,
                )

    def _until_a_worker_dies(
        self, function: Callable[..., Outcome], left: dict[Key, tuple[Any, ...]]
    ) -> Iterator[tuple[Key, Outcome | RunError]]:
        with self._executor() as pool:
            try:
                waiting = {pool.submit(function, *given): key for key, given in left.items()}
                for future in as_completed(waiting):
                    key = waiting[future]
                    try:
                        outcome: Outcome | RunError = future.result()
                    except RunError as error:
                        outcome = error
                    except BrokenExecutor:
                        continue
                    del left[key]
                    yield key, outcome
            except BrokenExecutor:
                return  # it died before all were submitted
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not begin the runs that wait
                raise

    def _executor(self) -> Executor:
        if not self._processes:
            return ThreadPoolExecutor(self._jobs)
        return ProcessPoolExecutor(
            self._jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(threads_each(self._jobs),),
            max_tasks_per_child=_RUNS_A_PROCESS,
        )


def _begin_worker(threads: int) -> None:
    children.end_with_parent()
    torch.set_num_threads(threads)
