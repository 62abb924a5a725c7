"""What Lightning and torch offer around a run: compile, activation checkpointing, loggers, progress bars, tuner."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.tuner import Tuner
from torch.utils.checkpoint import checkpoint

from slope_pl import SLoPeCallback, SLoPeConfig, ops, sparse_layers, sparsify
from slope_pl.ops import backends
from tests.lightning.toy import CONFIG, QUIET, Net, Toy, assert_same, fit, make_trainer

pytestmark = QUIET


class Memory(Logger):
    """Keeps what callbacks log."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows += [(name, step, value) for name, value in metrics.items()]

    def log_hyperparams(self, *args, **kwargs):
        pass

    def steps(self, name):
        return [step for found, step, _ in self.rows if found == f"slope/{name}"]


# ---------------------------------------------------------------------------------------------------- torch


# torch's own tracer warns of its own internals.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
def test_compiled_inner_net_trains_as_the_eager_one(tmp_path):
    """In one graph, through re-setups and the wake. aot_eager traces forward and backward and compiles nothing."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    compiled, eager = Toy(), Toy()
    counter = CompileCounterWithBackend("aot_eager")
    compiled.net.compile(backend=counter, fullgraph=True)
    fit(tmp_path, compiled)
    fit(tmp_path, eager)
    assert counter.frame_count == 2, "one graph before the wake, one after; re-setups and steps need none"
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-5)


class Checkpointed(Net):
    """Forgets the activations of the blocks and computes them again."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, batch):
        x = F.gelu(self.first(batch["x"]))
        for block in self.blocks:
            x = checkpoint(lambda x, b=block: F.gelu(b(x)), x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(tmp_path, use_reentrant, precision):
    module, _ = fit(tmp_path, Toy(Checkpointed(use_reentrant)), precision=precision)
    plain, _ = fit(tmp_path, precision=precision)
    assert module.losses == plain.losses
    assert_same(module.state_dict(), plain.state_dict())


def count_refreshes(monkeypatch):
    """A list that grows by one whenever a layer's operands are made."""
    made, reference = [], ops.get_backend("reference")
    counting = replace(reference, refresh=lambda *args: made.append(1) or reference.refresh(*args))
    monkeypatch.setitem(backends._REGISTRY, "reference", counting)
    return made


def test_operands_are_made_once_an_optimizer_step(tmp_path, monkeypatch):
    """Not once a micro-batch: 4 of them share operands, in a precision where the operands are copies."""
    made = count_refreshes(monkeypatch)
    fit(tmp_path, precision="bf16-mixed", accumulate_grad_batches=4, config=SLoPeConfig(), max_steps=6)
    assert len(made) == 6 * 3


# ---------------------------------------------------------------------------------------------------- loggers


def test_tensorboard_has_the_schedule_at_its_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    module, _ = fit(tmp_path, Toy(lr=0.05), logger=logger, log_every_n_steps=4)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    steps = {tag: [step for step, _ in rows] for tag, rows in scalars.items() if tag.startswith("slope/")}
    assert steps == {
        "slope/forward_density": [0],
        "slope/backward_density": [0],
        "slope/backward_churn": [5, 10, 15],
        "slope/adapters_awake": [12],
        "slope/adapter_down_norm": [12, 16],
        "slope/adapter_up_norm": [12, 16],
    }
    assert scalars["slope/forward_density"][0][1] == 0.5
    assert scalars["slope/backward_density"][0][1] == pytest.approx(0.406, abs=0.02)
    assert any(0 < churn < 0.5 for _, churn in scalars["slope/backward_churn"])
    assert scalars["slope/adapter_up_norm"][0][1] == 0 < scalars["slope/adapter_up_norm"][1][1]
    awake = [layer.adapter_down.shape.numel() for layer in sparse_layers(module).values()]
    assert scalars["slope/adapter_down_norm"][0][1] == pytest.approx(sum(awake) ** 0.5, rel=0.1), "standard normal"


def test_adapter_norms_are_logged_once_a_step(tmp_path):
    memory = Memory()
    fit(tmp_path, logger=memory, log_every_n_steps=4, accumulate_grad_batches=2)
    assert memory.steps("adapter_up_norm") == [12, 16]


def test_log_every_n_steps_of_zero_logs_no_norms(tmp_path):
    memory = Memory()
    fit(tmp_path, logger=memory, log_every_n_steps=0)
    assert memory.steps("adapter_up_norm") in ([], [12])


# ---------------------------------------------------------------------------------------------------- the screen


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_one_line_an_event(tmp_path, capfd, bar):
    """Through a progress bar too, which owns the screen."""
    bars = [] if bar is None else [bar()]
    make_trainer(tmp_path, SLoPeCallback(CONFIG), *bars, enable_progress_bar=bool(bars)).fit(Toy(lr=0.05))
    captured = capfd.readouterr()
    text = " ".join((captured.out + captured.err).split())
    assert text.count("SLoPe: 3 linear layers are 2:4 (magnitude mask), 2 stay dense") == 1
    assert text.count("adapters of rank 4 wake at step 12 of 20.") == 1
    for step in (5, 10, 15):
        assert text.count(f"SLoPe: step {step}: backward masks re-set") == 1
    assert text.count("SLoPe: step 12: adapters of 3 layers are awake.") == 1
    assert text.count("SLoPe:") == 5


def test_re_setup_at_every_step_prints_one_line(tmp_path, capsys):
    fit(tmp_path, config=SLoPeConfig(backward_refresh_steps=1))
    assert capsys.readouterr().out.count("masks re-set,") == 1


def test_the_plan_names_the_exact_total(tmp_path, capsys):
    class Stop(Toy):
        def training_step(self, batch, batch_idx):
            self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Stop(), config=SLoPeConfig(adapter_rank=4), max_steps=1_234_567)
    assert "wake at step 1222221 of 1234567." in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- tuner


