"""Several processes that pack documents; what comes back is in order, whatever their number.

They are fresh processes, not forks: threads of torch, of the tokeniser or of a reader of the hub may run here already, and a
fork would copy their locks. They do not import the program's main module either, so that a script without
``if __name__ == "__main__"`` can use them, and of this package only what packs (see `slope_pl.data.text_packing`): one is
there in a fraction of a second.
"""

import json
import os
import pickle
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO

from slope_pl.data.text_packing import Batch, Packed, Packer

_MOST = 16  # with so many, reading and writing, which one process does, takes as long
_ALONE_CHARACTERS = 1 << 23  # packed here first: for less, processes are not worth starting

# Empty packages in place of ours, whose __init__ would import torch and Lightning.
_START = """
import json, sys, types
sys.path[:] = json.loads(sys.argv[1])
for name, folder in json.loads(sys.argv[2]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from slope_pl.data.text_workers import serve
serve()
"""


class WorkerError(RuntimeError):
    """A process that packs documents failed or was ended from outside."""


def usable_processes() -> int:
    """How many processes pack documents by default: one for each core that this process may use, 16 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST)


def pack_in_order(
    packer: Packer, batches: Iterable[Batch], val_fraction: float, processes: int
) -> Generator[tuple[Batch, Packed], None, None]:
    """Pack batches of documents, here or in other processes.

    What is read ahead is bounded by the number of processes. If reading fails, what was read before is packed first.

    Args:
        packer: What packs; copies of it go to the other processes.
        batches: The documents.
        val_fraction: Expected fraction of the documents to hold out.
        processes: How many processes; 1 packs everything here, and so does a short text.

    Yields:
        Each batch, and its documents packed.

    Raises:
        WorkerError: A process was ended from outside. Errors of packing itself are as if it were done here.
    """
    batches, characters = iter(batches), 0
    for batch in batches:
        yield batch, packer.pack_documents(batch.texts, val_fraction)
        characters += sum(map(len, batch.texts))
        if processes > 1 and characters >= _ALONE_CHARACTERS:
            break
    else:
        return
    with _Pool(packer, val_fraction, processes) as pool:
        yield from pool.map(batches)


class _Pool:
    """Processes, and a thread for each that waits for it."""

    def __init__(self, packer: Packer, val_fraction: float, processes: int) -> None:
        self.size = processes
        self.idle: SimpleQueue[_Process] = SimpleQueue()
        self.threads = ThreadPoolExecutor(processes, "packing")
        work = pickle.dumps((packer, val_fraction))  # with the pieces it knows already
        self.processes: list[_Process] = []
        try:
            for _ in range(processes):
                self.processes.append(_Process(work))
                self.idle.put(self.processes[-1])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for process in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.close()

    def map(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Packed]]:
        """Pack batches in order."""
        waiting: deque[tuple[Batch, Future[Packed]]] = deque()
        failed: Exception | None = None
        more = True
        while more or waiting:
            while more and len(waiting) < 2 * self.size:
                try:
                    batch = next(batches)
                    waiting.append((batch, self.threads.submit(self._pack, batch.texts)))
                except StopIteration:
                    more = False
                except Exception as error:
                    failed, more = error, False
            if waiting:
                batch, packed = waiting.popleft()
                yield batch, packed.result()
        if failed:
            raise failed

    def _pack(self, texts: list[str]) -> Packed:
        process = self.idle.get()
        try:
            return process.ask(texts)
        finally:
            self.idle.put(process)


class _Process:
    """One process; hands over batches and waits for the answers."""

    def __init__(self, work: bytes) -> None:
        # One thread each: the processes are as many as the cores.
        alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.work: bytes | None = work
        try:
            self.process = subprocess.Popen(
                self.arguments(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | alone,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
        except OSError as error:
            raise WorkerError(
                f"cannot start a process that tokenises ({error}); prepare_processes=1 does without any. Run again to go "
                "on: what is prepared is kept."
            ) from error

    @staticmethod
    def arguments() -> list[str]:
        """The command line."""
        here = Path(__file__).parent
        folders = (("slope_pl", str(here.parent)), ("slope_pl.data", str(here)))
        return [sys.executable, "-P", "-c", _START, json.dumps(sys.path), json.dumps(folders)]

    def ask(self, texts: list[str]) -> Packed:
        """Have a batch packed.

        Raises:
            WorkerError: The process is gone.
        """
        to, back = self.process.stdin, self.process.stdout
        assert to is not None
        assert back is not None
        try:
            if self.work is not None:
                to.write(self.work)
                self.work = None
            _send(to, texts)
            answer = pickle.load(back)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            status = self._status()
            how = f"by signal {-status}; memory may have run out" if status < 0 else f"with status {status}"
            raise WorkerError(
                f"a process that tokenises ended {how}. Run again to go on: what is prepared is kept. Fewer processes "
                "(prepare_processes) take less memory; what it said itself is above."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _status(self) -> int:
        """Exit status of a process whose pipes are closed: it is about to end."""
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def kill(self) -> None:
        """End the process; whoever waits for an answer gets an error."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Close the pipes."""
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was not sent is of no use any more
                pipe.close()  # type: ignore[union-attr]


def serve() -> None:
    """Pack what comes in on stdin until it is closed: what the processes run."""
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints shall not get into the answers
    packer, val_fraction = pickle.load(incoming)
    while True:
        try:
            texts = pickle.load(incoming)
        except (EOFError, pickle.UnpicklingError):  # the other end is gone
            return
        answer: Packed | Exception
        try:
            answer = packer.pack_documents(texts, val_fraction)
        except BaseException as error:  # the Rust side's panics are no Exception
            answer = _that_travels(error)
            answer.add_note(f"In a process that tokenises:\n{traceback.format_exc()}")
        try:
            _send(outgoing, answer)
        except BrokenPipeError:
            os._exit(1)  # without a word: flushing what is left would fail again


def _that_travels(error: BaseException) -> Exception:
    """The error itself, or one with its message where it cannot be sent to another process."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error's own methods raise
        copy = None
    return copy if isinstance(copy, Exception) else WorkerError(f"{type(error).__name__}: {error}")


def _send(stream: IO[bytes], what: Packed | Exception | list[str]) -> None:
    stream.write(pickle.dumps(what, pickle.HIGHEST_PROTOCOL))
    stream.flush()
