"""Callback, strategies and module are one behaviour: the same run, bit for bit, however it is asked for."""

import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from slope_pl import (
    ConfigError,
    ConversionError,
    ScheduleError,
    SLoPeCallback,
    SLoPeConfig,
    SLoPeDDPStrategy,
    SLoPeDeepSpeedStrategy,
    SLoPeLightningModule,
    SLoPeModelParallelStrategy,
    SLoPeSingleDeviceStrategy,
    sparse_layers,
)
from slope_pl.lightning import deepspeed
from slope_pl.lightning.callback import check_strategy
from tests.lightning.toy import CONFIG, QUIET, Net, Toy, assert_same, fit, hf_bert, hf_gpt2, make_trainer, snapshot

pytestmark = QUIET


class AsBase(SLoPeLightningModule):
    """The base class, with a net of its own and everything else from Toy."""

    def __init__(self, net, slope=None):
        super().__init__(slope=slope)
        self.net, self.losses, self.length, self.batch_size, self.lr = net, [], 64, 8, 1e-2

    forward, loss = Toy.forward, Toy.loss
    training_step, configure_optimizers = Toy.training_step, Toy.configure_optimizers
    train_dataloader = Toy.train_dataloader


class AsMixin(SLoPeLightningModule, Toy):
    """The mixin before a module that knows nothing of it."""


def plain(net):
    return Toy(net)


WAYS = {
    "callback, auto": (plain, {"strategy": "auto"}, True),
    "callback, ddp": (plain, {"strategy": "ddp"}, True),
    "strategy by instance": (plain, lambda: {"strategy": SLoPeSingleDeviceStrategy(config=CONFIG)}, False),
    "ddp strategy by instance": (plain, lambda: {"strategy": SLoPeDDPStrategy(config=CONFIG)}, False),
    "config of a mapping": (plain, lambda: {"strategy": SLoPeDDPStrategy(config=CONFIG.to_dict())}, False),
    "slope by name, callback": (plain, {"strategy": "slope"}, True),
    "slope_ddp by name, callback": (plain, {"strategy": "slope_ddp"}, True),
    "base class": (lambda net: AsBase(net, slope=CONFIG), {}, False),
    "mixin": (lambda net: AsMixin(net, slope=CONFIG), {}, False),
    "slope by name, module's config": (lambda net: AsMixin(net, slope=CONFIG), {"strategy": "slope"}, False),
    "slope_ddp by name, module's config": (lambda net: AsMixin(net, slope=CONFIG), {"strategy": "slope_ddp"}, False),
}


