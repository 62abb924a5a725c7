"""Signals that go to a whole process group, kept from what a training step starts."""

import logging
import signal
import sys
from collections.abc import Iterable

log = logging.getLogger(__name__)


class Shield:
    """Blocks signals in the thread that calls, for a while.

    What the thread starts meanwhile inherits the mask and keeps it: torch.compile's workers, and the compilers that they or a
    kernel cache start, never get the signal. They end with the process that started them: if it is killed, idle ones at once
    and the others within a minute or two, for torch has them look for their parent once a minute. To this process the signal
    is not lost: another thread takes it at once, or it waits for :meth:`lower`.
    """

    def __init__(self) -> None:
        self._held: set[int] = set()

    def raise_against(self, numbers: Iterable[int]) -> None:
        """Block these signals, those that somebody else has blocked left out of what :meth:`lower` lets through."""
        wanted = set(numbers)
        self._held |= wanted - {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, wanted)}

    def lower(self) -> None:
        """Let them through again; the handlers of those that came run before this returns."""
        held, self._held = self._held, set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)


def end_compile_workers() -> None:
    """End torch.compile's workers, where there are any; the next kernel to compile starts new ones (2 to 3 s).

    A pool of workers that dies of a signal is waited for without end: the process keeps a copy of the pipe's writing end, so
    it never reads that nobody is left to write (torch 2.13). One that was started with a :class:`Shield` up lives on.
    """
    module = sys.modules.get("torch._inductor.async_compile")
    if module is None:
        return
    end = getattr(module, "shutdown_compile_workers", None)
    if end is None:
        log.warning(
            "This version of torch has no shutdown_compile_workers: compile workers that were started before training die of a "
            "signal to the whole process group, and a step that compiles at that moment may not end"
        )
        return
    end()
