"""The baselines on any model, precision and compiler."""

import pytest
import torch
from torch import nn

from slope_pl import ConversionError
from slope_pl.baselines import (
    FSTConfig,
    SRSTEConfig,
    masked_layers,
    mvue_two_of_four,
    unmask_layers,
)
from tests.lightning.baseline_runs import ALL, FST, SRSTE, fit, saver
from tests.lightning.toy import QUIET, Net, Toy, assert_same, hf_bert, hf_gpt2

pytestmark = QUIET


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


def test_streams_prune_differently():
    x, seed = torch.randn(16, 4), torch.tensor(5)
    assert not torch.equal(mvue_two_of_four(x, seed, 0) != 0, mvue_two_of_four(x, seed, 1) != 0)


def test_loss_falls(tmp_path):
    for config in ALL.values():
        losses = fit(tmp_path, config, max_steps=100).module.losses
        assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
