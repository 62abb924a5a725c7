"""Weight averaging: what is validated and kept are averaged values under unharmed masks."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.optim.swa_utils import get_ema_avg_fn

from slope_pl import ConversionError, SLoPeCallback, SLoPeDDPStrategy, SLoPeLightningModule, SLoPeSingleDeviceStrategy
from tests.lightning.toy import CONFIG, QUIET, Toy, assert_same, fixed_batch, make_trainer, oracle_logits, snapshot

pytestmark = [
    *QUIET,
    # Lightning's own hint about sharded modules; ours is not sharded.
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]

# 0.9 * 72 + 0.1 * 72 is less than 72 in float32, and so for 7 more of the 36 index bytes: averaging would ruin them.
DECAY = 0.9
MASKS = ("indices", "backward_indices", "adapter_active")
VALIDATE = {"limit_val_batches": 1, "val_check_interval": 4, "num_sanity_val_steps": 0}


class Mixed(SLoPeLightningModule, Toy):
    """Brings its callback along."""


class ByHand(pl.Callback):
    """Averages the stored tensors itself, and asks at each validation what the dense oracle makes of them."""

    def __init__(self, ema: bool, autocast: bool) -> None:
        self.ema, self.autocast = ema, autocast
        self.average, self.count = {}, 0
        self.logged, self.wanted, self.live = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        state = snapshot(pl_module)
        for name, tensor in state.items():
            if self.count and tensor.is_floating_point():
                old = self.average[name]
                weight = 1 - DECAY if self.ema else 1 / (self.count + 1)
                state[name] = old + weight * (tensor - old)
        self.average, self.count = state, self.count + 1

    def loss(self, state):
        batch = fixed_batch()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(oracle_logits(state, batch).float(), batch["label"]).item()

    def on_validation_end(self, trainer, pl_module):
        self.logged.append(trainer.callback_metrics["val/loss"].item())
        self.wanted.append(
            self.loss(self.average | {k: v for k, v in snapshot(pl_module).items() if k.endswith(MASKS)})
        )
        self.live.append(self.loss(pl_module.state_dict()))


class Fp32Loss(Toy):
    """The loss of float32 logits, so that a comparison sees the products' dtype and no more."""

    def loss(self, batch):
        return F.cross_entropy(self(batch).float(), batch["label"])


def averaging(ema):
    return EMAWeightAveraging(decay=DECAY) if ema else WeightAveraging()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("ema", [True, False], ids=["ema", "mean"])
