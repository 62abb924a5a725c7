"""A baseline run that stops and goes on is, bit for bit, the run that never stopped; the random pruning with it."""

import zlib
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from slope_pl import CheckpointError, SLoPeCallback, SLoPeConfig
from slope_pl.baselines import (
    FSTConfig,
    SRSTEConfig,
    masked_layers,
)
from slope_pl.baselines.checks import check_checkpoint
from tests.lightning.baseline_runs import ALL, BLOCKS, FST, SRSTE, callback_of, fit, saver
from tests.lightning.toy import QUIET, Net, Toy, assert_same, make_trainer

pytestmark = QUIET


TOTAL = 20
MOMENTS = (1, 3, 5, 6, 8, 10, 11, 12, 13, 14, 15, 19)


def outcome(run):
    return {
        "model": run.module.state_dict(),
        "optimizer": run.trainer.optimizers[0].state_dict(),
        "callback": run.callback.state_dict(),
        "trainable": {name: p.requires_grad for name, p in run.module.named_parameters()},
        "masked": [layer.masked for layer in run.layers.values()],
    }


@pytest.fixture(scope="module", params=[(m, a) for m in ALL for a in (1, 2)], ids=lambda p: f"{p[0]}-accumulate{p[1]}")
def uninterrupted(request, tmp_path_factory):
    method, accumulate = request.param
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5, "max_steps": TOTAL}
    config = ALL[method]
    run = fit(folder, config, Toy(lr=0.03), saver(folder), enable_checkpointing=True, **settings)
    return SimpleNamespace(folder=folder, settings=settings, config=config, run=run, outcome=outcome(run))


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, uninterrupted, moment):
    before = uninterrupted
    path = before.folder / f"step={moment}.ckpt"
    run = fit(tmp_path, before.config, Toy(Net(seed=9), lr=0.03), ckpt_path=path, **before.settings)
    assert run.module.losses == before.run.module.losses[moment * before.settings["accumulate_grad_batches"] :]
    assert_same(outcome(run), before.outcome)


def test_resumed_run_works_on_a_module_that_is_past_the_mark(tmp_path, uninterrupted):
    before, module = uninterrupted, Toy(Net(seed=9), lr=0.03)
    fit(tmp_path, before.config, module, **before.settings)
    module.losses.clear()
    run = fit(tmp_path, before.config, module, ckpt_path=before.folder / "step=8.ckpt", **before.settings)
    assert_same(outcome(run), before.outcome)


class WithDropout(Toy):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * torch.rand(())


@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_random_state_is_part_of_the_checkpoint(tmp_path, config):
    torch.manual_seed(5)
    whole = fit(tmp_path, config, WithDropout(), saver(tmp_path), enable_checkpointing=True)
    torch.manual_seed(6)
    resumed = fit(tmp_path, config, WithDropout(Net(seed=9)), ckpt_path=tmp_path / "step=11.ckpt")
    assert_same(outcome(resumed), outcome(whole))


def test_checkpoint_loads_with_weights_only(uninterrupted):
    saved = torch.load(uninterrupted.folder / "step=13.ckpt", weights_only=True)
    mark = saved["slope_pl_baseline"]
    assert type(uninterrupted.config).coerce(mark["config"]) == uninterrupted.config
    assert mark["layers"] == [f"net.blocks.{i}" for i in range(3)]
    assert not [name for name in saved["state_dict"] if "noise" in name]


