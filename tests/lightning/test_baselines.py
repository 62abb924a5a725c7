"""The baselines in a Trainer: schedule, decay, resume, precision, two ranks, and what is refused.

``python -m tests.lightning.test_baselines FOLDER`` is one of the two processes of the distributed test.
"""

import os
import socket
import subprocess
import sys
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn

from slope_pl import CheckpointError, ConfigError, ConversionError, ScheduleError, SLoPeCallback, SLoPeConfig
from slope_pl.baselines import (
    FSTCallback,
    FSTConfig,
    SRSTECallback,
    SRSTEConfig,
    masked_layers,
    mvue_two_of_four,
    unmask_layers,
)
from slope_pl.baselines.checks import check_checkpoint, check_scaling
from slope_pl.baselines.product import double_pruned_mask
from slope_pl.baselines.schedule import start_of_the_last
from slope_pl.sparsity import magnitude_mask, transposable_mask
from tests.lightning.toy import QUIET, Net, Recorder, Toy, assert_same, hf_bert, hf_gpt2, make_trainer, snapshot

pytestmark = QUIET

BLOCKS = ("net.blocks.*",)
SRSTE = SRSTEConfig(decay=0.01, adapter_rank=4, adapter_start_step=12)
SRSTE_SLOW = SRSTEConfig(decay=0.01, mask_refresh_steps=3, adapter_rank=4, adapter_start_step=12)
FST = FSTConfig(targets=BLOCKS, decay=0.01, mask_refresh_steps=5, dense_finish_step=14)
ALL = {"srste": SRSTE, "srste_slow": SRSTE_SLOW, "fst": FST}


def callback_of(config):
    return SRSTECallback(config) if isinstance(config, SRSTEConfig) else FSTCallback(config)