def run(tmp_path, net, way):
    make, settings, callback = WAYS[way]
    settings = settings() if callable(settings) else settings
    module = make(net)
    trainer = make_trainer(tmp_path, *([SLoPeCallback(CONFIG)] if callback else []), **settings)
    trainer.fit(module)
    found = [c for c in trainer.callbacks if isinstance(c, SLoPeCallback)]
    assert len(found) == 1
    return SimpleNamespace(state=snapshot(module), losses=module.losses, callback=found[0], trainer=trainer)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run by hand: strategy auto and a callback."""
    made = {}

    def get(make):
        if make not in made:
            made[make] = run(tmp_path_factory.mktemp("reference"), make(), "callback, auto")
        return made[make]

    return get


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_every_way_trains_the_same_hugging_face_bert(tmp_path, reference, way):
    want, got = reference(hf_bert), run(tmp_path, hf_bert(), way)
    assert want.callback.woke_at_step == 12
    assert want.callback.resetups == 3
    assert got.losses == want.losses
    assert_same(got.state, want.state)
    assert_same(got.callback.state_dict(), want.callback.state_dict())


@pytest.mark.parametrize("way", ["callback, ddp", "ddp strategy by instance", "mixin"])
def test_every_way_trains_the_same_gpt2_with_conv1d(tmp_path, reference, way):
    want, got = reference(hf_gpt2), run(tmp_path, hf_gpt2(), way)
    assert sum(name.endswith(".values") for name in want.state) == 7, "four a layer, without the first c_attn"
    assert_same(got.state, want.state)


@pytest.mark.parametrize("name", ["slope", "slope_ddp"])
def test_strategy_name_alone_trains_with_the_default_config(tmp_path, name):
    module = Toy()
    trainer = make_trainer(tmp_path, strategy=name)
    trainer.fit(module)
    assert {layer.config for layer in sparse_layers(module).values()} == {SLoPeConfig()}
    assert isinstance(trainer.callbacks[0], SLoPeCallback)


def test_conversion_changes_the_run(tmp_path, reference):
    """Otherwise every comparison above could be one of dense runs."""
    dense = Toy(hf_bert())
    make_trainer(tmp_path).fit(dense)
    assert dense.losses != reference(hf_bert).losses
    asleep = Toy(hf_bert())
    fit(tmp_path, asleep, config=SLoPeConfig(backward_refresh_steps=5))
    assert asleep.losses[:13] == reference(hf_bert).losses[:13]
    assert asleep.losses[13:] != reference(hf_bert).losses[13:], "awake adapters must matter"


# ---------------------------------------------------------------------------------------------------- refusals


def test_slope_on_two_devices_names_the_other_strategy(tmp_path):
    with pytest.raises(ConfigError, match="slope_ddp"):
        make_trainer(tmp_path, strategy="slope", devices=2)


def test_strategy_and_callback_with_different_configs(tmp_path):
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), strategy=SLoPeSingleDeviceStrategy(config=SLoPeConfig()))
    with pytest.raises(ConfigError, match="differ"):
        trainer.fit(Toy())


def test_strategy_and_module_with_different_configs(tmp_path):
    trainer = make_trainer(tmp_path, strategy=SLoPeSingleDeviceStrategy(config=SLoPeConfig()))
    with pytest.raises(ConversionError, match="adapter_rank"):
        trainer.fit(AsMixin(slope=CONFIG))


def test_a_module_that_says_it_is_dense_is_not_made_sparse(tmp_path):
    with pytest.raises(
        ConfigError, match=r"AsMixin is dense \(slope=None\), and SLoPeSingleDeviceStrategy trains sparse"
    ):
        make_trainer(tmp_path, strategy="slope").fit(AsMixin(slope=None))
    module = AsMixin(slope=None)
    make_trainer(tmp_path, strategy=SLoPeSingleDeviceStrategy(config=CONFIG)).fit(module)  # asked for in so many words
    assert sparse_layers(module)


def test_callback_without_config_takes_the_strategys(tmp_path):
    callback = SLoPeCallback()
    make_trainer(tmp_path, callback, strategy=SLoPeSingleDeviceStrategy(config=CONFIG)).fit(Toy())
    assert callback.config == CONFIG


def test_strategies_that_are_not_known_to_be_right_are_refused_by_name():
    with pytest.raises(ScheduleError, match=r"FSDPStrategy.*slope_fsdp2"):  # FSDP1
        check_strategy(FSDPStrategy.__new__(FSDPStrategy))
    with pytest.raises(ScheduleError, match="tensor_parallel_size=2"):
        check_strategy(SLoPeModelParallelStrategy(tensor_parallel_size=2))
    check_strategy(SLoPeDeepSpeedStrategy(stage=2))


def test_refusal_comes_from_fit(tmp_path):
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG))
    trainer.strategy.__class__ = type("FSDPStrategy", (pl.strategies.Strategy,), dict(vars(type(trainer.strategy))))
    with pytest.raises(ScheduleError, match="FSDPStrategy is not supported"):
        trainer.fit(Toy())


# ---------------------------------------------------------------------------------------------------- where nets are made


class LateNet(Toy):
    """Builds its net in configure_model, as models too large for one device do."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net()


def test_net_of_configure_model_trains_as_one_of_init(tmp_path):
    late, _ = fit(tmp_path, LateNet())
    early, _ = fit(tmp_path, Toy())
    assert_same(late.state_dict(), early.state_dict())


def test_configure_model_may_rely_on_setup(tmp_path):
    class Module(LateNet):
        def setup(self, stage):
            self.seed = 3

        def configure_model(self):
            if self.net is None:
                self.net = Net(self.seed)

    module, _ = fit(tmp_path, Module())
    assert sparse_layers(module)


def test_bf16_true_and_configure_model_give_bf16_values(tmp_path):
    module, _ = fit(tmp_path, LateNet(), precision="bf16-true", max_steps=1, config=SLoPeConfig())
    assert {layer.values.dtype for layer in sparse_layers(module).values()} == {torch.bfloat16}


def test_a_failed_run_leaves_the_module_its_own_configure_model(tmp_path):
    class Module(Toy):
        def setup(self, stage):
            self.ready = True

        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    module = Module()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module)
    assert "configure_model" not in vars(module)


def test_fsdp2_builds_on_the_ranks_own_device(monkeypatch):
    """Lightning's builds on the CPU, where choosing the masks of a large model takes minutes."""
    strategy = SLoPeModelParallelStrategy()
    monkeypatch.setattr(SLoPeModelParallelStrategy, "root_device", torch.device("meta"))
    with strategy.tensor_init_context():
        assert nn.Linear(8, 8).weight.is_meta
        with torch.device("cpu"):
            assert not nn.Linear(8, 8).weight.is_meta, "a device that the user names wins"