class WithConfig(Toy):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_configs_among_the_hyperparameters_are_plain_in_the_file(tmp_path, config):
    fit(tmp_path, config, WithConfig(config), saver(tmp_path), enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=13.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["config"] == config.to_dict()


def test_other_methods_checkpoints_are_refused(tmp_path):
    fit(tmp_path, FST, None, saver(tmp_path / "fst"), enable_checkpointing=True)
    make_trainer(tmp_path, saver(tmp_path / "dense"), enable_checkpointing=True).fit(Toy())
    slope = SLoPeCallback(SLoPeConfig())
    make_trainer(tmp_path, slope, saver(tmp_path / "slope"), enable_checkpointing=True).fit(Toy())
    plain = SRSTEConfig(backward_pruning="none")
    with pytest.raises(CheckpointError, match="of the method 'fst', this run is 'srste'"):
        fit(tmp_path, plain, ckpt_path=tmp_path / "fst" / "step=13.ckpt")
    with pytest.raises(CheckpointError, match="of a dense or SLoPe run, this run is 'srste'"):
        fit(tmp_path, plain, ckpt_path=tmp_path / "dense" / "step=13.ckpt")
    with pytest.raises(CheckpointError, match="SLoPe's"):
        fit(tmp_path, plain, ckpt_path=tmp_path / "slope" / "step=13.ckpt")


def test_changed_settings(tmp_path, capsys):
    fit(tmp_path, FST, None, saver(tmp_path), enable_checkpointing=True)
    path = tmp_path / "step=13.ckpt"
    changed = FSTConfig(targets=BLOCKS, decay=0.02, mask_refresh_steps=5, dense_finish_step=17)
    assert fit(tmp_path, changed, ckpt_path=path).callback.switched_at_step == 17
    said = capsys.readouterr().out
    assert "FST: decay=0.02 from here on; the checkpoint was made with 0.01." in said
    assert "dense_finish_step=17 from here on" in said
    with pytest.raises(CheckpointError, match="made with seed=0, this run has seed=1"):
        fit(tmp_path, FSTConfig(targets=BLOCKS, seed=1, dense_finish_step=14), ckpt_path=path)


def test_newer_format_is_refused():
    mark = {"method": "fst", "format": 2, "version": "9.9", "config": {}}
    with pytest.raises(CheckpointError, match=r"format 2 \(slope_pl 9\.9\)"):
        check_checkpoint(mark, "fst", FST, 1)


@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_callback_used_for_a_second_run_starts_anew(tmp_path, config):
    callback, modules = callback_of(config), (Toy(), Toy())
    for module in modules:
        make_trainer(tmp_path, callback).fit(module)
    assert modules[0].losses == modules[1].losses
    assert_same(modules[0].state_dict(), modules[1].state_dict())


def test_second_fit_on_the_same_trainer_goes_on(tmp_path):
    run = fit(tmp_path, FST, max_steps=-1, max_epochs=2)
    run.trainer.fit_loop.max_epochs = 3
    run.trainer.fit(run.module)
    assert run.trainer.global_step == 24
    assert run.callback.switched_at_step == 14
    assert run.callback.micro_batches == 24


def test_fresh_callback_on_a_model_past_the_mark(tmp_path, capsys):
    module = fit(tmp_path, FST).module
    run = fit(tmp_path, FST, module, max_steps=16)
    assert run.callback.switched_at_step == 0
    assert "the masks are dropped" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- random pruning


class Noise(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        layers = masked_layers(pl_module)
        self.seen.append([layer.noise_seed.item() for layer in layers.values()])


def test_every_layer_and_micro_batch_has_its_own_noise(tmp_path):
    noise = Noise()
    fit(tmp_path, FST, None, noise, accumulate_grad_batches=2)
    masked = [seed for seeds in noise.seen[:28] for seed in seeds]
    assert len(set(masked)) == 28 * 3
    assert noise.seen[0] == [zlib.crc32(f"0:net.blocks.{i}:1".encode()) for i in range(3)]
    assert all(seeds == noise.seen[27] for seeds in noise.seen[28:]), "nothing is drawn in the dense phase"


def test_noise_changes_the_run_and_follows_the_seed(tmp_path):
    losses = {}
    for mvue, seed in ((False, 0), (True, 0), (True, 1)):
        config = FSTConfig(targets=BLOCKS, mvue=mvue, seed=seed)
        losses[mvue, seed] = fit(tmp_path, config).module.losses
    assert len({tuple(values) for values in losses.values()}) == 3
    assert fit(tmp_path, FSTConfig(targets=BLOCKS, seed=1)).module.losses == losses[True, 1]
