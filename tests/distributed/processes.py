"""Starting processes of a worker module, and what both report."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def report_of_two(module: str, folder: Path, timeout_s: int) -> list[dict]:
    """Run ``python -m module folder`` with LOCAL_RANK 0 and 1; what each left in ``folder/rank{rank}.pt``."""
    return report_of(2, module, folder, timeout_s)


def report_of(world_size: int, module: str, folder: Path, timeout_s: int) -> list[dict]:
    """The same with any number of processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    processes = []
    for rank in range(world_size):
        with logs[rank].open("w") as log:
            command = [sys.executable, "-m", module, str(folder)]
            environment = common | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            root = Path(__file__).parents[2]
            processes.append(subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]
