"""Masks by activation norms inside a Trainer: when they are chosen, from what, and that it happens once."""

import copy
import os
import sys
import traceback
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from slope_pl import ScheduleError, SLoPeCallback, SLoPeConfig, SLoPeLightningModule, activation_norms, sparse_layers
from slope_pl.lightning import calibration
from slope_pl.sparsity import make_mask, unpack_mask
from tests.distributed.processes import report_of_two
from tests.lightning import toy
from tests.lightning.toy import QUIET, WIDTH, Net, Recorder, Tokens, Toy, assert_same, fit, make_trainer

pytestmark = QUIET

BATCHES = 3
CONFIG = SLoPeConfig(backward_refresh_steps=5, adapter_rank=4, adapter_start_step=12, mask_calibration_batches=BATCHES)
SHORT = SLoPeConfig(mask_calibration_batches=BATCHES)
PLAIN = SLoPeConfig(backward_refresh_steps=5, adapter_rank=4, adapter_start_step=12)
NAMES = [f"net.blocks.{i}" for i in range(3)]


def first_inputs(net, n=BATCHES):
    """Every block's inputs over the first batches of epoch 0, computed without hooks."""
    loader = iter(Toy.train_dataloader(_Loose()))
    rows = [[], [], []]
    with torch.no_grad():
        for _ in range(n):
            x = F.gelu(net.first(next(loader)["x"]))
            for i, block in enumerate(net.blocks):
                rows[i].append(x)
                x = F.gelu(block(x))
    return [torch.cat(part) for part in rows]


class _Loose:
    """What train_dataloader asks of a module in a Trainer of one process."""

    length, batch_size = 64, 8

    class trainer:
        world_size, global_rank = 1, 0


def expected_masks(net, kind="magnitude", n=BATCHES):
    return {
        f"net.blocks.{i}": make_mask(kind, net.blocks[i].weight, scale=rows.norm(dim=0))
        for i, rows in enumerate(first_inputs(net, n))
    }


def masks_of(module):
    return {name: layer.forward_mask() for name, layer in sparse_layers(module).items()}


def saver(folder):
    return ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


@pytest.mark.parametrize("kind", ["magnitude", "transposable"])
def test_masks_are_those_of_the_first_batches(tmp_path, kind):
    config = SLoPeConfig(mask=kind, mask_calibration_batches=BATCHES)
    recorder, dense = Recorder(), Net()
    module, _ = fit(tmp_path, None, recorder, config=config, max_steps=3)
    expected = expected_masks(dense, kind)
    assert_same(masks_of(module), expected)
    before = recorder.at[0]
    for i, name in enumerate(NAMES):
        kept = dense.blocks[i].weight.detach()[expected[name]].view(len(dense.blocks[i].weight), -1)
        assert_same(before[f"{name}.values"], kept)
        assert not torch.equal(expected[name], make_mask(kind, dense.blocks[i].weight)), "norms must matter here"


def test_only_the_masks_differ_from_a_run_without_it(tmp_path):
    """Same adapters, same biases, same batches in the same order: the data loader begins at its beginning."""

    class Seen(Toy):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch["x"]]
            return super().training_step(batch, batch_idx)

    runs = {}
    for config in (CONFIG, PLAIN):
        recorder = Recorder()
        module, _ = fit(tmp_path, Seen(), recorder, config=config)
        runs[config] = module.seen, recorder.at[0]
    assert_same(runs[CONFIG][0], runs[PLAIN][0])
    differing = {name for name, tensor in runs[CONFIG][1].items() if not torch.equal(tensor, runs[PLAIN][1][name])}
    assert differing == {f"{name}.{part}" for name in NAMES for part in ("values", "indices", "backward_indices")}


class Shuffled(Toy):
    """Draws its order and its dropout from the global generator."""

    def training_step(self, batch, batch_idx):
        self.first = getattr(self, "first", batch["x"])
        return super().training_step(batch, batch_idx) * torch.rand(())

    def train_dataloader(self):
        return DataLoader(Tokens(64), batch_size=8, shuffle=True)


def test_the_global_random_state_is_left_alone(tmp_path):
    firsts = []
    for config in (SHORT, SLoPeConfig()):
        torch.manual_seed(3)
        module, _ = fit(tmp_path, Shuffled(), config=config, max_steps=2)
        firsts.append(module.first)
    assert_same(*firsts)


def test_the_same_run_twice_gives_the_same_model(tmp_path):
    assert_same(fit(tmp_path, config=CONFIG)[0].state_dict(), fit(tmp_path, config=CONFIG)[0].state_dict())


