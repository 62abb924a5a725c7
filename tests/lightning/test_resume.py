"""A run that stops and goes on is, bit for bit, the run that never stopped."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from slope_pl import CheckpointError, ConversionError, SLoPeCallback, SLoPeConfig, SLoPeLightningModule, sparse_layers
from slope_pl.lightning import StepCheckpoint
from tests.lightning.toy import CONFIG, QUIET, Net, Recorder, Tokens, Toy, assert_same, fit, make_trainer

pytestmark = QUIET

TOTAL = 20
# CONFIG re-sets every 5 steps and wakes before step 12; an epoch has 8 batches.
MOMENTS = {
    "between re-setups": 3,
    "at a re-setup": 5,
    "after a re-setup": 6,
    "at an epoch's end": 8,
    "one before the wake": 11,
    "at the wake": 12,
    "one after the wake": 13,
    "at a re-setup after the wake": 15,
}


class Hyper(SLoPeLightningModule, Toy):
    """With hyperparameters, as checkpoints of real modules have them."""

    def __init__(self, slope=None, seed=0):
        super().__init__(slope=slope, net=Net(seed))
        self.save_hyperparameters()


def saver(folder):
    return StepCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


def outcome(module, trainer):
    callback = next(c for c in trainer.callbacks if isinstance(c, SLoPeCallback))
    return {
        "model": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "callback": callback.state_dict(),
        "steps": trainer.global_step,
        "trainable": {name: p.requires_grad for name, p in module.named_parameters()},
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["accumulate1", "accumulate2"])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = {"accumulate_grad_batches": request.param, "enable_checkpointing": True, "max_steps": TOTAL}
    module, trainer = fit(folder, None, saver(folder), **settings)
    return SimpleNamespace(folder=folder, settings=settings, module=module, outcome=outcome(module, trainer))


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, uninterrupted, moment):
    step, before = MOMENTS[moment], uninterrupted
    # Other initial weights: whatever is not restored shows.
    callback, module = SLoPeCallback(CONFIG), Toy(Net(seed=9))
    trainer = make_trainer(tmp_path, callback, **(before.settings | {"enable_checkpointing": False}))
    trainer.fit(module, ckpt_path=before.folder / f"step={step}.ckpt")
    assert module.losses == before.module.losses[step * before.settings["accumulate_grad_batches"] :]
    assert_same(outcome(module, trainer), before.outcome)
    assert before.outcome["callback"] == {"resetups": 3, "last_resetup_step": 15, "woke_at_step": 12}


def test_interrupted_twice(tmp_path, uninterrupted):
    first = uninterrupted.folder / "step=4.ckpt"
    fit_settings = uninterrupted.settings | {"max_steps": 14}
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), saver(tmp_path), **fit_settings)
    trainer.fit(Toy(Net(seed=9)), ckpt_path=first)
    module = Toy(Net(seed=8))
    trainer = make_trainer(
        tmp_path, SLoPeCallback(CONFIG), **(uninterrupted.settings | {"enable_checkpointing": False})
    )
    trainer.fit(module, ckpt_path=tmp_path / "step=14.ckpt")
    assert_same(outcome(module, trainer), uninterrupted.outcome)


def test_resume_from_before_the_wake_puts_an_awake_module_back_to_sleep(tmp_path, uninterrupted):
    """The same module object trains on from an earlier file, as after a notebook's restart of a cell."""
    module, _ = fit(tmp_path, None, max_steps=16)
    assert all(layer.adapters_awake for layer in sparse_layers(module).values())
    trainer = make_trainer(
        tmp_path, SLoPeCallback(CONFIG), **(uninterrupted.settings | {"enable_checkpointing": False})
    )
    trainer.fit(module, ckpt_path=uninterrupted.folder / "step=8.ckpt")
    assert_same(outcome(module, trainer), uninterrupted.outcome)


