"""One of two gloo processes that leave in the midst of something: ``python -m tests.distributed.leaving_worker FOLDER HOW``."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from slope_pl.lightning import ending

RANK = int(os.environ["LOCAL_RANK"])


def send(count):
    """Messages that nobody here waits for."""
    group = dist.new_group(backend="gloo")
    for _ in range(count):
        dist.all_reduce(torch.ones(100_000), group=group, async_op=True)


def main(folder, how):
    dist.init_process_group("gloo", rank=RANK, world_size=2)
    ending.end_groups_at_exit()
    torch.save(None, folder / f"rank{RANK}.pt")
    if how == "together":
        send(50)
    elif RANK == 0:
        ending._WAIT_S = 0.5
        send(1)
    else:
        dist.new_group(backend="gloo")  # takes both
        deadline = time.monotonic() + 60
        while not (folder / "left").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        sys.exit(0 if (folder / "left").exists() else 4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
