"""A callback that sends a signal to its own process, once, at a given step of a given rank."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl


class Strike(pl.Callback):
    """Args: step before which it strikes; signal's name; rank; a file that remembers that it did."""

    def __init__(self, step: int, mark: str, name: str = "SIGKILL", rank: int = 0) -> None:
        self.step, self.mark, self.name, self.rank = step, Path(mark), name, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == self.rank and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.Signals[self.name])
