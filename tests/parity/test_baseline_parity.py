"""The baselines in a Trainer equal, loss by loss and weight by weight, plain loops that share no code with them."""

import itertools
import zlib
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from slope_pl.baselines import FSTCallback, FSTConfig, MaskedLinear, SRSTECallback, SRSTEConfig
from tests.lightning.toy import QUIET, make_trainer
from tests.parity.dense_slope import best_tiles, two_of_four
from tests.parity.test_training_parity import SPARSE_NAMES, Module, batches, loss_of, make_net, make_optimizer

pytestmark = QUIET

STEPS, RANK, CLIP = 40, 4, 0.1
FEED_FORWARD = {f"bert.encoder.layer.{i}.{x}.dense" for i in (0, 1) for x in ("intermediate", "output")}
# As in test_training_parity: float64 sums in another order, amplified by the optimizer.
RTOL, ATOL = 1e-9, 1e-10


# ---------------------------------------------------------------------------------------------------- the plain loop


class Rule(torch.autograd.Function):
    """y = x V^T with the gradients given as functions of the output gradient."""

    @staticmethod
    def forward(ctx, x, weight, masked, input_gradient, weight_gradient):
        ctx.rules, ctx.x = (input_gradient, weight_gradient), x.detach()
        return x @ masked.t()

    @staticmethod
    def backward(ctx, dy):
        return ctx.rules[0](dy), ctx.rules[1](dy, ctx.x), None, None, None


class PlainLayer(nn.Module):
    """A dense weight, a mask that the loop sets, adapters that the loop wakes."""

    def __init__(self, name, linear, rule, down=None):
        super().__init__()
        self.name, self.rule = name, rule
        self.weight, self.bias, self.down = linear.weight, linear.bias, None
        if down is not None:
            self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(down.new_zeros(len(self.weight), len(down)))
            self.down.requires_grad_(False)
            self.up.requires_grad_(False)
        self.awake, self.dense, self.micro_batch, self.flips = False, False, 0, 0
        self.mask = self.twice = torch.zeros_like(self.weight, dtype=torch.bool)

    def pick(self):
        old, weight = self.mask, self.weight.detach()
        if self.rule == "fst":
            self.mask = best_tiles(weight)
        else:
            self.mask = two_of_four(weight.abs())
            self.twice = two_of_four(torch.where(self.mask, weight.abs(), -1.0).t()).t() & self.mask
        self.flips += int((old != self.mask).sum())

    def forward(self, x):
        if self.dense:
            return nn.functional.linear(x, self.weight, self.bias)
        masked, micro_batch = (self.weight * self.mask).detach(), self.micro_batch

        def input_gradient(dy):
            if self.rule == "gradient":
                return (dy * two_of_four(dy.abs())) @ masked
            return dy @ (masked * self.twice if self.rule == "weight" else masked)

        def weight_gradient(dy, x):
            dy, x = dy.flatten(0, -2), x.flatten(0, -2)
            return (draw_pairs(dy, self.name, micro_batch) if self.mvue else dy).t() @ x

        y = Rule.apply(x, self.weight, masked, input_gradient, weight_gradient) + self.bias
        return y + x @ self.down.t() @ self.up.t() / len(self.down) if self.awake else y


def mix(x):
    """The published 32-bit hash, in wrapping arithmetic."""
    x = np.asarray(x, dtype=np.uint32)
    with np.errstate(over="ignore"):
        for _ in range(2):
            x = ((x >> np.uint32(16)) ^ x) * np.uint32(0x45D9F3B)
    return (x >> np.uint32(16)) ^ x