def test_checkpoints_are_plain_enough_for_weights_only(uninterrupted):
    saved = torch.load(uninterrupted.folder / "step=13.ckpt", weights_only=True)
    assert SLoPeConfig.from_dict(saved["slope_pl"]["config"]) == CONFIG
    assert saved["slope_pl"]["layers"] == [f"net.blocks.{i}" for i in range(3)]
    operands = [name for name in saved["state_dict"] if "operand" in name or "_kept" in name]
    assert not operands, "derived operands do not belong into a file"


def test_resume_of_a_module_with_hyperparameters(tmp_path):
    """Lightning's own default of weights_only reads the file; the config in it is plain numbers."""
    settings = {"enable_checkpointing": True}
    module = Hyper(slope=CONFIG)
    trainer = make_trainer(tmp_path, saver(tmp_path), **settings)
    trainer.fit(module)
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["slope"] == CONFIG.to_dict()
    again = Hyper(slope=CONFIG, seed=9)
    other = make_trainer(tmp_path)
    other.fit(again, ckpt_path=tmp_path / "step=12.ckpt")
    assert_same(outcome(again, other), outcome(module, trainer))


def test_resume_with_more_steps_wakes_at_the_new_mark(tmp_path):
    """A fraction refers to the steps now planned."""
    config = SLoPeConfig(backward_refresh_steps=5, adapter_rank=4, adapter_start=0.8)
    fit(tmp_path, None, saver(tmp_path), config=config, enable_checkpointing=True, max_steps=20)
    callback = SLoPeCallback(config)
    make_trainer(tmp_path, callback, max_steps=40).fit(Toy(), ckpt_path=tmp_path / "step=10.ckpt")
    assert callback.woke_at_step == 32
    callback = SLoPeCallback(config)
    make_trainer(tmp_path, callback, max_steps=40).fit(Toy(), ckpt_path=tmp_path / "step=18.ckpt")
    assert callback.woke_at_step == 16, "awake stays awake"


class Drawing(Toy):
    """Draws random numbers between the restore and the start of fit, and shuffles with torch's generator."""

    def configure_optimizers(self):
        torch.rand(3)
        return super().configure_optimizers()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Tokens(), batch_size=8, shuffle=True)


def test_numbers_drawn_before_fit_starts_do_not_move_the_shuffle(tmp_path):
    """The next epoch's order comes from the generator as it was in the checkpoint, whatever has drawn since."""
    whole = Drawing()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), saver(tmp_path), enable_checkpointing=True).fit(whole)
    resumed = Drawing(Net(seed=9))
    torch.manual_seed(5)
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(resumed, ckpt_path=tmp_path / "step=8.ckpt")
    assert resumed.losses == whole.losses[8:]


# ---------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("step", [8, 14])
def test_another_rank_on_resume_is_an_error(tmp_path, uninterrupted, step):
    config = SLoPeConfig(backward_refresh_steps=5, adapter_rank=2, adapter_start_step=12)
    with pytest.raises(CheckpointError, match="made with adapter_rank=4, this run has adapter_rank=2"):
        make_trainer(tmp_path, SLoPeCallback(config)).fit(Toy(), ckpt_path=uninterrupted.folder / f"step={step}.ckpt")


def test_another_mask_kind_on_resume_is_an_error(tmp_path, uninterrupted):
    """Magnitude masks under a transposable config: the backward columns would be frozen for ever, in silence."""
    config = SLoPeConfig(mask="transposable", adapter_rank=4, adapter_start_step=12)
    with pytest.raises(CheckpointError, match="mask"):
        make_trainer(tmp_path, SLoPeCallback(config)).fit(Toy(), ckpt_path=uninterrupted.folder / "step=8.ckpt")


def test_other_calibration_on_resume_is_an_error(tmp_path, uninterrupted):
    """The masks are what they are: a number of batches that did not choose them would be a wrong record."""
    config = replace(CONFIG, mask_calibration_batches=3)
    with pytest.raises(CheckpointError, match="mask_calibration_batches=0, this run has mask_calibration_batches=3"):
        make_trainer(tmp_path, SLoPeCallback(config)).fit(Toy(), ckpt_path=uninterrupted.folder / "step=8.ckpt")


