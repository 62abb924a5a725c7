"""Checkpoints between optimizer steps: with gradient accumulation, Lightning's own may come in the middle of one."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class StepCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` whose ``every_n_train_steps`` and ``train_time_interval`` save at the end of an optimizer step alone.

    ``accumulate_grad_batches`` makes a step of several batches, and a checkpoint holds no gradients: a run that goes on from
    one of the middle makes a step of the batches that are left, with a part of its gradient. Lightning saves there once a run
    that was resumed at a multiple of ``every_n_train_steps`` has made its first batch, over the checkpoint that it came from.
    What is due in the middle of a step is saved at its end.

    Without accumulation, and with manual optimization, it is ``ModelCheckpoint``. Arguments are its.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it is time and a step has ended."""
        if not in_the_middle(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def in_the_middle(trainer: pl.Trainer) -> bool:
    """Whether the batches so far end within an optimizer step; False where nothing was trained."""
    return trainer.accumulate_grad_batches > 1 and trainer.fit_loop._should_accumulate()


def say_if_in_the_middle(trainer: pl.Trainer) -> None:
    """Warn that a checkpoint which is being saved is none to go on from exactly."""
    if in_the_middle(trainer):
        rank_zero_warn(
            "this checkpoint is saved in the middle of an optimizer step (accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}): the gradients so far are not in it, and a run that goes on from it makes a "
            "step of the batches that are left. Save at the ends of steps: slope_pl.lightning.StepCheckpoint in place of "
            "ModelCheckpoint, val_check_interval a multiple of accumulate_grad_batches"
        )