def draw_pairs(dy, name, micro_batch):
    """Two of every four tokens: by enumeration of ordered pairs, group by group."""
    tokens, width = dy.shape
    assert tokens % 4 == 0
    seed = zlib.crc32(f"0:{name}:{micro_batch}".encode())
    places = mix(np.arange(tokens // 4 * width))
    uniform = [(mix(places ^ mix(int(mix(seed)) + draw)) >> np.uint32(9)) / 2**23 for draw in (1, 2)]
    result = np.zeros((tokens, width))
    for group, column in itertools.product(range(tokens // 4), range(width)):
        four = dy[4 * group : 4 * group + 4, column].numpy()
        size = np.abs(four) / np.abs(four).max() + 2.0**-23
        chance = np.zeros(4)
        for i, j in itertools.permutations(range(4), 2):
            pair = size[i] / size.sum() * size[j] / (size.sum() - size[i])
            chance[i] += pair
            chance[j] += pair
        at = group * width + column
        first = int(np.searchsorted(size.cumsum(), uniform[0][at] * size.sum(), side="right"))
        rest = np.where(np.arange(4) == first, 0.0, size)
        second = int(np.searchsorted(rest.cumsum(), uniform[1][at] * rest.sum(), side="right"))
        for i in (first, second):
            result[4 * group + i, column] = four[i] / chance[i]
    return torch.from_numpy(result)


def plain_run(names, rule, every, decay, mark, downs=None, accumulate=1, steps=STEPS, mvue=False):
    net, layers = make_net(), {}
    for name in sorted(names):
        layers[name] = PlainLayer(f"net.{name}", net.get_submodule(name), rule, downs and downs[name])
        layers[name].mvue = mvue
        net.set_submodule(name, layers[name])
    optimizer, losses, clipped = make_optimizer(net), [], 0
    stream = iter(batches(steps * accumulate))
    for step in range(steps):
        for layer in layers.values():
            if step == mark:
                layer.awake, layer.dense = rule != "fst", rule == "fst"
                if layer.awake:
                    layer.down.requires_grad_()
                    layer.up.requires_grad_()
            if step % every == 0 and not layer.dense:
                layer.pick()
        if step == 0:
            for layer in layers.values():
                layer.flips = 0
        optimizer.zero_grad()
        for micro in range(accumulate):
            for layer in layers.values():
                layer.micro_batch = step * accumulate + micro + 1
            loss = loss_of(net, next(stream))
            losses.append(loss.item())
            (loss / accumulate).backward()
        if rule != "fst":
            add_decay(layers, decay)
        clipped += torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP).item() > CLIP
        if rule == "fst":
            add_decay(layers, decay)
        optimizer.step()
    return SimpleNamespace(net=net, layers=layers, losses=losses, clipped=clipped)


def add_decay(layers, decay):
    for layer in layers.values():
        if not layer.dense:
            hidden = torch.where(layer.mask, 0.0, layer.weight.detach())
            layer.weight.grad += decay * hidden


# ---------------------------------------------------------------------------------------------------- the comparison


class Downs(pl.Callback):
    """Copies the adapters that were drawn: no loop could know them."""

    def on_fit_start(self, trainer, pl_module):
        layers = {n: m for n, m in pl_module.net.named_modules() if isinstance(m, MaskedLinear)}
        self.of = {n: m.adapter_down.detach().clone() for n, m in layers.items() if m.adapter_rank}


def trainer_run(tmp_path, callback, accumulate=1, steps=STEPS):
    module, downs = Module(), Downs()
    settings = {"max_steps": steps, "gradient_clip_val": CLIP, "accumulate_grad_batches": accumulate}
    trainer = make_trainer(tmp_path, callback, downs, **settings)
    trainer.fit(module, DataLoader(batches(steps * accumulate), batch_size=None))
    return SimpleNamespace(net=module.net, losses=module.losses, downs=downs.of)


def assert_equal_runs(ours, plain, names):
    got, want = (torch.tensor(run.losses, dtype=torch.float64) for run in (ours, plain))
    torch.testing.assert_close(got, want, rtol=RTOL, atol=0)
    found = {name: m for name, m in ours.net.named_modules() if isinstance(m, MaskedLinear)}
    assert set(found) == names
    for name, parameter in plain.net.named_parameters():
        if name.rpartition(".")[2] in ("down", "up"):
            name = name.replace(".down", ".adapter_down").replace(".up", ".adapter_up")
        got = ours.net.get_parameter(name)
        torch.testing.assert_close(got, parameter, rtol=RTOL, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}")
    assert plain.clipped > STEPS // 5, "clipping must be at work"
    assert sum(layer.flips for layer in plain.layers.values()) > 50, "masks must move"


@pytest.mark.parametrize(
    ("pruning", "every", "accumulate"), [("weight", 1, 1), ("weight", 3, 2), ("none", 1, 1), ("gradient", 1, 1)]
)
def test_srste_equals_the_plain_loop(tmp_path, pruning, every, accumulate):
    config = SRSTEConfig(
        decay=0.02,
        mask_refresh_steps=every,
        backward_pruning=pruning,
        adapter_rank=RANK,
        adapter_fraction=0.25,
    )
    ours = trainer_run(tmp_path, SRSTECallback(config), accumulate)
    plain = plain_run(SPARSE_NAMES, pruning, every, 0.02, 30, ours.downs, accumulate)
    assert_equal_runs(ours, plain, SPARSE_NAMES)
    assert all(layer.up.abs().max() > 1e-3 for layer in plain.layers.values()), "the adapters must train"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fst_equals_the_plain_loop(tmp_path, accumulate):
    config = FSTConfig(decay=0.001, mask_refresh_steps=7, mvue=False, dense_finish_fraction=0.25)
    ours = trainer_run(tmp_path, FSTCallback(config), accumulate)
    plain = plain_run(FEED_FORWARD, "fst", 7, 0.001, 30, accumulate=accumulate)
    assert_equal_runs(ours, plain, FEED_FORWARD)


def test_fst_with_random_pruning_equals_the_plain_loop(tmp_path):
    config = FSTConfig(decay=0.001, mask_refresh_steps=4, dense_finish_fraction=0.2)
    ours = trainer_run(tmp_path, FSTCallback(config), accumulate=2, steps=20)
    plain = plain_run(FEED_FORWARD, "fst", 4, 0.001, 16, accumulate=2, steps=20, mvue=True)
    assert_equal_runs(ours, plain, FEED_FORWARD)
