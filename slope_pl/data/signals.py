"""Worker processes of a data loader that live through the signals by which a cluster ends a job."""

import os
import signal
import threading

_HELD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def outlive_signals(worker_id: int) -> None:
    """A ``worker_init_fn``: SIGTERM ends the worker only if it comes from the process it works for, SIGUSR1 and SIGUSR2 never.

    SLURM, ``timeout`` and a shell send them to every process of a job. A worker that dies of one takes the run along, before
    ``StopOnSignal`` has saved. The worker still ends with its parent, which torch has it look for every few seconds.

    On a system without ``sigwaitinfo`` (macOS) it does nothing.

    Args:
        worker_id: of torch; not used.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)  # threads of the worker inherit it
        threading.Thread(target=_wait, args=(os.getppid(),), name="signals", daemon=True).start()


def _wait(parent: int) -> None:
    while True:
        came = signal.sigwaitinfo(_HELD)
        if came.si_signo == signal.SIGTERM and came.si_pid == parent:
            os._exit(0)  # how torch ends a worker that does not answer
