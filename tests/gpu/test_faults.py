"""A bad step is found on the device without waiting for it, and named all the same."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl import NonFiniteError, SLoPeCallback
from slope_pl.lightning import NonFiniteLoss, last_good_checkpoint
from tests.lightning.test_nonfinite import Diverging
from tests.lightning.toy import CONFIG, QUIET, make_trainer

pytestmark = [pytest.mark.gpu, *QUIET]


class Unwatched(Diverging):
    """Does not look at its losses, and keeps the device busy for much longer than the host."""

    def training_step(self, batch, batch_idx):
        hit = self.seen in self.at
        self.seen += 1
        torch.cuda._sleep(40_000_000)  # cycles: some 20 ms
        loss = self.loss(batch)
        return loss * self.bad if hit else loss


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_flag_comes_late_and_names_the_first_bad_step(tmp_path, clip):
    module = Unwatched(5, often=100)
    trainer = make_trainer(
        tmp_path, SLoPeCallback(CONFIG), NonFiniteLoss(), accelerator="gpu", max_steps=40, gradient_clip_val=clip
    )
    with pytest.raises(NonFiniteError, match=r"optimizer step 5 \(epoch 0\) .*loss nan in batch 5 \(row_index "):
        trainer.fit(module)
    assert module.seen > 6, "the host did not wait for the device"


def test_nothing_bad_is_saved(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = make_trainer(
        tmp_path, SLoPeCallback(CONFIG), NonFiniteLoss(), saver, accelerator="gpu", enable_checkpointing=True
    )
    with pytest.raises(NonFiniteError, match="optimizer step 5 "):
        trainer.fit(Unwatched(5, often=100))
    newest = last_good_checkpoint(tmp_path / "saved")
    assert newest.name == "step=5.ckpt"
    assert all(torch.isfinite(t).all() for t in torch.load(newest, weights_only=True)["state_dict"].values())


def test_a_step_is_left_out(tmp_path):
    module = Unwatched(5, often=2)
    callback = NonFiniteLoss("skip")
    make_trainer(tmp_path, SLoPeCallback(CONFIG), callback, accelerator="gpu", max_steps=20).fit(module)
    assert callback.skipped == 2
    assert all(torch.isfinite(p).all() for p in module.parameters())
