"""What the baselines refuse, and how they are made from mappings and YAML."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn

from slope_pl import ConfigError, ConversionError, ScheduleError, SLoPeCallback, SLoPeConfig
from slope_pl.baselines import (
    FSTCallback,
    FSTConfig,
    SRSTECallback,
    SRSTEConfig,
)
from slope_pl.baselines.checks import check_scaling
from tests.lightning.baseline_runs import FST, SRSTE, fit
from tests.lightning.toy import QUIET, Toy, make_trainer

pytestmark = QUIET


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
