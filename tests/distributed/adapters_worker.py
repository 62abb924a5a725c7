"""One of two gloo processes: the adapters' trace under DDP, FSDP2 and ZeRO."""

import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

from recipes.adapters import AdapterTrace
from slope_pl import SLoPeDDPStrategy, SLoPeModelParallelStrategy
from tests.distributed.sharded_worker import CPUZero, train

STRATEGIES = {
    "ddp": SLoPeDDPStrategy,
    "fsdp2": SLoPeModelParallelStrategy,
    "zero3": lambda: CPUZero(stage=3),
}


def main(folder: Path) -> None:
    """Train under each strategy, keep the points."""
    warnings.simplefilter("ignore")
    reports = {}
    for name, strategy in STRATEGIES.items():
        (folder / name).mkdir(exist_ok=True)
        callback = AdapterTrace()
        try:
            train(folder / name, strategy(), None, callback)
            reports[name] = callback.points
        except Exception:
            reports[name] = traceback.format_exc()
    torch.save(reports, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
