"""A run of which every process gets a signal while a step waits for compile workers.

`python -m tests.lightning.group_worker FOLDER sanity|step` says `compiling` when it is the moment; the pool starts there.
"""

import os
import sys
import time

import lightning.pytorch as pl
from torch._inductor.async_compile import AsyncCompile
from torch.utils.data import DataLoader

from slope_pl import SLoPeCallback
from slope_pl.data import outlive_signals
from slope_pl.lightning import StopOnSignal
from tests.lightning.toy import CONFIG, Tokens, Toy

AT = 2


class Compiling(Toy):
    """Waits in its third step for what a Triton kernel waits for on a GPU: a job of the pool."""

    def __init__(self, pool_from: str) -> None:
        super().__init__()
        self.pool_from = pool_from

    def train_dataloader(self):
        return DataLoader(Tokens(), batch_size=8, num_workers=2, worker_init_fn=outlive_signals)

    def validation_step(self, batch, batch_idx):
        if self.pool_from == "sanity" and self.trainer.sanity_checking:
            AsyncCompile.process_pool().submit(os.getpid).result()

    def training_step(self, batch, batch_idx):
        if len(self.losses) == AT:
            pool = AsyncCompile.process_pool()
            pool.submit(os.getpid).result()  # the workers are there
            jobs = [pool.submit(time.sleep, 2) for _ in range(3)]
            print("compiling", flush=True)
            for job in jobs:
                job.result()
        return super().training_step(batch, batch_idx)


if __name__ == "__main__":
    folder, start = sys.argv[1:]
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        num_sanity_val_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SLoPeCallback(CONFIG), StopOnSignal(dirpath=folder)],
    )
    trainer.fit(Compiling(start))