class Order(pl.Callback):
    """Notes what is true at each hook."""

    def __init__(self):
        self.notes = {}

    def note(self, hook, module):
        layers = sparse_layers(module)
        self.notes[hook] = {
            "sparse": len(layers),
            "provisional": calibration.masks_are_provisional(module),
            "values": [id(layer.values) for layer in layers.values()],
            "training": all(part.training for part in module.modules()),
        }

    def setup(self, trainer, pl_module, stage):
        self.note("setup", pl_module)

    def on_fit_start(self, trainer, pl_module):
        self.note("on_fit_start", pl_module)
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert held >= set(self.notes["on_fit_start"]["values"])

    def on_sanity_check_start(self, trainer, pl_module):
        self.note("on_sanity_check_start", pl_module)

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.note("batch", pl_module)


def test_order_of_hooks(tmp_path):
    """Sparse from setup on, so that restore, optimizers and averages see the layers; final masks before any forward."""
    order = Order()
    fit(tmp_path, None, order, config=SHORT, max_steps=1, limit_val_batches=1, num_sanity_val_steps=1)
    notes = order.notes
    assert [notes[hook]["sparse"] for hook in ("setup", "on_fit_start", "batch")] == [3, 3, 3]
    assert notes["setup"]["provisional"]
    assert not notes["on_fit_start"]["provisional"]
    assert not notes["on_sanity_check_start"]["provisional"]
    assert notes["setup"]["values"] == notes["batch"]["values"], "the parameters stay the same objects"
    assert notes["setup"]["training"] == notes["on_fit_start"]["training"] == notes["batch"]["training"]


def test_averages_begin_with_the_final_masks(tmp_path):
    class Early(EMAWeightAveraging):
        def on_train_start(self, trainer, pl_module):
            self.at_start = toy.snapshot(self._average_model.module), toy.snapshot(pl_module)

    average = Early(decay=0.9)
    module, _ = fit(tmp_path, None, average, config=SHORT, max_steps=6)
    assert_same(*average.at_start)
    assert not calibration.masks_are_provisional(module)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(tmp_path, precision):
    module, _ = fit(tmp_path, config=SHORT, max_steps=2, precision=precision)
    found, expected = masks_of(module), expected_masks(Net())
    share = [float((found[name] == expected[name]).float().mean()) for name in NAMES]
    assert min(share) > 0.97, "roundings change a close decision, no more"


# ---------------------------------------------------------------------------------------------------- where it converts


class Own(SLoPeLightningModule, Toy):
    """Builds its net in configure_model, as the recipes do."""

    def __init__(self, slope=None, seed=0):
        super().__init__(slope=slope)
        self.net, self.seed = None, seed
        self.save_hyperparameters()

    def configure_model(self):
        if self.net is None:
            self.net = Net(self.seed)
        super().configure_model()


def test_module_that_converts_itself_and_load_from_checkpoint(tmp_path):
    module = Own(SHORT)
    make_trainer(tmp_path, saver(tmp_path), enable_checkpointing=True, max_steps=4).fit(module)
    assert_same(masks_of(module), expected_masks(Net()))
    again = Own.load_from_checkpoint(tmp_path / "step=4.ckpt")
    assert_same(again.state_dict(), module.state_dict())
    assert not calibration.masks_are_provisional(again)
    trainer = make_trainer(tmp_path, limit_val_batches=1)
    (scores,) = trainer.validate(again, verbose=False)
    (restored,) = trainer.validate(Own(SHORT, seed=9), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    assert restored == scores


def test_module_that_was_built_by_hand_is_calibrated_in_fit(tmp_path):
    module = Own(SHORT)
    module.configure_model()
    assert calibration.masks_are_provisional(module)
    make_trainer(tmp_path, max_steps=1).fit(module)
    assert_same(masks_of(module), expected_masks(Net()))


class WithSetup(Toy):
    """Builds its net in setup: the conversion then happens in configure_model."""

    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        self.net = self.net or Net()


def test_module_with_a_setup_of_its_own(tmp_path):
    module, _ = fit(tmp_path, WithSetup(), config=SHORT, max_steps=1)
    assert_same(masks_of(module), expected_masks(Net()))


def test_loader_given_to_fit(tmp_path):
    module = Toy()
    loader = DataLoader(Tokens(64), batch_size=8)
    make_trainer(tmp_path, SLoPeCallback(SHORT), max_steps=1).fit(module, train_dataloaders=loader)
    other, _ = fit(tmp_path, config=SHORT, max_steps=1)
    rows = torch.stack([Tokens(64)[i]["x"] for i in range(8 * BATCHES)])
    net = Net()
    norm = F.gelu(net.first(rows)).norm(dim=0).detach()
    assert_same(masks_of(module)[NAMES[0]], make_mask("magnitude", net.blocks[0].weight, scale=norm))
    assert not torch.equal(masks_of(module)[NAMES[0]], masks_of(other)[NAMES[0]]), "other batches, other norms"


def test_fewer_batches_than_asked_for_are_all_of_them(tmp_path):
    config = SLoPeConfig(mask_calibration_batches=1000)
    module, _ = fit(tmp_path, config=config, max_steps=1)
    assert_same(masks_of(module), expected_masks(Net(), n=8))


# ---------------------------------------------------------------------------------------------------- resume


def outcome(module, trainer):
    callback = next(c for c in trainer.callbacks if isinstance(c, SLoPeCallback))
    return {
        "model": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "callback": callback.state_dict(),
    }


@pytest.mark.parametrize("build", [lambda seed: Toy(Net(seed)), lambda seed: Own(CONFIG, seed)], ids=["plain", "own"])
@pytest.mark.parametrize("step", [1, 5, 13])
def test_a_restored_checkpoint_is_not_calibrated_again(tmp_path, monkeypatch, build, step):
    whole = build(0)
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), saver(tmp_path), enable_checkpointing=True)
    trainer.fit(whole)

    def never(*args):
        raise AssertionError("calibrated a restored model")

    monkeypatch.setattr(calibration, "training_norms", never)
    resumed = build(9)
    again = make_trainer(tmp_path, SLoPeCallback(CONFIG))
    again.fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_same(outcome(resumed, again), outcome(whole, trainer))


