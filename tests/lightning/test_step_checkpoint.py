"""With gradient accumulation a checkpoint belongs to the end of an optimizer step, after a resume as well."""

from dataclasses import replace
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl import SLoPeCallback
from slope_pl.lightning import StepCheckpoint
from tests.lightning.toy import CONFIG, QUIET, Net, Toy, assert_same, make_trainer

pytestmark = QUIET

SPARSE = replace(CONFIG, adapter_rank=0, adapter_start_step=None)  # the runs are shorter than its wake
MIDDLE = "in the middle of an optimizer step"


def run(folder, saver, ckpt_path=None, max_steps=8, *, sparse=True, **settings):
    """Steps of two batches; every second one is saved."""
    module = Toy(Net(seed=1 if ckpt_path is None else 9))
    callbacks = [SLoPeCallback(SPARSE)] if sparse else []
    settings = {"accumulate_grad_batches": 2, "max_steps": max_steps, "enable_checkpointing": True, **settings}
    trainer = make_trainer(folder, *callbacks, saver, **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    return module


def saver(kind, folder, **settings):
    settings = settings or {"every_n_train_steps": 4}
    return kind(dirpath=folder, filename="{step}", save_top_k=-1, enable_version_counter=False, **settings)


def twice_resumed(kind, tmp_path, **settings):
    """The run that was not interrupted, and one that was after its step 4, twice, going on from the same file."""
    whole = run(tmp_path, saver(kind, tmp_path / "whole"), **settings)
    for _ in range(2):
        again = run(tmp_path, saver(kind, tmp_path / "whole"), tmp_path / "whole" / "step=4.ckpt", **settings)
    return whole, again


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_run_resumed_twice_from_one_file_is_the_one_that_was_not(tmp_path, recwarn, sparse):
    whole, again = twice_resumed(StepCheckpoint, tmp_path, sparse=sparse)
    assert again.losses == whole.losses[8:]
    assert_same(again.state_dict(), whole.state_dict())
    assert not [w for w in recwarn if MIDDLE in str(w.message)]


def test_lightnings_own_saves_in_the_middle_after_a_resume_and_is_told(tmp_path, recwarn):
    """What the class is for. If this fails, Lightning has mended it."""
    whole, again = twice_resumed(ModelCheckpoint, tmp_path)
    told = [str(w.message) for w in recwarn if MIDDLE in str(w.message)]
    assert told
    assert all("accumulate_grad_batches=2" in text and "StepCheckpoint" in text for text in told)
    assert len(again.losses) == 7, "the first batch of step 5 is taken for done"
    assert any(not torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_time_that_is_over_within_a_step_waits_for_its_end(tmp_path):
    seen = []

    class Seen(StepCheckpoint):
        def _save_topk_checkpoint(self, trainer, *arguments):
            seen.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))
            super()._save_topk_checkpoint(trainer, *arguments)

    run(tmp_path, saver(StepCheckpoint, tmp_path / "whole"), max_steps=4)
    often = saver(Seen, tmp_path / "often", train_time_interval=timedelta(0))
    run(tmp_path, often, tmp_path / "whole" / "step=4.ckpt", max_steps=6)
    assert seen == [(5, 2), (6, 4)], "steps, and batches of the second epoch"


def test_the_last_step_of_an_epoch_has_fewer_batches_and_is_saved(tmp_path):
    folder = tmp_path / "epochs"
    one = saver(StepCheckpoint, folder, every_n_train_steps=3)
    trainer = make_trainer(
        tmp_path, one, accumulate_grad_batches=3, max_epochs=1, max_steps=-1, enable_checkpointing=True
    )
    trainer.fit(Toy(Net(seed=1)))
    assert trainer.global_step == 3, "8 batches: 3, 3 and 2"
    assert [file.name for file in folder.iterdir()] == ["step=3.ckpt"]


def test_a_validation_within_a_step_that_saves_is_told(tmp_path, recwarn):
    at_validation = saver(StepCheckpoint, tmp_path / "val", every_n_epochs=1, save_on_train_epoch_end=False)
    run(tmp_path, at_validation, max_steps=4, val_check_interval=3, limit_val_batches=1)
    (told,) = {str(w.message) for w in recwarn if MIDDLE in str(w.message)}
    assert "val_check_interval a multiple of accumulate_grad_batches" in told


class StopAfterThreeBatches(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.current.ready == 3


@pytest.mark.parametrize("stop", [[StopAfterThreeBatches()], []], ids=["within a step", "at its end"])
def test_a_save_after_the_fit_is_told_where_the_fit_ended_within_a_step(tmp_path, recwarn, stop):
    trainer = make_trainer(tmp_path, SLoPeCallback(SPARSE), *stop, accumulate_grad_batches=2, max_steps=3)
    trainer.fit(Toy(Net(seed=1)))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert bool([w for w in recwarn if MIDDLE in str(w.message)]) == bool(stop)
