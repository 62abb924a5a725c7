"""Starting processes of a worker module, and what each reports."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def free_port() -> str:
    """A port of this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def report_of_two(module: str, folder: Path, timeout_s: int, *arguments: str) -> list[dict]:
    """As :func:`report_of`, two processes."""
    return report_of(2, module, folder, timeout_s, *arguments)


def report_of(processes: int, module: str, folder: Path, timeout_s: int, *arguments: str) -> list[dict]:
    """Run ``python -m module folder arguments`` with LOCAL_RANK from 0 up; what each left in ``folder/rank{rank}.pt``."""
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(processes)}
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    running = []
    for rank in range(processes):
        with logs[rank].open("w") as log:
            command = [sys.executable, "-m", module, str(folder), *arguments]
            environment = common | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            root = Path(__file__).parents[2]
            running.append(subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout_s) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0] * processes, "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