def test_validation_sees_the_average_and_current_operands(tmp_path, ema, precision):
    """In bf16-mixed the operands are copies: stale ones would give the live weights' loss."""
    by_hand, module = ByHand(ema, precision == "bf16-mixed"), Fp32Loss(lr=0.05)
    make_trainer(
        tmp_path, SLoPeCallback(CONFIG), averaging(ema), by_hand, precision=precision, max_steps=20, **VALIDATE
    ).fit(module)
    got, want, live = (torch.tensor(losses) for losses in (by_hand.logged, by_hand.wanted, by_hand.live))
    assert len(got) == 5, "two before the wake, one at it, two after"
    # The average by hand differs in its last bit, which bf16 may round the other way.
    torch.testing.assert_close(got, want, rtol=1e-4 if precision == "32-true" else 1e-3, atol=0)
    assert ((got - live).abs() > 0.01).all(), "live and average must be told apart"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_result_of_training_is_the_average(tmp_path, precision):
    """Right after fit, in train mode: nothing but the weights themselves says that they were replaced."""
    by_hand, module = ByHand(True, precision == "bf16-mixed"), Fp32Loss()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), averaging(True), by_hand, precision=precision).fit(module)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=by_hand.autocast):
        got = module.loss(fixed_batch()).item()
    assert got == pytest.approx(by_hand.loss(by_hand.average), rel=2e-3)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(
            tensor, by_hand.average[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def run(tmp_path, way):
    module, callbacks, settings = {
        "callback first": lambda: (Toy(), [SLoPeCallback(CONFIG), averaging(True)], {}),
        "slope strategy": lambda: (
            Toy(),
            [averaging(True)],
            {"strategy": SLoPeSingleDeviceStrategy(config=CONFIG)},
        ),
        "slope_ddp strategy": lambda: (
            Toy(),
            [averaging(True)],
            {"strategy": SLoPeDDPStrategy(config=CONFIG)},
        ),
        "module, callback after": lambda: (
            Mixed(slope=CONFIG),
            [averaging(True), SLoPeCallback()],
            {},
        ),
        "module alone": lambda: (Mixed(slope=CONFIG), [averaging(True)], {}),
    }[way]()
    make_trainer(tmp_path, *callbacks, **settings).fit(module)
    return module.state_dict()


@pytest.mark.parametrize(
    "way",
    [
        "slope strategy",
        "slope_ddp strategy",
        "module, callback after",
        "module alone",
    ],
)
def test_masks_and_result_do_not_depend_on_the_order_of_callbacks(tmp_path, way):
    assert_same(run(tmp_path, way), run(tmp_path, "callback first"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_masks_and_losses_of_an_averaged_run_are_those_of_a_plain_run(tmp_path, precision):
    """Neither the bytes of the masks nor the phase take part in an average; training goes on with its own weights."""
    plain, averaged = Toy(), Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), precision=precision).fit(plain)
    make_trainer(tmp_path, SLoPeCallback(CONFIG), averaging(True), precision=precision, **VALIDATE).fit(averaged)
    assert averaged.losses == plain.losses
    got, want = ({k: v for k, v in m.state_dict().items() if k.endswith(MASKS)} for m in (averaged, plain))
    assert_same(got, want)


@pytest.mark.parametrize("callback_first", [True, False])
def test_masks_survive_averages_that_move_once_an_epoch(tmp_path, callback_first):
    class EachEpoch(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None

    slope, average = SLoPeCallback(CONFIG), EachEpoch(avg_fn=get_ema_avg_fn(DECAY))
    plain, averaged = Toy(), Mixed(slope=CONFIG)
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(plain)
    make_trainer(tmp_path, *((slope, average) if callback_first else (average, slope))).fit(averaged)
    got, want = ({k: v for k, v in m.state_dict().items() if k.endswith(MASKS)} for m in (averaged, plain))
    assert_same(got, want)


def test_averaging_before_the_conversion_of_a_plain_module_is_not_silent(tmp_path):
    with pytest.raises(ConversionError, match="put SLoPeCallback before it"):
        make_trainer(tmp_path, averaging(True), SLoPeCallback(CONFIG)).fit(Toy())


@pytest.mark.parametrize("step", [9, 12, 15])
def test_averaged_run_resumes_bit_identically(tmp_path, step):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module = Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), averaging(True), saver, enable_checkpointing=True).fit(module)
    saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
    for name, tensor in saved["state_dict"].items():
        if name.endswith(MASKS):
            assert torch.equal(tensor, saved["current_model_state"][name]), name
    again = Toy()
    path = tmp_path / f"step={step}.ckpt"
    make_trainer(tmp_path, SLoPeCallback(CONFIG), averaging(True)).fit(again, ckpt_path=path)
    assert again.losses == module.losses[step:]
    assert_same(again.state_dict(), module.state_dict())


def test_stochastic_weight_averaging_keeps_masks_and_operands(tmp_path):
    """The older callback averages parameters only, and writes them over at the end."""
    module = Toy()
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    make_trainer(tmp_path, SLoPeCallback(CONFIG), swa, max_steps=-1, max_epochs=3, precision="bf16-mixed").fit(module)
    state, batch = copy.deepcopy(module.state_dict()), fixed_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(batch), oracle_logits(state, batch), rtol=0.02, atol=0.02)


class WithSetup(Toy):
    """With a setup hook of its own, as many modules have."""

    def setup(self, stage):
        self.ready = True


def test_averaging_of_a_module_with_a_setup_hook(tmp_path):
    modules = WithSetup(), Toy()
    for module in modules:
        make_trainer(tmp_path, SLoPeCallback(CONFIG), averaging(True)).fit(module)
    assert_same(modules[0].state_dict(), modules[1].state_dict())


def test_swa_of_a_module_with_a_setup_hook_is_refused_before_the_first_step(tmp_path):
    """It copies the model in its own setup, too early: the average would be dense."""
    swa, module = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1), WithSetup()
    with pytest.raises(ConversionError, match="StochasticWeightAveraging copies"):
        make_trainer(tmp_path, SLoPeCallback(CONFIG), swa, max_steps=-1, max_epochs=3).fit(module)
    assert not module.losses
