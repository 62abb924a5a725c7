"""Processes that a runner starts: they end with it, and nothing is begun after a signal to it.

SIGTERM to a runner alone (a plain ``kill``, a scheduler) would leave its trainings behind, on the GPU that the next one wants.
"""

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_lock = threading.RLock()  # the handler runs in the main thread, which may hold it
_live: set[subprocess.Popen[Any]] = set()
_stopped = False
_trains_here = 0


def refuse_if_stopped() -> None:
    """Raise SystemExit if this process was signalled before."""
    if _stopped:
        raise SystemExit(128 + signal.SIGTERM)


def run(command: Sequence[str], **options: Any) -> int:
    """Run a process to its end, and return its status; ``subprocess.run`` would kill it if this process is signalled.

    Args:
        command: program and arguments.
        **options: of ``subprocess.Popen``.

    Raises:
        SystemExit: if this process was signalled before.
    """
    with _lock:
        refuse_if_stopped()
        process = subprocess.Popen(command, **options)
        _live.add(process)
    try:
        return process.wait()
    except BaseException:
        process.wait()  # it got the signal as well, and may have a checkpoint to save
        raise
    finally:
        with _lock:
            _live.discard(process)


@contextmanager
def training_here() -> Iterator[None]:
    """While a run is made in this process, in a thread that no signal reaches: a signal then ends the process at once.

    Raises:
        SystemExit: if this process was signalled before.
    """
    global _trains_here
    with _lock:
        refuse_if_stopped()
        _trains_here += 1
    try:
        yield
    finally:
        with _lock:
            _trains_here -= 1


def answering_signals(main: Callable[[], Any]) -> Any:
    """Run a runner's main function; SIGTERM ends what it has started, and then it, with status 143."""
    signal.signal(signal.SIGTERM, _stop)
    return main()


def _stop(number: int, frame: Any) -> None:
    global _stopped
    with _lock:
        _stopped = True
        for process in _live:
            process.terminate()
        for worker in multiprocessing.active_children():
            worker.terminate()
    if _trains_here:
        os._exit(128 + number)
    raise SystemExit(128 + number)


def end_with_parent() -> None:
    """In a worker process: end when the process that started it does, however that came."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent is for a process that multiprocessing has started, and this is none")

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()
