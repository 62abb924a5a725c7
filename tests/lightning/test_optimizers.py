"""Every kind of optimizer on values of half the size, and on adapters that sleep until they wake."""

import copy

import pytest
import torch
from torch import nn

from slope_pl import ScheduleError, SLoPeCallback, SLoPeConfig, SparseLinear
from slope_pl.lightning.optimizers import optimizer_notes, refuse_flattened
from slope_pl.optim import Lamb
from slope_pl.sparsity import compress
from tests.lightning.toy import CONFIG, QUIET, Recorder, Toy, make_trainer

pytestmark = QUIET
optim = torch.optim

# Name -> of parameters; those that treat every entry by itself, or need but a tensor's norm.
ENTRYWISE = {
    "AdamW, a loop": lambda p: optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=False, fused=False),
    "AdamW, foreach": lambda p: optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "Adam, amsgrad": lambda p: optim.Adam(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: optim.SGD(p, 0.1),
    "SGD, momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, fused": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "NAdam": lambda p: optim.NAdam(p, 1e-2, weight_decay=0.1),
    "RAdam": lambda p: optim.RAdam(p, 1e-2, weight_decay=0.1),
    "Adamax": lambda p: optim.Adamax(p, 1e-2, weight_decay=0.1),
    "Adagrad": lambda p: optim.Adagrad(p, 1e-2, weight_decay=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0, weight_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, 1e-2, weight_decay=0.1, momentum=0.9),
    "ASGD": lambda p: optim.ASGD(p, 0.1, weight_decay=0.1),
    "Rprop": lambda p: optim.Rprop(p, 1e-2),
    "Lamb": lambda p: Lamb(p, 1e-2, weight_decay=0.1),
}
BY_SHAPE = {
    "Muon": lambda p: optim.Muon(p, 1e-2, weight_decay=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, 1e-2, weight_decay=0.1),
}


