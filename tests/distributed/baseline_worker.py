"""One of two gloo processes: ``python -m tests.distributed.baseline_worker FOLDER``, with the rank in LOCAL_RANK."""

import os
import sys
from pathlib import Path

import torch

from slope_pl.baselines import (
    masked_layers,
)
from tests.lightning.baseline_runs import ALL, callback_of
from tests.lightning.toy import Net, Toy, make_trainer, snapshot

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Observed(Toy):
    """Keeps its state after every batch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.history = [*getattr(self, "history", []), snapshot(self)]


def worker(folder: Path) -> None:
    """One rank: other initial weights and data than the other one's."""
    results = {}
    for name, config in ALL.items():
        for strategy in ("ddp", "ddp_find_unused_parameters_true"):
            module, callback = Observed(Net(seed=RANK)), callback_of(config)
            trainer = make_trainer(folder, callback, devices=2, strategy=strategy)
            trainer.fit(module)
            streams = [layer.noise_stream for layer in masked_layers(module).values()]
            results[f"{name}-{strategy}"] = (module.history, module.losses, callback.state_dict(), streams)
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
