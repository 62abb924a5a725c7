"""A loss or gradient that is not finite is found, named and kept out of checkpoints, or its step is left out."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from slope_pl import ConfigError, NonFiniteError, SLoPeCallback
from slope_pl.lightning import NonFiniteLoss, last_good_checkpoint, nonfinite
from slope_pl.lightning.strategies import SLoPeDeepSpeedStrategy
from tests.lightning.toy import CONFIG, QUIET, Recorder, Tokens, Toy, assert_same, make_trainer

pytestmark = QUIET


class Numbered(Tokens):
    def __getitem__(self, i):
        return {**super().__getitem__(i), "row_index": torch.tensor(i)}


class Diverging(Toy):
    """Micro-batch ``at`` (counted over the run) has a bad loss, or a finite one with a bad gradient."""

    def __init__(self, at, bad=float("nan"), gradient=False, often=1, every=1):
        super().__init__()
        self.at, self.bad, self.gradient, self.seen = range(at, at + often * every, every), bad, gradient, 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        hit = self.seen in self.at
        self.seen += 1
        if hit and self.gradient:
            loss.register_hook(lambda gradient: gradient * self.bad)
            return loss
        return loss * self.bad if hit else loss

    def train_dataloader(self):
        loader = super().train_dataloader()
        return type(loader)(Numbered(64), batch_size=self.batch_size, sampler=loader.sampler)


def run(tmp_path, module, *callbacks, policy="stop", patience=None, **settings):
    callback = NonFiniteLoss(policy, patience)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), callback, recorder, *callbacks, **settings)
    trainer.fit(module)
    return callback, recorder


def test_a_healthy_run_is_left_alone(tmp_path):
    plain, watched = Toy(), Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(plain)
    callback, _ = run(tmp_path, watched, policy="skip")
    assert_same(watched.state_dict(), plain.state_dict())
    assert callback.skipped == 0


@pytest.mark.parametrize("asked", [1, 2, 3])
@pytest.mark.parametrize("bad", [False, True])
def test_a_flag_may_come_at_any_moment(tmp_path, monkeypatch, bad, asked):
    """Each one comes after it was asked for so many times: a good step is none the worse, a bad one is found."""
    times = {}

    def is_known(step):
        times[step.step] = times.get(step.step, 0) + 1
        return times[step.step] > asked

    monkeypatch.setattr(nonfinite._Step, "is_known", is_known)
    module = Diverging(5) if bad else Toy()
    if bad:
        with pytest.raises(NonFiniteError, match="optimizer step 5 "):
            run(tmp_path, module, max_steps=20)
        assert module.seen == 6 + asked
    else:
        _, recorder = run(tmp_path, module, max_steps=20)
        assert len(recorder.at) == 20


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_bad_loss_stops_and_is_named(tmp_path, value):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(NonFiniteError) as stop:
        run(tmp_path, Diverging(13, float(value)), saver, enable_checkpointing=True)
    said = str(stop.value)
    # 8 batches an epoch: step 13 is the second epoch's sixth batch.
    assert f"optimizer step 13 (epoch 1) is not finite. rank 0: loss {value} in batch 5 (row_index " in said
    assert len(said.split("row_index ")[1].split(")")[0].split(",")) == 8
    newest = last_good_checkpoint(tmp_path / "saved")
    assert newest.name == "step=13.ckpt", "the state after 13 good steps; nothing of the bad one"
    assert all(torch.isfinite(t).all() for t in torch.load(newest, weights_only=True)["state_dict"].values())


def test_it_stops_after_the_step_and_not_at_a_save(tmp_path):
    module = Diverging(5)
    with pytest.raises(NonFiniteError, match="optimizer step 5 "):
        run(tmp_path, module, max_steps=20)
    assert module.seen == 6, "one process has nobody to wait for"


def test_a_bad_gradient_with_a_finite_loss_stops(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(NonFiniteError, match=r"step 3 .*a gradient is nan in batches 3 to 3, whose values are \d"):
        run(tmp_path, Diverging(3, gradient=True), saver, enable_checkpointing=True)
    assert last_good_checkpoint(tmp_path / "saved").name == "step=3.ckpt"


def test_a_bad_step_is_seen_by_a_save_before_its_flag_is_asked_for(tmp_path):
    """On a device the flag comes late: here, never by itself."""

    class Late(NonFiniteLoss):
        def on_train_batch_end(self, trainer, *args):
            if self._now is not None and trainer.global_step != self._now.step:
                self._steps.append(self._now)
                self._now = None

    saver = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=4)
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), Late(), saver, enable_checkpointing=True)
    with pytest.raises(NonFiniteError, match="optimizer step 5 "):
        trainer.fit(Diverging(5))
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step=4.ckpt"]
    with pytest.raises(NonFiniteError, match="optimizer step 18 "):
        make_trainer(tmp_path, SLoPeCallback(CONFIG), Late()).fit(Diverging(18))


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_is_left_out(tmp_path, caplog, gradient, settings):
    with caplog.at_level(logging.WARNING):
        callback, seen = run(tmp_path, Diverging(7, gradient=gradient, often=2), policy="skip", **settings)
    assert callback.skipped == 2
    assert "step 7: the loss or a gradient is not finite; the step is left out" in caplog.text
    assert_same(seen.at[8]["net.head.weight"], seen.at[7]["net.head.weight"])
    assert_same(seen.at[9], seen.at[7])
    assert not torch.equal(seen.at[10]["net.head.weight"], seen.at[9]["net.head.weight"])
    assert torch.isfinite(seen.at[19]["net.head.weight"]).all()


def test_one_bad_micro_batch_leaves_out_its_whole_step(tmp_path):
    callback, seen = run(tmp_path, Diverging(9), policy="skip", accumulate_grad_batches=4)
    assert callback.skipped == 1
    assert_same(seen.at[3], seen.at[2])  # micro-batches 8 to 11
    assert not torch.equal(seen.at[4]["net.head.weight"], seen.at[3]["net.head.weight"])
    with pytest.raises(NonFiniteError, match=r"step 2 \(epoch 1\) .*loss nan in batch 1 "):
        run(tmp_path, Diverging(9), accumulate_grad_batches=4)


def test_patience_ends(tmp_path):
    callback, _ = run(tmp_path, Diverging(4, often=3), policy="skip", patience=3)
    assert callback.skipped == 3
    callback, _ = run(tmp_path, Diverging(4, often=4, every=2), policy="skip", patience=1)
    assert callback.skipped == 4, "not in a row"
    with pytest.raises(NonFiniteError, match=r"step 7 .* 3 steps in a row were left out before this one"):
        run(tmp_path, Diverging(4, often=4), policy="skip", patience=3)


def test_a_scaler_deals_with_its_own_overflow(tmp_path):
    """An infinite gradient of a scaled loss is how a scaler finds its scale; a nan loss is none of its affair."""

    def scaler():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))

    _, seen = run(tmp_path, Diverging(5, float("inf"), gradient=True), plugins=[scaler()])
    assert_same(seen.at[6]["net.head.weight"], seen.at[5]["net.head.weight"])
    with pytest.raises(NonFiniteError, match=r"step 5 .*loss nan in batch 5"):
        run(tmp_path, Diverging(5), plugins=[scaler()])
    callback, seen = run(tmp_path, Diverging(5), policy="skip", plugins=[scaler()])
    assert callback.skipped == 1
    assert_same(seen.at[6]["net.head.weight"], seen.at[5]["net.head.weight"])


def test_the_count_survives_a_resume(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=10)
    run(tmp_path, Diverging(2, often=3), saver, policy="skip", enable_checkpointing=True)
    callback = NonFiniteLoss("skip")
    module = Diverging(0)
    make_trainer(tmp_path, SLoPeCallback(CONFIG), callback).fit(module, ckpt_path=tmp_path / "step=10.ckpt")
    assert callback.skipped == 4
    assert len(module.losses) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ignore",), "policy='ignore' is unknown; choose one of stop, skip"),
        (("stop", 3), "patience=3 has no effect with policy='stop'"),
        (("skip", -1), "patience=-1: an integer of at least 0"),
        (("skip", True), "patience=True: an integer"),
    ],
)
def test_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        NonFiniteLoss(*arguments)


def test_deepspeed_cannot_leave_out(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", SLoPeDeepSpeedStrategy())
    with pytest.raises(ConfigError, match="policy='skip' under DeepSpeed"):
        NonFiniteLoss("skip").setup(trainer, Toy(), "fit")