class Unbuilt(SLoPeLightningModule, Toy):
    """A part of its net is left for Lightning to build, by reset_parameters."""

    def __init__(self, slope):
        super().__init__(slope=slope)
        self.net.first = nn.Linear(16, 16, device="meta")


@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_fsdp2_says_what_the_meta_device_loses(tmp_path):
    def fit_unbuilt(slope):
        strategy = SLoPeModelParallelStrategy() if slope else ModelParallelStrategy(1, 1)
        make_trainer(tmp_path, strategy=strategy, max_steps=1).fit(Unbuilt(slope))

    for slope in (SLoPeConfig(), None):
        with pytest.warns(
            UserWarning, match=r"2 parameters \(net.first.weight, ...\) .* is lost, unless a checkpoint is"
        ):
            fit_unbuilt(slope)


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")  # torch.compile imports it
@pytest.mark.parametrize("way", ["eager", "module.compile()", "torch.compile(part)", "torch.compile(module)"])
def test_zero_3_leaves_torchs_linear_to_what_is_compiled(monkeypatch, way):
    """torch 2.11 makes zeros of the gradients of DeepSpeed's; tests/distributed/test_compiled.py has the recipes."""
    own, module = F.linear, Toy()
    monkeypatch.setattr(deepspeed, "_LOSES_GRADIENTS", True)
    monkeypatch.setattr(deepspeed, "torchs_own_linear", lambda: own)
    monkeypatch.setattr(F, "linear", replacement := lambda *args: own(*args))
    strategy = SLoPeDeepSpeedStrategy(stage=3)
    if way == "module.compile()":
        module.net.blocks[1].compile()
    elif way == "torch.compile(part)":
        module.net.blocks[1] = torch.compile(module.net.blocks[1])
    elif way == "torch.compile(module)":
        module = from_compiled(torch.compile(module))  # what a Trainer makes of it
    deepspeed.keep_torchs_linear(strategy, module)
    compiled = way != "eager"
    assert (strategy.config["zero_optimization"].get("memory_efficient_linear") is False) is compiled
    assert F.linear is (own if compiled else replacement)
    second = SLoPeDeepSpeedStrategy(stage=2)
    deepspeed.keep_torchs_linear(second, module)
    assert "memory_efficient_linear" not in second.config["zero_optimization"]
    strategy.config["zero_optimization"]["memory_efficient_linear"] = True
    if compiled:
        with pytest.raises(ConfigError, match="memory_efficient_linear=True in DeepSpeed's config"):
            deepspeed.keep_torchs_linear(strategy, module)
    monkeypatch.setattr(deepspeed, "_LOSES_GRADIENTS", False)
    deepspeed.keep_torchs_linear(strategy, module)
    assert strategy.config["zero_optimization"]["memory_efficient_linear"] is True


def test_deepspeeds_own_config_has_a_name_of_its_own(tmp_path):
    own = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "train_micro_batch_size_per_gpu": 2}
    (file := tmp_path / "ds.json").write_text(json.dumps(own))
    for given in (own, file, str(file)):
        strategy = SLoPeDeepSpeedStrategy(config={"backward_refresh_steps": 7}, deepspeed_config=given)
        assert strategy.config == own
        assert strategy.zero_stage_3
        assert strategy.slope_config == SLoPeConfig(backward_refresh_steps=7)
        check_strategy(strategy)
        with pytest.raises(ConfigError, match="is DeepSpeed's: give it as deepspeed_config"):
            SLoPeDeepSpeedStrategy(config=given)


@pytest.mark.filterwarnings("ignore:.*args parameter is intended to run from within Python:UserWarning")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_offload_passes_through_yaml(tmp_path):
    """As a recipe's config gives it: Lightning's settings, and those of the sparse method beside them."""
    (tmp_path / "it.yaml").write_text(
        "trainer:\n  accelerator: cpu\n  strategy:\n    class_path: slope_pl.SLoPeDeepSpeedStrategy\n    init_args:\n"
        "      stage: 3\n      offload_optimizer: true\n      offload_parameters: true\n"
        "      config:\n        backward_refresh_steps: 7\n"
    )
    arguments = ["--config", str(tmp_path / "it.yaml")]
    cli = LightningCLI(Toy, run=False, args=arguments, save_config_callback=None, seed_everything_default=0)
    strategy = cli.trainer.strategy
    zero = strategy.config["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (3, "cpu", "cpu")
    assert strategy.slope_config == SLoPeConfig(backward_refresh_steps=7)