# Lightning's learning-rate finder moves its own loss and says so.
@pytest.mark.filterwarnings("ignore:.*lr_find.*")
def test_learning_rate_finder_leaves_no_trace(tmp_path):
    """It trains past the wake and restores: the run that follows is the one without it."""
    callback, module = SLoPeCallback(CONFIG), Toy()
    trainer = make_trainer(tmp_path, callback, enable_checkpointing=True)
    Tuner(trainer).lr_find(module, num_training=15, early_stop_threshold=None, update_attr=False)
    assert callback.state_dict() == {"resetups": 0, "last_resetup_step": 0, "woke_at_step": None}
    assert not any(layer.adapters_awake for layer in sparse_layers(module).values())
    module.losses.clear()
    trainer.fit(module)
    plain, _ = fit(tmp_path)
    assert module.losses == plain.losses
    assert_same(module.state_dict(), plain.state_dict())


def test_best_checkpoint_is_the_sparse_model_of_that_step(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val/loss", mode="min")
    settings = {
        "limit_val_batches": 1,
        "val_check_interval": 4,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": True,
    }
    module, trainer = fit(tmp_path, None, saver, **settings)
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["global_step"] == 20
    assert_same(saved["state_dict"], module.state_dict())
    (metrics,) = trainer.validate(Toy(Net(9)), ckpt_path="best", verbose=False)
    assert metrics["val/loss"] == pytest.approx(saver.best_model_score.item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- throughput


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lightnings_flop_measurement_counts_the_sparse_products(device):
    """Forward and input gradient are half of dense, the weight gradient is dense."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    layers = sparsify(net, SLoPeConfig(keep_first_dense=False, keep_heads_dense=False))
    assert len(layers) == 2
    net = net.to(device)
    x = torch.randn(4, 10, 64, device=device, requires_grad=True)
    product = 2 * 40 * 64 * 128
    assert measure_flops(net, lambda: net(x)) == 2 * product // 2
    assert measure_flops(net, lambda: net(x), lambda y: y.sum()) == 2 * (product // 2 + product // 2 + product)