def fit(tmp_path, config, module=None, *callbacks, ckpt_path=None, **settings):
    module, callback = Toy() if module is None else module, callback_of(config)
    trainer = make_trainer(tmp_path, callback, *callbacks, **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    return SimpleNamespace(module=module, trainer=trainer, callback=callback, layers=masked_layers(module))


# ---------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("accumulate", [1, 3])
def test_srste_schedule(tmp_path, accumulate):
    recorder = Recorder()
    run = fit(tmp_path, SRSTE, Toy(lr=0.03), recorder, accumulate_grad_batches=accumulate)
    assert set(run.layers) == {f"net.blocks.{i}" for i in range(3)}
    flipped = 0
    for step in range(20):
        for name in run.layers:
            weight, mask = recorder.at[step][f"{name}.weight"], recorder.at[step][f"{name}.mask"]
            assert torch.equal(mask, magnitude_mask(weight)), f"step {step}: the mask is not the current weight's"
            assert torch.equal(recorder.at[step][f"{name}.backward_mask"], double_pruned_mask(weight, mask))
            flipped += step > 0 and not torch.equal(mask, recorder.at[step - 1][f"{name}.mask"])
    assert flipped > 10, "masks must move, or the test shows nothing"
    assert recorder.changes("adapter_active") == [12]
    assert recorder.changes("adapter_up") == [*range(13, 20)]
    want = {"refreshes": 20, "last_refresh_step": 20, "switched_at_step": 12, "micro_batches": len(run.module.losses)}
    assert run.callback.state_dict() == want


def test_srste_masks_between_refreshes_stay(tmp_path):
    recorder = Recorder()
    run = fit(tmp_path, SRSTE_SLOW, Toy(lr=0.03), recorder)
    assert recorder.changes(".mask") == recorder.changes(".backward_mask") == [3, 6, 9, 12, 15, 18]
    assert run.callback.refreshes == 6


@pytest.mark.parametrize("accumulate", [1, 3])
def test_fst_schedule(tmp_path, accumulate):
    recorder = Recorder()
    run = fit(tmp_path, FST, Toy(lr=0.03), recorder, accumulate_grad_batches=accumulate)
    assert recorder.changes(".mask") == [5, 10]
    assert recorder.changes("mask_active") == [14]
    for step in (0, 5, 10):
        for name in run.layers:
            mask, weight = recorder.at[step][f"{name}.mask"], recorder.at[step][f"{name}.weight"]
            assert torch.equal(mask, transposable_mask(weight))
    want = {"refreshes": 2, "last_refresh_step": 10, "switched_at_step": 14, "micro_batches": len(run.module.losses)}
    assert run.callback.state_dict() == want
    assert not any(layer.masked for layer in run.layers.values())


class Initial(Toy):
    """Draws its weights after the conversion."""

    def on_fit_start(self):
        with torch.no_grad():
            for block in self.net.blocks:
                block.weight.normal_()


@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_first_masks_are_those_of_the_weights_that_training_starts_with(tmp_path, config):
    recorder = Recorder()
    run = fit(tmp_path, config, Initial(), recorder, max_steps=15)
    choose = magnitude_mask if config is SRSTE else transposable_mask
    for name in run.layers:
        assert torch.equal(recorder.at[0][f"{name}.mask"], choose(recorder.at[0][f"{name}.weight"]))


class AtValidation(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            for layer in masked_layers(pl_module).values():
                self.seen.append(torch.equal(layer.mask, magnitude_mask(layer.weight)))


def test_validation_and_checkpoint_see_the_current_masks(tmp_path):
    seen, saver = AtValidation(), ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=7)
    settings = {"limit_val_batches": 1, "val_check_interval": 4, "enable_checkpointing": True}
    fit(tmp_path, SRSTE, Toy(lr=0.03), seen, saver, **settings)
    assert len(seen.seen) == 3 * 5
    assert all(seen.seen)
    saved = torch.load(tmp_path / "step=14.ckpt", weights_only=True)["state_dict"]
    for i in range(3):
        assert torch.equal(saved[f"net.blocks.{i}.mask"], magnitude_mask(saved[f"net.blocks.{i}.weight"]))


@pytest.mark.parametrize(
    ("config", "settings", "step"),
    [
        (SRSTEConfig(adapter_rank=4), {"max_steps": 200}, 198),
        (SRSTEConfig(adapter_rank=4, adapter_fraction=0.25), {"max_steps": 20}, 15),
        (SRSTEConfig(adapter_rank=4), {"max_epochs": 13, "max_steps": -1, "accumulate_grad_batches": 3}, 38),
        (SRSTEConfig(), {}, None),
        (FSTConfig(targets=BLOCKS), {"max_steps": 60}, 50),
        (FSTConfig(targets=BLOCKS, dense_finish_fraction=0), {}, None),
        (FSTConfig(targets=BLOCKS), {"max_epochs": 3, "max_steps": -1}, 20),
        (FSTConfig(targets=BLOCKS), {"fast_dev_run": True}, 0),
    ],
)
def test_the_mark_as_a_fraction(tmp_path, config, settings, step):
    assert fit(tmp_path, config, **settings).callback.switched_at_step == step


@pytest.mark.parametrize(
    ("total", "share", "step"), [(300_000, 1 / 6, 250_000), (400_000, 0.01, 396_000), (1, 0.5, 0), (40, 0.01, 39)]
)
def test_arithmetic_of_the_mark(total, share, step):
    assert start_of_the_last(total, ("f", share), ("s", None), "it") == step


def test_a_mark_at_the_end_is_past_it():
    assert start_of_the_last(10, ("f", 0.1), ("s", 9), "it") == 9
    with pytest.raises(ScheduleError, match="s=10, but training ends after 10 steps: it would never happen"):
        start_of_the_last(10, ("f", 0.1), ("s", 10), "it")


@pytest.mark.parametrize(("config", "what"), [(SRSTE, "adapter_start_step=12"), (FST, "dense_finish_step=14")])
def test_a_mark_past_the_end_is_an_error(tmp_path, config, what):
    module = Toy()
    with pytest.raises(ScheduleError, match=rf"{what}, but training ends after 10 steps"):
        fit(tmp_path, config, module, max_steps=10)
    assert not module.losses


@pytest.mark.parametrize(
    ("config", "what"),
    [(SRSTEConfig(adapter_rank=4), "adapter_start_step"), (FSTConfig(targets=BLOCKS), "dense_finish_step")],
)
def test_a_fraction_of_an_unknown_length_is_an_error(tmp_path, config, what):
    with pytest.raises(ScheduleError, match=rf"number of steps is unknown .* or {what}"):
        fit(tmp_path, config, max_steps=-1, max_time=timedelta(hours=1))


def test_early_stop_says_so(tmp_path, capsys):
    stop = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    fit(tmp_path, FST, None, stop, limit_val_batches=1, val_check_interval=4, num_sanity_val_steps=0)
    assert "before step 14: the dense finish from step 14 did not happen" in capsys.readouterr().out


def test_says_what_it_does(tmp_path, capsys):
    fit(tmp_path, SRSTE)
    said = capsys.readouterr().out
    assert "Extended SR-STE: 3 linear layers are masked, 1,024 of their weights at a time hidden (a simulation" in said
    assert "masks chosen anew every step, decay 0.01; the wake of the adapters of rank 4 at step 12." in said
    assert "step 12: adapters of 3 layers are awake" in said
    assert "did not happen" not in said


def test_metrics(tmp_path):
    for config, names in (
        (SRSTE, ["srste/flip_rate", "srste/adapters_awake", "srste/adapter_down_norm", "srste/adapter_up_norm"]),
        (FST, ["fst/flip_rate", "fst/dense"]),
    ):
        logger = CSVLogger(tmp_path, name=names[0].split("/")[0])
        fit(tmp_path, config, Toy(lr=0.03), logger=logger, log_every_n_steps=4)
        text = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        table = [dict(zip(text[0].split(","), line.split(","), strict=True)) for line in text[1:]]
        for name in names:
            found = {int(row["step"]): float(row[name]) for row in table if row[name]}
            want = {"srste/flip_rate": [4, 8, 12, 16, 20], "fst/flip_rate": [5, 10], "srste/adapters_awake": [12]}
            want |= {"fst/dense": [14]}
            assert sorted(found) == want.get(name, [12, 16, 20] if name.endswith("norm") and 12 in found else [16, 20])
            assert all(value > 0 for value in found.values())
            assert all(value < 1 for value in found.values()) or "flip" not in name


# ---------------------------------------------------------------------------------------------------- decay


class Frozen(torch.optim.SGD):
    """Keeps the gradients that reach it, and moves nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.seen = []

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        self.seen.append([p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None])
        return loss


class FrozenToy(Toy):
    def configure_optimizers(self):
        return Frozen(list(self.net.blocks[1].parameters())[:1])


CLIP = 1e-3


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", ["srste", "fst"])
def test_decay_is_added_once_a_step_before_or_after_clipping(tmp_path, method, accumulate, clip):
    def gradients(decay):
        if method == "srste":
            config = SRSTEConfig(decay=decay, include=("net.blocks.1",))
        else:
            config = FSTConfig(decay=decay, targets=("net.blocks.1",), dense_finish_step=2, mask_refresh_steps=1)
        run = fit(
            tmp_path, config, FrozenToy(), max_steps=3, accumulate_grad_batches=accumulate, gradient_clip_val=clip
        )
        (layer,) = run.layers.values()
        return layer.weight.detach() * ~layer.mask, [step[0] for step in run.trainer.optimizers[0].seen]

    hidden, without = gradients(0.0)
    _, got = gradients(0.5)
    assert len(got) == 3
    for step, (with_decay, plain) in enumerate(zip(got, without, strict=True)):
        want = plain + 0.5 * hidden if method == "srste" or step < 2 else plain  # dense by then: no mask, no decay
        if clip is not None and method == "srste":  # plain came out clipped: its norm before is lost, the direction not
            assert with_decay.norm() == pytest.approx(CLIP, rel=1e-3)
            continue
        torch.testing.assert_close(with_decay, want)
        if clip is not None:
            assert plain.norm() == pytest.approx(CLIP, rel=1e-3)
            assert step == 2 or with_decay.norm() > 100 * CLIP


class OtherClipping(Toy):
    """Clips in its own way, which must still be called."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clipped = getattr(self, "clipped", 0) + 1


def test_own_clipping_is_kept_and_given_back(tmp_path):
    run = fit(tmp_path, FST, OtherClipping())
    assert run.module.clipped == 20
    assert "configure_gradient_clipping" not in run.module.__dict__


class Broken(Toy):
    def configure_model(self):
        pass

    def training_step(self, batch, batch_idx):
        raise ArithmeticError


def test_methods_are_given_back_after_an_error(tmp_path):
    module = Broken()
    with pytest.raises(ArithmeticError):
        fit(tmp_path, FST, module)
    assert not {"configure_gradient_clipping", "configure_model"} & set(module.__dict__)


class Manual(Toy):
    def __init__(self, optimizers=1):
        super().__init__()
        self.automatic_optimization, self.count = False, optimizers

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        if self.count == 1:
            return super().configure_optimizers()
        named = list(self.named_parameters())
        halves = ([p for n, p in named if "blocks" not in n], [p for n, p in named if "blocks" in n])
        return [torch.optim.AdamW(half, lr=self.lr, weight_decay=0.1) for half in halves]


@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_manual_optimization_trains_the_same(tmp_path, config):
    manual, automatic = fit(tmp_path, config, Manual()), fit(tmp_path, config)
    assert manual.module.losses == automatic.module.losses
    assert_same(manual.module.state_dict(), automatic.module.state_dict())


def test_two_optimizers_add_up_to_the_same_run(tmp_path):
    doubled = FSTConfig(targets=BLOCKS, decay=0.01, mask_refresh_steps=10, dense_finish_step=28)
    two, one = fit(tmp_path, doubled, Manual(2), max_steps=40), fit(tmp_path, FST)
    assert two.module.losses == one.module.losses
    assert_same(two.module.state_dict(), one.module.state_dict())


def test_two_optimizers_and_epochs_alone_are_an_error(tmp_path):
    with pytest.raises(ScheduleError, match="dense_finish_fraction is no mark"):
        fit(tmp_path, FSTConfig(targets=BLOCKS), Manual(2), max_steps=-1, max_epochs=4)


# ---------------------------------------------------------------------------------------------------- resume


TOTAL = 20
MOMENTS = (1, 3, 5, 6, 8, 10, 11, 12, 13, 14, 15, 19)


def saver(folder):
    return ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


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


# ---------------------------------------------------------------------------------------------------- any model


@pytest.mark.parametrize("net", [hf_bert, hf_gpt2])
@pytest.mark.parametrize(
    ("config", "count"),
    [
        (SRSTEConfig(adapter_rank=4, adapter_fraction=0.25), {"hf_bert": 9, "hf_gpt2": 7}),
        (FSTConfig(), {"hf_bert": 4, "hf_gpt2": 4}),
    ],
    ids=["srste", "fst"],
)
def test_hugging_face_models(tmp_path, net, config, count):
    run = fit(tmp_path, config, Toy(net()), max_steps=40)
    assert len(run.layers) >= count[net.__name__], set(run.layers)
    assert sum(run.module.losses[-8:]) < sum(run.module.losses[:8])
    assert all(layer.weight.grad is None or layer.weight.grad.isfinite().all() for layer in run.layers.values())
    batch = next(iter(run.module.val_dataloader()))
    run.module.eval()
    want = run.module(batch)
    unmask_layers(run.module)
    torch.testing.assert_close(run.module(batch), want)


class BuildsInSetup(Toy):
    def __init__(self):
        super().__init__(nn.Identity())

    def setup(self, stage):
        if isinstance(self.net, nn.Identity):
            self.net = Net()


class BuildsInConfigureModel(Toy):
    def __init__(self):
        super().__init__(nn.Identity())

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = Net()


@pytest.mark.parametrize("kind", [BuildsInSetup, BuildsInConfigureModel])
@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_models_built_late(tmp_path, kind, config):
    late = fit(tmp_path, config, kind(), saver(tmp_path), enable_checkpointing=True)
    assert late.module.losses == fit(tmp_path, config).module.losses
    resumed = fit(tmp_path, config, kind(), ckpt_path=tmp_path / "step=13.ckpt")
    assert_same(resumed.module.state_dict(), late.module.state_dict())


@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions(tmp_path, config, precision):
    exact, run = fit(tmp_path, config), fit(tmp_path, config, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert all(layer.weight.dtype is dtype for layer in run.layers.values())
    torch.testing.assert_close(torch.tensor(run.module.losses), torch.tensor(exact.module.losses), rtol=0.1, atol=0.05)
    assert run.module.losses != exact.module.losses


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_compiled(tmp_path, config):
    module = Toy()
    module.net.compile(backend="aot_eager", fullgraph=True)
    run = fit(tmp_path, config, module)
    want = fit(tmp_path, config).module.losses
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(want))
    assert run.callback.switched_at_step is not None


@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_prediction_and_unmasked_models(tmp_path, config):
    run = fit(tmp_path, config)
    loader = run.module.val_dataloader()
    before = run.trainer.predict(run.module, loader)
    unmask_layers(run.module)
    torch.testing.assert_close(run.trainer.predict(run.module, loader), before)
    assert not masked_layers(run.module), "a model made dense stays so outside training"
    with pytest.raises(ConversionError, match="made dense by unmask_layers"):
        fit(tmp_path, config, run.module)


# ---------------------------------------------------------------------------------------------------- refused


def test_nothing_matched(tmp_path):
    with pytest.raises(ConversionError, match=r"not a feed-forward layer by its name.*targets"):
        fit(tmp_path, FSTConfig())
    with pytest.raises(ConversionError, match=r"include pattern 'h\.\*' matches no linear layer"):
        fit(tmp_path, SRSTEConfig(include=("h.*",)))


def test_two_methods_on_one_model_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="SLoPe's sparse layers"):
        make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), SRSTECallback()).fit(Toy())
    with pytest.raises(ConversionError, match="masked already"):
        make_trainer(tmp_path, FSTCallback(FST), SRSTECallback()).fit(Toy())


