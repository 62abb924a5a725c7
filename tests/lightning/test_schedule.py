"""When re-setups and the wake happen, counted in optimizer steps, and what cannot be scheduled."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch.utils.data import DataLoader, IterableDataset

from slope_pl import CheckpointError, ScheduleError, SLoPeCallback, SLoPeConfig, sparse_layers
from slope_pl.lightning.schedule import adapter_start_step
from tests.lightning.toy import CONFIG, QUIET, Manual, Recorder, Tokens, Toy, assert_same, fit, make_trainer

pytestmark = QUIET

FRACTION = SLoPeConfig(backward_refresh_steps=5, adapter_rank=4)


# ---------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize(
    ("total", "start", "awake"),
    [
        (8601, 0.99, 86),  # BERT-Large phase 2 as published: 8,601 steps
        (400_000, 0.99, 4000),  # GPT-2 as published
        (100, 0.99, 1),
        (40, 0.99, 1),  # less than a step: one is left all the same
        (1, 0.99, 1),
        (1000, 1.0, 1),
        (150, 0.8, 30),
        (1_000_000_000, 0.99, 10_000_000),
    ],
)
def test_number_of_steps_with_adapters(total, start, awake):
    config = SLoPeConfig(adapter_rank=4, adapter_start=start)
    assert adapter_start_step(config, total) == total - awake


def test_no_adapters_no_start():
    assert adapter_start_step(SLoPeConfig(), float("inf")) is None


@pytest.mark.parametrize("total", [float("inf"), -1, 0])
def test_a_fraction_of_an_unknown_total_is_an_error(total):
    with pytest.raises(ScheduleError, match="adapter_start_step"):
        adapter_start_step(SLoPeConfig(adapter_rank=4), total)


@pytest.mark.parametrize("total", [float("inf"), -1, 13])
def test_a_step_needs_no_total(total):
    assert adapter_start_step(CONFIG, total) == 12


@pytest.mark.parametrize("total", [12, 5])
def test_a_step_at_or_past_the_end_is_an_error(total):
    with pytest.raises(ScheduleError, match=f"adapter_start_step=12.*{total} steps"):
        adapter_start_step(CONFIG, total)


# ---------------------------------------------------------------------------------------------------- in a Trainer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_optimizer_steps(tmp_path, accumulate):
    """Re-setups and wake act on the first micro-batch of a window, between two optimizer steps."""
    recorder = Recorder()
    callback = SLoPeCallback(CONFIG)
    make_trainer(tmp_path, callback, recorder, accumulate_grad_batches=accumulate).fit(Toy())
    assert recorder.changes("backward_indices") == [5, 10, 15]
    assert recorder.changes("adapter_active") == [12]
    assert recorder.changes("adapter_up") == [*range(13, 20)], "asleep adapters move with neither gradient nor decay"
    assert recorder.changes(".indices") == [], "the forward mask never changes"
    assert callback.state_dict() == {"resetups": 3, "last_resetup_step": 15, "woke_at_step": 12}


@pytest.mark.parametrize(
    ("every", "mask", "steps"),
    [(1, "magnitude", [*range(1, 20)]), (None, "magnitude", []), (5, "transposable", []), (100, "magnitude", [])],
)
def test_when_columns_are_chosen_anew(tmp_path, every, mask, steps):
    recorder, callback = Recorder(), SLoPeCallback(SLoPeConfig(mask=mask, backward_refresh_steps=every))
    make_trainer(tmp_path, callback, recorder).fit(Toy(lr=0.03))
    assert callback.resetups == len(steps)
    assert set(recorder.changes("backward_indices")) <= set(steps)
    assert bool(recorder.changes("backward_indices")) == bool(steps)


def test_columns_are_chosen_anew_in_layers_that_are_not_transposable(tmp_path, capsys):
    masks = {"net.blocks.0": "transposable", "net.blocks.1": "random"}
    recorder, config = Recorder(), SLoPeConfig(layer_masks=masks, backward_refresh_steps=1)
    module, _ = fit(tmp_path, Toy(lr=0.03), recorder, config=config)
    assert recorder.changes("blocks.2.backward_indices")
    assert recorder.changes("blocks.1.backward_indices")
    assert not recorder.changes("blocks.0.backward_indices")
    first = module.net.blocks[0]
    assert torch.equal(first.forward_mask(), first.backward_mask())
    assert "(masks: 1 transposable, 1 random, 1 magnitude)" in capsys.readouterr().out


def test_masks_of_layers_are_part_of_a_checkpoint(tmp_path):
    """It resumes with them, is rebuilt with them without a config, and refuses others."""
    config = SLoPeConfig(layer_masks={"*.blocks.0": "transposable"})
    _, trainer = fit(tmp_path, config=config, max_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    make_trainer(tmp_path, SLoPeCallback(config), max_steps=4).fit(Toy(), ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match=r"layer_masks=\{'\*.blocks.0': 'transposable'\}, this run has layer_masks=\{\}"
    ):
        make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=4).fit(Toy(), ckpt_path=tmp_path / "a.ckpt")
    # A file of a version that did not know them is one without them.
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del content["slope_pl"]["config"]["layer_masks"]
    torch.save(content, tmp_path / "old.ckpt")
    make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=4).fit(Toy(), ckpt_path=tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"made with layer_masks=\{\}"):
        make_trainer(tmp_path, SLoPeCallback(config), max_steps=4).fit(Toy(), ckpt_path=tmp_path / "old.ckpt")


@pytest.mark.parametrize(
    ("settings", "woke"),
    [
        ({"max_steps": 200}, 198),
        ({"max_epochs": 13, "max_steps": -1}, 103),  # 13 * 8 = 104
        ({"max_epochs": 13, "max_steps": -1, "accumulate_grad_batches": 3}, 38),  # 3 a epoch
        ({"max_epochs": 13, "max_steps": -1, "limit_train_batches": 5}, 64),
        ({"max_steps": 20, "max_time": timedelta(hours=1)}, 19),
        ({"fast_dev_run": True}, 0),
    ],
    ids=str,
)
def test_the_last_percent_of_what_the_trainer_plans(tmp_path, settings, woke):
    callback = SLoPeCallback(FRACTION)
    trainer = make_trainer(tmp_path, callback, **settings)
    trainer.fit(Toy())
    assert (callback.start_step, callback.woke_at_step) == (woke, woke)


class Endless(IterableDataset):
    def __iter__(self):
        i = 0
        while True:
            yield Tokens()[i]
            i += 1


class EndlessToy(Toy):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=4)


class StopAfter(Timer):
    """The time limit without the clock."""

    def __init__(self, steps):
        super().__init__(timedelta(hours=1))
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.steps


UNKNOWN = {
    "max_time alone": (Toy, {"max_time": timedelta(hours=1)}),
    "max_epochs=-1": (Toy, {"max_epochs": -1}),
    "endless data set": (EndlessToy, {"max_epochs": 1}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_length_is_an_error_before_the_first_step(tmp_path, case):
    make, settings = UNKNOWN[case]
    module = make()
    with pytest.raises(ScheduleError, match="adapter_start_step"):
        make_trainer(tmp_path, SLoPeCallback(FRACTION), StopAfter(3), max_steps=-1, **settings).fit(module)
    assert not module.losses


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("config", [CONFIG, SLoPeConfig()], ids=["a step", "no adapters"])
def test_unknown_length_is_fine(tmp_path, case, config):
    make, settings = UNKNOWN[case]
    callback = SLoPeCallback(config)
    make_trainer(tmp_path, callback, StopAfter(15), max_steps=-1, **settings).fit(make())
    assert callback.woke_at_step == config.adapter_start_step


def test_endless_data_with_max_steps_is_known(tmp_path):
    callback = SLoPeCallback(FRACTION)
    make_trainer(tmp_path, callback, max_steps=10).fit(EndlessToy())
    assert callback.woke_at_step == 9


def test_a_start_past_the_end_is_an_error_before_the_first_step(tmp_path):
    module = Toy()
    with pytest.raises(ScheduleError, match="never wake"):
        fit(tmp_path, module, max_steps=12)
    assert not module.losses


def test_early_stop_says_that_the_adapters_never_woke(tmp_path, capsys):
    stop = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    module, trainer = fit(tmp_path, None, stop, limit_val_batches=1, val_check_interval=4, num_sanity_val_steps=0)
    assert trainer.global_step < 12
    assert (
        f"ended at step {trainer.global_step}, before the adapters' step 12: they never woke" in capsys.readouterr().out
    )
    assert not any(layer.adapters_awake for layer in sparse_layers(module).values())


def test_a_run_that_woke_does_not_say_so(tmp_path, capsys):
    fit(tmp_path)
    assert "never woke" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- optimizers


class Filtered(Toy):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


class Early(Toy):
    def __init__(self):
        super().__init__()
        self.early = torch.optim.AdamW(self.parameters())

    def configure_optimizers(self):
        return self.early


@pytest.mark.parametrize(("make", "missing"), [(Filtered, "adapter_down"), (Early, "values")])
def test_weights_outside_the_optimizer_are_an_error(tmp_path, make, missing):
    module = make()
    with pytest.raises(ScheduleError, match=rf"net\.blocks\.0\.{missing} is in no optimizer"):
        fit(tmp_path, module)
    assert not module.losses


def test_frozen_layers_need_no_optimizer(tmp_path):
    module = Toy()
    module.net.blocks[0].requires_grad_(False)

    def configure_optimizers():
        return torch.optim.AdamW([p for n, p in module.named_parameters() if not n.startswith("net.blocks.0")], lr=0.01)

    module.configure_optimizers = configure_optimizers
    recorder = Recorder()
    fit(tmp_path, module, recorder)
    for name, tensor in recorder.at[0].items():
        if name.startswith("net.blocks.0") and not name.endswith("adapter_active"):
            assert torch.equal(tensor, module.state_dict()[name]), name


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        halves = (
            [p for n, p in self.named_parameters() if "blocks" in n],
            [p for n, p in self.named_parameters() if "blocks" not in n],
        )
        return [torch.optim.AdamW(half, lr=self.lr, weight_decay=0.1) for half in halves]


def test_manual_optimization_trains_the_same(tmp_path):
    manual, _ = fit(tmp_path, Manual())
    automatic, _ = fit(tmp_path)
    assert manual.losses == automatic.losses
    assert_same(manual.state_dict(), automatic.state_dict())


def test_two_optimizers_add_up_to_the_same_run(tmp_path):
    """20 batches are 40 steps: a config with twice the numbers does the same."""
    config = SLoPeConfig(backward_refresh_steps=10, adapter_rank=4, adapter_start_step=24)
    two, trainer = fit(tmp_path, TwoOptimizers(), config=config, max_steps=40)
    one, _ = fit(tmp_path)
    assert trainer.callbacks[0].resetups == 3
    assert_same(two.state_dict(), one.state_dict())


def test_re_setup_is_not_missed_where_steps_jump_over_it(tmp_path):
    """Steps 2, 4, 6, ... 40 with a re-setup every 5: due at (or right after) 5, 10, ... 35."""
    callback = SLoPeCallback(SLoPeConfig(backward_refresh_steps=5))
    make_trainer(tmp_path, callback, max_steps=40).fit(TwoOptimizers())
    assert callback.resetups == 7


def test_two_optimizers_and_epochs_alone_are_an_error(tmp_path):
    """Lightning estimates batches, steps add up: the adapters would wake half-way, in silence."""
    with pytest.raises(ScheduleError, match="adapter_start_step"):
        make_trainer(tmp_path, SLoPeCallback(FRACTION), max_steps=-1, max_epochs=4).fit(TwoOptimizers())


@pytest.mark.parametrize("make", [Manual, TwoOptimizers])
def test_max_steps_gives_manual_optimization_its_last_percent(tmp_path, make):
    callback = SLoPeCallback(FRACTION)
    trainer = make_trainer(tmp_path, callback, max_steps=200, max_epochs=-1)
    trainer.fit(make())
    assert (callback.woke_at_step, trainer.global_step) == (198, 200)
