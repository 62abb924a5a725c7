"""How a process of several leaves: with the exit status of what it did."""

import atexit
import gc
import threading

import torch.distributed as dist

_WAIT_S = 10.0
_registered = False


def end_groups_at_exit() -> None:
    """Destroy gloo's process groups when this process exits, while the interpreter still runs. Once or often, it is one wish.

    A thread of gloo may still hold a tensor of the last message; if it lets go of it while the interpreter shuts down, it
    cannot take the GIL, and the process aborts (status 134, "terminate called without an active exception") after all its
    work was done. Lightning destroys groups of NCCL alone, DeepSpeed none.

    A group waits for its messages when it is destroyed. After an error the other ranks may be gone or wait for something
    else, so the wait here ends after 10 seconds, and the process leaves as it would have.
    """
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_end_groups)


def _end_groups() -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo"):
        return
    gc.collect()  # what an error's traceback holds of a group keeps its threads alive
    ending = threading.Thread(target=dist.destroy_process_group, daemon=True)
    ending.start()
    ending.join(_WAIT_S)