def test_changed_module_config_in_one_process_is_an_error(tmp_path):
    module, _ = fit(tmp_path, max_steps=14)
    with pytest.raises(ConversionError, match="adapter_rank"):
        fit(tmp_path, module, config=SLoPeConfig())


def test_dense_checkpoint_is_refused_by_a_sparse_run(tmp_path):
    make_trainer(tmp_path, saver(tmp_path), enable_checkpointing=True, max_steps=14).fit(Toy())
    with pytest.raises(CheckpointError, match="dense"):
        make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(Toy(), ckpt_path=tmp_path / "step=13.ckpt")


def test_sparse_checkpoint_is_refused_by_the_dense_sibling(tmp_path):
    make_trainer(tmp_path, saver(tmp_path), enable_checkpointing=True, max_steps=14).fit(Hyper(slope=CONFIG))
    with pytest.raises(CheckpointError, match="this model is dense"):
        make_trainer(tmp_path).fit(Hyper(slope=None), ckpt_path=tmp_path / "step=13.ckpt")


def test_module_made_sparse_by_the_callback_resumes(tmp_path):
    """slope=None on the module, the config on the callback: sparse all the same."""
    callbacks = (SLoPeCallback(CONFIG), saver(tmp_path))
    make_trainer(tmp_path, *callbacks, enable_checkpointing=True, max_steps=14).fit(Hyper(slope=None))
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(Hyper(slope=None), ckpt_path=tmp_path / "step=13.ckpt")


# ---------------------------------------------------------------------------------------------------- fit again


def test_second_fit_on_the_same_trainer_goes_on(tmp_path):
    """2 epochs and 1 more are 3: counters, phase and masks go on where they were."""
    config = SLoPeConfig(backward_refresh_steps=5, adapter_rank=4, adapter_start_step=12)
    recorder = Recorder()
    module, trainer = fit(tmp_path, None, recorder, config=config, max_steps=-1, max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module)
    assert trainer.global_step == 24
    assert recorder.changes("backward_indices") == [5, 10, 15, 20]
    assert recorder.changes("adapter_active") == [12]
    assert trainer.callbacks[0].resetups == 4
    assert sum(isinstance(c, SLoPeCallback) for c in trainer.callbacks) == 1


def test_callback_used_for_a_second_run_starts_anew(tmp_path):
    callback = SLoPeCallback(CONFIG)
    make_trainer(tmp_path, callback).fit(Toy())
    module = Toy()
    make_trainer(tmp_path, callback).fit(module)
    want, _ = fit(tmp_path)
    assert_same(module.state_dict(), want.state_dict())


def test_fresh_callback_on_an_awake_model_says_so_and_trains_it(tmp_path, capsys):
    module, _ = fit(tmp_path)
    callback = SLoPeCallback(CONFIG)
    make_trainer(tmp_path, callback, max_steps=4).fit(module)
    said = capsys.readouterr().out
    assert "the adapters are awake" in said
    assert "adapters of 0 layers" not in said
    assert callback.woke_at_step == 0


