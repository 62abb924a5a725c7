"""The masked decay: once a step, before or after clipping, with manual optimization too."""

import pytest
import torch

from slope_pl import ScheduleError
from slope_pl.baselines import (
    FSTConfig,
    SRSTEConfig,
)
from tests.lightning.baseline_runs import BLOCKS, FST, SRSTE, fit
from tests.lightning.toy import QUIET, Manual, Toy, assert_same

pytestmark = QUIET


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


class ByHand(Manual):
    def __init__(self, optimizers=1):
        super().__init__()
        self.count = optimizers

    def configure_optimizers(self):
        if self.count == 1:
            return super().configure_optimizers()
        named = list(self.named_parameters())
        halves = ([p for n, p in named if "blocks" not in n], [p for n, p in named if "blocks" in n])
        return [torch.optim.AdamW(half, lr=self.lr, weight_decay=0.1) for half in halves]


@pytest.mark.parametrize("config", [SRSTE, FST], ids=["srste", "fst"])
def test_manual_optimization_trains_the_same(tmp_path, config):
    manual, automatic = fit(tmp_path, config, ByHand()), fit(tmp_path, config)
    assert manual.module.losses == automatic.module.losses
    assert_same(manual.module.state_dict(), automatic.module.state_dict())


def test_two_optimizers_add_up_to_the_same_run(tmp_path):
    doubled = FSTConfig(targets=BLOCKS, decay=0.01, mask_refresh_steps=10, dense_finish_step=28)
    two, one = fit(tmp_path, doubled, ByHand(2), max_steps=40), fit(tmp_path, FST)
    assert two.module.losses == one.module.losses
    assert_same(two.module.state_dict(), one.module.state_dict())


def test_two_optimizers_and_epochs_alone_are_an_error(tmp_path):
    with pytest.raises(ScheduleError, match="dense_finish_fraction is no mark"):
        fit(tmp_path, FSTConfig(targets=BLOCKS), ByHand(2), max_steps=-1, max_epochs=4)
