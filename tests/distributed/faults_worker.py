"""One of two gloo processes: ``python -m tests.distributed.faults_worker FOLDER``, with the rank in LOCAL_RANK.

What goes wrong goes wrong on rank 1 alone. What this rank has seen of it goes to ``FOLDER/rank{rank}.pt``.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl import NonFiniteError, SLoPeCallback
from slope_pl.lightning import NonFiniteLoss, StopOnSignal
from tests.lightning.toy import CONFIG, Net, Toy, make_trainer, snapshot

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Faulty(Toy):
    """At micro-batch ``at`` something happens, on rank 1 alone."""

    def __init__(self, at=None, what=None):
        super().__init__(Net(seed=RANK))
        self.at, self.what = at, what

    def training_step(self, batch, batch_idx):
        hit = RANK == 1 and len(self.losses) == self.at
        loss = super().training_step(batch, batch_idx)
        if hit and isinstance(self.what, int):
            os.kill(os.getpid(), self.what)
        return loss * self.what if hit and isinstance(self.what, float) else loss


def train(folder, module, *callbacks, ckpt_path=None, **settings):
    """The model and losses at the end, and the error that ended it."""
    trainer = make_trainer(folder, SLoPeCallback(CONFIG), *callbacks, devices=2, strategy="ddp", **settings)
    error = None
    try:
        trainer.fit(module, ckpt_path=ckpt_path)
    except (NonFiniteError, SystemExit) as raised:
        error = raised.code if isinstance(raised, SystemExit) else str(raised)
    return {"model": snapshot(module), "losses": module.losses, "error": error, "steps": trainer.global_step}


def stop(folder):
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    found = train(folder, Faulty(9, float("nan")), NonFiniteLoss(), saver, enable_checkpointing=True)
    return found | {"files": sorted(path.name for path in folder.glob("*.ckpt"))}


def skip(folder):
    callback = NonFiniteLoss("skip")
    return train(folder, Faulty(9, float("inf")), callback, accumulate_grad_batches=2) | {"skipped": callback.skipped}


def signalled(folder):
    """SIGTERM reaches one rank; both stop, and go on together."""
    first = train(folder, Faulty(9, int(signal.SIGTERM)), StopOnSignal(dirpath=str(folder)))
    (file,) = folder.glob("*.ckpt")
    return {"first": first, "file": file.name, "second": train(folder, Faulty(), ckpt_path=file)}


SCENARIOS = {
    "whole": lambda folder: train(folder, Faulty()),
    "watched": lambda folder: train(folder, Faulty(), NonFiniteLoss(), StopOnSignal()),
    "stop": stop,
    "skip": skip,
    "signalled": signalled,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    where = Path(sys.argv[1])
    torch.save({name: scenario(where / name) for name, scenario in SCENARIOS.items()}, where / f"rank{RANK}.pt")