def test_plain_module_with_a_config_among_its_hyperparameters_resumes(tmp_path):
    """save_hyperparameters() keeps the dataclass; the file must load with weights_only=True all the same."""

    class WithConfig(Toy):
        def __init__(self, config=CONFIG):
            super().__init__()
            self.save_hyperparameters()

    make_trainer(tmp_path, SLoPeCallback(CONFIG), saver(tmp_path), enable_checkpointing=True).fit(WithConfig())
    saved = torch.load(tmp_path / "step=13.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["config"]["adapter_rank"] == CONFIG.adapter_rank
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(WithConfig(), ckpt_path=tmp_path / "step=13.ckpt")


class WithDropout(Toy):
    """Draws from the generator at every step, as dropout does: a resumed run is the same only if that goes on too."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * torch.rand(())


def test_random_state_is_part_of_the_checkpoint(tmp_path):
    torch.manual_seed(5)
    whole = WithDropout()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), saver(tmp_path), enable_checkpointing=True).fit(whole)
    torch.manual_seed(6)
    resumed = WithDropout()
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(resumed, ckpt_path=tmp_path / "step=13.ckpt")
    assert_same(resumed.state_dict(), whole.state_dict())


# ---------------------------------------------------------------------------------------------------- random numbers


class Dropping(Toy):
    """Draws in every forward; ``shuffle`` has it draw the order of its data from the same generator, as a plain loader does."""

    def __init__(self, shuffle: bool = False, seed: int = 0):
        net = Net(seed)
        net.blocks[0] = torch.nn.Sequential(net.blocks[0], torch.nn.Dropout(0.3))
        super().__init__(net)
        self.shuffle = shuffle

    def train_dataloader(self):
        if self.shuffle:
            return torch.utils.data.DataLoader(Tokens(64), batch_size=8, shuffle=True)
        return super().train_dataloader()


def dropping(folder, shuffle, validations, ckpt_path=None, seed=0):
    torch.manual_seed(seed)
    module = Dropping(shuffle, seed)
    saver = StepCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    savers = [saver] if ckpt_path is None else []
    trainer = make_trainer(
        folder, SLoPeCallback(CONFIG), *savers, enable_checkpointing=bool(savers), limit_val_batches=validations
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return module.losses


@pytest.mark.parametrize("validations", [0, 1])
@pytest.mark.parametrize("step", [7, 8, 9, 16])
def test_dropout_goes_on_within_and_at_the_end_of_an_epoch(tmp_path, step, validations):
    whole = dropping(tmp_path, False, validations)
    resumed = dropping(tmp_path, False, validations, tmp_path / f"step={step}.ckpt", seed=5)
    assert resumed == whole[step:]


def test_a_plain_loader_shuffles_on_from_the_end_of_an_epoch(tmp_path):
    whole = dropping(tmp_path, True, 0)
    assert dropping(tmp_path, True, 0, tmp_path / "step=8.ckpt", seed=5) == whole[8:]


def test_validation_leaves_no_trace_in_training(tmp_path):
    assert dropping(tmp_path / "with", True, 1) == dropping(tmp_path / "without", True, 0)


# ---------------------------------------------------------------------------------------------------- schedules over epochs


class OverEpochs(SLoPeLightningModule, Dropping):
    """Asks how many steps there are when it makes its optimizer, for which Lightning makes the training loader."""

    def configure_optimizers(self):
        total = self.trainer.estimated_stepping_batches
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)]


@pytest.mark.parametrize("slope", [CONFIG, None], ids=["sparse", "dense"])
@pytest.mark.parametrize(("step", "shuffle"), [(7, False), (8, False), (9, False), (8, True), (16, True)])
def test_data_and_dropout_go_on_under_a_schedule_over_epochs(tmp_path, slope, step, shuffle):
    """Within an epoch and at its end; a loader that shuffles by torch's generator at its end alone, without validation."""

    def losses(*callbacks, seed, ckpt_path=None):
        torch.manual_seed(seed)
        module = OverEpochs(slope=slope, shuffle=shuffle, seed=seed)
        settings = {"max_steps": -1, "max_epochs": 3, "limit_val_batches": 0 if shuffle else 1}
        make_trainer(tmp_path, *callbacks, enable_checkpointing=ckpt_path is None, **settings).fit(
            module, ckpt_path=ckpt_path
        )
        return module.losses

    whole = losses(saver(tmp_path), seed=0)
    assert losses(seed=5, ckpt_path=tmp_path / f"step={step}.ckpt") == whole[step:]


def test_other_random_numbers_on_a_dense_resume_are_said(tmp_path, capsys):
    module = OverEpochs(slope=None)
    make_trainer(tmp_path, saver(tmp_path), enable_checkpointing=True, max_steps=3).fit(module)
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert len(saved["slope_pl_rng"]) == 1
    saved["slope_pl_rng"] *= 2  # as two ranks write it
    torch.save(saved, tmp_path / "two.ckpt")
    make_trainer(tmp_path, max_steps=3).fit(OverEpochs(slope=None), ckpt_path=tmp_path / "two.ckpt")
    assert "the random state of 2 ranks, this run has 1; random numbers (dropout) differ" in capsys.readouterr().out