def trained(make, tensor, gradients):
    """A parameter after a step with each gradient."""
    parameter = nn.Parameter(tensor.clone())
    optimizer = make([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def both_ways(make):
    """Values trained as they are, and as the kept entries of a dense weight whose pruned ones are zeros without gradient."""
    layer = SparseLinear(32, 16)
    gradients = [torch.randn(16, 32) * layer.forward_mask() for _ in range(6)]
    dense = trained(make, layer.dense_weight(), gradients)
    values = trained(make, layer.values.detach(), [compress(gradient, layer.indices) for gradient in gradients])
    return values, dense, layer


@pytest.mark.parametrize("name", ENTRYWISE)
def test_values_train_as_the_kept_entries_of_a_dense_weight(name):
    values, dense, layer = both_ways(ENTRYWISE[name])
    torch.testing.assert_close(values, compress(dense, layer.indices), rtol=1e-5, atol=1e-7)
    assert not dense[~layer.forward_mask()].any()


@pytest.mark.parametrize("name", BY_SHAPE)
def test_optimizers_that_look_at_rows_and_columns_do_not(name):
    values, dense, layer = both_ways(BY_SHAPE[name])
    assert values.isfinite().all()
    assert (values - compress(dense, layer.indices)).abs().max() > 1e-4


class Two(Toy):
    """Matrices by one optimizer and the rest by AdamW, stepped by hand."""

    def __init__(self, make):
        super().__init__()
        self.make, self.automatic_optimization = make, False

    def configure_optimizers(self):
        matrices = [p for p in self.net.blocks.parameters() if p.ndim == 2]
        held = {id(p) for p in matrices}
        return [self.make(matrices), optim.AdamW([p for p in self.parameters() if id(p) not in held], lr=1e-2)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def run(tmp_path, module, wake=12):
    recorder, config = Recorder(), SLoPeConfig(backward_refresh_steps=5, adapter_rank=4, adapter_start_step=wake)
    trainer = make_trainer(tmp_path, SLoPeCallback(config), recorder, max_steps=wake + 4)
    trainer.fit(module)
    return recorder


def assert_adapters_sleep_until(recorder, wake, module):
    assert min(recorder.changes("adapter_down"), default=wake + 1) > wake
    assert min(recorder.changes("adapter_up"), default=wake + 1) > wake
    last = module.state_dict()
    assert all(last[f"net.blocks.{i}.adapter_up"].any() for i in range(3)), "adapters must train"
    assert all(tensor.isfinite().all() for tensor in last.values())


@pytest.mark.parametrize("name", [*(name for name in ENTRYWISE if name != "SGD, fused"), "Adafactor"])
def test_sleeping_adapters_stay_as_they_are(tmp_path, name):
    """In one group with everything else, which decays."""
    module = Toy()
    module.configure_optimizers = lambda: {**ENTRYWISE, **BY_SHAPE}[name](module.parameters())
    assert_adapters_sleep_until(run(tmp_path, module), 12, module)


def test_muon_beside_adamw(tmp_path, capsys):
    """global_step counts both, so the wake at 12 comes after six batches."""
    module = Two(BY_SHAPE["Muon"])
    assert_adapters_sleep_until(run(tmp_path, module), 12, module)
    printed = capsys.readouterr().out
    assert (
        "SLoPe: Muon trains the values of sparse layers and orthogonalises them as matrices (d_out, d_in / 2)"
        in printed
    )
    assert "AdamW trains" not in printed


class FusedAdam(optim.AdamW):
    """DeepSpeed's by name: its own constructor compiles a kernel for GPUs."""


FusedAdam.__module__ = "deepspeed.ops.adam.fused_adam"


STARTS_TOGETHER = {"FusedAdam counts": lambda p: FusedAdam(p, lr=1e-2), "SGD with fused=True": ENTRYWISE["SGD, fused"]}


def with_groups(make, own_group):
    module = Toy()

    def configure_optimizers():
        adapters = [p for name, p in module.named_parameters() if "adapter_" in name]
        others = [p for name, p in module.named_parameters() if "adapter_" not in name]
        return make([{"params": others}, {"params": adapters}] if own_group else [{"params": others + adapters}])

    module.configure_optimizers = configure_optimizers
    return module


@pytest.mark.parametrize("says", STARTS_TOGETHER)
def test_groups_that_have_to_begin_together(tmp_path, says):
    """Fused SGD of torch 2.13 fails at the first step of an adapter, deep in its kernel's arguments."""
    with pytest.raises(ScheduleError, match=rf"{says} .*\.adapter_down shares group 0 .* a group of their own"):
        run(tmp_path, with_groups(STARTS_TOGETHER[says], own_group=False))
    module = with_groups(STARTS_TOGETHER[says], own_group=True)
    assert_adapters_sleep_until(run(tmp_path, module), 12, module)


def test_without_adapters_nothing_has_to_be_apart(tmp_path):
    module = with_groups(ENTRYWISE["SGD, fused"], own_group=False)
    make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=3).fit(module)
    assert optimizer_notes([module.configure_optimizers()], {}) == []


@pytest.mark.parametrize(("make", "name"), [(ENTRYWISE["Lamb"], "Lamb"), (BY_SHAPE["Muon"], "Muon")])
def test_zero_flattens_what_they_need_whole(make, name):
    with pytest.raises(ScheduleError, match=f"{name} under DeepSpeed: ZeRO flattens .* Use AdamW, or strategy"):
        refuse_flattened(make([nn.Parameter(torch.zeros(4, 4))]))
    refuse_flattened(ENTRYWISE["AdamW, fused"]([nn.Parameter(torch.zeros(4, 4))]))


def test_fused_and_looped_adamw_are_one_run(tmp_path):
    def losses(name):
        module = Toy()
        module.configure_optimizers = lambda: ENTRYWISE[name](module.parameters())
        make_trainer(tmp_path, SLoPeCallback(copy.copy(CONFIG))).fit(module)
        return module.losses

    assert losses("AdamW, fused") == pytest.approx(losses("AdamW, a loop"), rel=1e-4)