@pytest.mark.parametrize("average", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(0.01)])
def test_averaging_is_refused(tmp_path, average):
    with pytest.raises(ConversionError, match="averages weights whose mask changes"):
        fit(tmp_path, SRSTE, None, average())


class Filtered(Toy):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


def test_adapters_outside_the_optimizer_are_refused(tmp_path):
    with pytest.raises(ScheduleError, match=r"net\.blocks\.0\.adapter_down is in no optimizer"):
        fit(tmp_path, SRSTE, Filtered())


def test_loss_scale_with_a_fused_optimizer_is_refused():
    plugin = object.__new__(pl.plugins.MixedPrecision)
    plugin.scaler = torch.amp.GradScaler("cpu")
    weights = [nn.Parameter(torch.zeros(2))]
    trainer = SimpleNamespace(precision_plugin=plugin, optimizers=[torch.optim.AdamW(weights, fused=True)])
    with pytest.raises(ScheduleError, match="fused=False"):
        check_scaling(trainer)
    trainer.optimizers = [torch.optim.AdamW(weights)]
    check_scaling(trainer)
    trainer.optimizers, plugin.scaler = [torch.optim.AdamW(weights, fused=True)], None
    check_scaling(trainer)


def test_checks_are_made(tmp_path):
    class Fused(Toy):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), fused=True)

    with pytest.raises(ScheduleError, match="fused=False"):
        fit(tmp_path, FST, Fused(), plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu")])
    for kind in (ModelParallelStrategy, DeepSpeedStrategy):
        strategy = object.__new__(kind)
        with pytest.raises(ScheduleError, match=f"{kind.__name__} is not supported by FSTCallback"):
            FSTCallback(FST).setup(SimpleNamespace(strategy=strategy), Toy(), "fit")


def test_callbacks_take_mappings_and_refuse_the_rest():
    assert SRSTECallback({"decay": 1e-5}).config == SRSTEConfig(decay=1e-5)
    assert FSTCallback().config == FSTConfig()
    with pytest.raises(ConfigError, match="unknown FSTConfig setting 'rank'"):
        FSTCallback({"rank": 4})
    with pytest.raises(ConfigError, match="got SRSTEConfig"):
        FSTCallback(SRSTE)


YAML = """
callbacks:
  - class_path: slope_pl.baselines.SRSTECallback
    init_args:
      config: {decay: 1.0e-5, adapter_rank: 16, backward_pruning: none, exclude: [h.3.*]}
  - class_path: slope_pl.baselines.FSTCallback
    init_args:
      config: {targets: ["*.mlp.*"], decay: 2.0e-4}
"""


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_from_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--callbacks", type=list[pl.Callback])
    parsed = parser.parse_args([f"--config={tmp_path / 'config.yaml'}"])
    srste, fst = parser.instantiate_classes(parsed).callbacks
    assert srste.config == SRSTEConfig(decay=1e-5, adapter_rank=16, backward_pruning="none", exclude=("h.3.*",))
    assert fst.config == FSTConfig(targets=("*.mlp.*",), decay=2e-4)


# ---------------------------------------------------------------------------------------------------- two ranks

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


@pytest.mark.distributed
def test_two_ranks_stay_one_model(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.lightning.test_baselines", str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env=common | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in said)
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, (history, losses, state, streams) in zero.items():
        other_history, other_losses, other_state, other_streams = one[name]
        assert len(losses) == 20
        assert not set(losses) & set(other_losses), "the ranks must see different data"
        assert_same(history, other_history)
        assert state == other_state
        assert (streams, other_streams) == ([0] * 3, [1] * 3)
        if name.startswith("srste"):
            assert history[-1]["net.blocks.1.adapter_up"].abs().max() > 1e-3, "adapters must train after the wake"


def test_streams_prune_differently():
    x, seed = torch.randn(16, 4), torch.tensor(5)
    assert not torch.equal(mvue_two_of_four(x, seed, 0) != 0, mvue_two_of_four(x, seed, 1) != 0)


def test_loss_falls(tmp_path):
    for config in ALL.values():
        losses = fit(tmp_path, config, max_steps=100).module.losses
        assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