def test_training_on_keeps_the_masks(tmp_path):
    """A second fit of the same module is no new start."""
    module, _ = fit(tmp_path, config=SHORT, max_steps=2)
    masks = masks_of(module)
    make_trainer(tmp_path, SLoPeCallback(SHORT), max_steps=4).fit(module)
    assert_same(masks_of(module), masks)


def test_copies_and_pickles_of_a_provisional_model_leave_the_dense_layers_behind():
    module = Own(SHORT)
    module.configure_model()
    assert not calibration.masks_are_provisional(copy.deepcopy(module))
    assert calibration.masks_are_provisional(module)


# ---------------------------------------------------------------------------------------------------- the module's forward


class TwoInputs(Toy):
    def forward(self, x, label):
        return self.net({"x": x})

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["x"], batch["label"]), batch["label"])


def test_a_forward_that_takes_no_batch_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ScheduleError, match=r"TwoInputs's forward\(batch\), which failed.*calibration_step\(batch\)"):
        fit(tmp_path, TwoInputs(), config=SHORT, max_steps=1)


def test_calibration_step(tmp_path):
    class Helped(TwoInputs):
        def calibration_step(self, batch):
            return self(batch["x"], batch["label"])

    module, _ = fit(tmp_path, Helped(), config=SHORT, max_steps=1)
    assert_same(masks_of(module), expected_masks(Net()))


def test_an_error_while_calibrating_leaves_the_sparse_layers_in_their_places(tmp_path):
    module = TwoInputs()
    with pytest.raises(ScheduleError):
        fit(tmp_path, module, config=SHORT, max_steps=1)
    assert list(sparse_layers(module)) == NAMES
    assert all(part.training for part in module.modules())


def test_a_strategy_that_shards_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "keeps_model_whole", lambda strategy: False)
    module = Toy()
    with pytest.raises(ScheduleError, match=r"mask_calibration_batches=3 under SingleDeviceStrategy.*activation_norms"):
        fit(tmp_path, module, config=SHORT, max_steps=1)
    assert not module.losses


def test_a_strategy_that_shards_may_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    fit(tmp_path, None, saver(tmp_path), config=SHORT, enable_checkpointing=True, max_steps=2)
    monkeypatch.setattr(calibration, "keeps_model_whole", lambda strategy: False)
    module = Toy(Net(9))
    make_trainer(tmp_path, SLoPeCallback(SHORT), max_steps=4).fit(module, ckpt_path=tmp_path / "step=2.ckpt")
    assert_same(masks_of(module), expected_masks(Net()))


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.mark.distributed
def test_two_ranks(tmp_path):
    """Ranks with different weights and data end with one model; norms are summed over both."""
    zero, one = report_of_two("tests.lightning.test_calibration", tmp_path, 240)
    for report in (zero, one):
        assert not isinstance(report, str), report
    assert_same(zero["model"], one["model"])
    assert_same(zero["norms"], one["norms"])
    alone = activation_norms(Net(), SLoPeConfig(), [{"batch": batch} for batch in rank_batches(0) + rank_batches(1)])
    for name, norm in alone.items():
        torch.testing.assert_close(zero["norms"][name], norm, rtol=1e-5, atol=0)
    plain = make_mask("magnitude", Net(0).blocks[1].weight)
    assert not torch.equal(unpack_mask(zero["model"][f"{NAMES[1]}.indices"]), plain)


def rank_batches(rank):
    data = next(iter(toy.eval_loader(32)))["x"].view(2, 4, 4, WIDTH)[rank]
    return [{"x": x} for x in data]


def _worker(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    try:
        module = Toy(Net(rank))
        callback = SLoPeCallback(CONFIG)

        class Norms(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                data = [{"batch": batch} for batch in rank_batches(rank)]
                self.norms = activation_norms(Net(), SLoPeConfig(), data)

        norms = Norms()
        make_trainer(folder, callback, norms, devices=2, strategy="ddp", max_steps=14).fit(module)
        report = {"model": toy.snapshot(module), "norms": norms.norms}
    except Exception:
        report = traceback.format_exc()
    torch.save(report, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
