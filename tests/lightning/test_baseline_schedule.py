"""When the baselines choose masks and change phase, what they say and log."""

from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from slope_pl import ScheduleError
from slope_pl.baselines import (
    FSTConfig,
    SRSTEConfig,
    masked_layers,
)
from slope_pl.baselines.product import double_pruned_mask
from slope_pl.baselines.schedule import start_of_the_last
from slope_pl.sparsity import magnitude_mask, transposable_mask
from tests.lightning.baseline_runs import BLOCKS, FST, SRSTE, SRSTE_SLOW, fit
from tests.lightning.toy import QUIET, Recorder, Toy

pytestmark = QUIET


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
