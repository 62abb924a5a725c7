"""Every precision of Lightning: at each step, loss and gradient are those of dense masked products of the stored weights."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision

from slope_pl import SLoPeCallback, sparse_layers
from tests.lightning.toy import CONFIG, QUIET, Toy, make_trainer
from tests.parity.dense_slope import Product
from tests.unit.reference import mask_of, spread

pytestmark = QUIET

# precision: dtype of the weights, of the products, tolerance of the comparison with the same products done densely
PRECISIONS = {
    "64-true": (torch.float64, torch.float64, 1e-12),
    "32-true": (torch.float32, torch.float32, 1e-5),
    "bf16-true": (torch.bfloat16, torch.bfloat16, 0.05),
    "bf16-mixed": (torch.float32, torch.bfloat16, 0.02),
    "16-mixed": (torch.float32, torch.float16, 0.01),
}


def precision_settings(precision):
    if precision == "16-mixed":  # by name it would become bf16-mixed on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    return {"precision": precision}


def dense_loss(net, batch):
    """The same net in dense matrices, differentiable in the first layer, where every input gradient adds up."""
    first = net.first.weight.detach().clone().requires_grad_()
    x = F.gelu(F.linear(batch["x"].to(first.dtype), first, net.first.bias))
    for layer in net.blocks:
        weight, mask = spread(layer.values.detach(), layer.indices), mask_of(layer.indices)
        backward = mask_of(layer.backward_indices).t() & mask
        if torch.is_autocast_enabled("cpu"):
            x, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight))
        y = Product.apply(x, weight, mask, backward) + layer.bias.to(x.dtype)
        if layer.adapter_active:
            y = y + F.linear(F.linear(x, layer.adapter_down) / 4, layer.adapter_up)
        x = F.gelu(y)
    return F.cross_entropy(net.head(x), batch["label"]), first


class Checked(Toy):
    """Computes every loss a second time in dense matrices and keeps both first-layer gradients."""

    def __init__(self):
        super().__init__(lr=0.02)
        self.gradients, self.dense, self.dtypes = [], [], set()

    def training_step(self, batch, batch_idx):
        self.net.head.register_forward_pre_hook(lambda _, args: self.dtypes.add(args[0].dtype))
        want, first = dense_loss(self.net, batch)
        self.dense.append((want.item(), torch.autograd.grad(want, first)[0]))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.net.first.weight.grad.clone())  # unscaled by now


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_step_is_the_dense_masked_one(tmp_path, precision):
    stored, computed, tolerance = PRECISIONS[precision]
    module, callback = Checked(), SLoPeCallback(CONFIG)
    make_trainer(tmp_path, callback, **precision_settings(precision)).fit(module)
    assert (callback.resetups, callback.woke_at_step) == (3, 12)
    assert {layer.values.dtype for layer in sparse_layers(module).values()} == {stored}
    assert {layer.adapter_up.dtype for layer in sparse_layers(module).values()} == {stored}
    assert module.dtypes == {computed}
    assert len(module.gradients) == 20
    for step, (got, (loss, want)) in enumerate(zip(module.gradients, module.dense, strict=True)):
        assert module.losses[step] == pytest.approx(loss, rel=tolerance), step
        assert relative(got.double(), want.double()) < tolerance, step
    assert module.losses[-1] < module.losses[0]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
def test_low_precision_follows_float64(tmp_path, precision):
    low, high = Toy(), Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), **precision_settings(precision)).fit(low)
    make_trainer(tmp_path, SLoPeCallback(CONFIG), precision="64-true").fit(high)
    assert low.losses != high.losses
    assert low.losses == pytest.approx(high.losses, rel=0.05)


def test_fp16_overflow_skips_the_update_and_the_run_goes_on(tmp_path):
    """A scale that overflows: the step counts, the weights stay, the operands stay right."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module = Checked()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), plugins=[plugin], max_steps=40)
    trainer.fit(module)
    assert scaler.get_scale() < 2.0**30, "overflows must have happened"
    assert module.losses[0] != module.losses[-1]
    for loss, (want, _) in zip(module.losses, module.dense, strict=True):
        assert loss == pytest.approx(want, rel=0.01)


class Clipped(Toy):
    """Notes gradients before and after Lightning's own clipping."""

    def __init__(self):
        super().__init__()
        self.before, self.after, self.dense_norms = [], [], []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        grads = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        indices = {f"net.blocks.{i}.values": layer.indices for i, layer in enumerate(self.net.blocks)}
        dense = [spread(g, indices[n]) if n in indices else g for n, g in grads.items()]
        self.dense_norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in dense])).item())
        self.before.append({n: g.clone() for n, g in grads.items()})
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.after.append({n: g.clone() for n, g in grads.items()})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_clipping_by_norm_is_that_of_the_dense_gradient_with_zeros(tmp_path, precision):
    limit, module = 0.05, Clipped()
    settings = precision_settings(precision)
    make_trainer(tmp_path, SLoPeCallback(CONFIG), gradient_clip_val=limit, **settings).fit(module)
    assert min(module.dense_norms) > limit
    for norm, before, after in zip(module.dense_norms, module.before, module.after, strict=True):
        scaled = {name: grad * limit / (norm + 1e-6) for name, grad in before.items()}
        torch.testing.assert_close(after, scaled, rtol=1e-4, atol=1e-9)
    assert set(module.after[-1]) - set(module.after[0]) == {
        f"net.blocks.{i}.adapter_{x}" for i in range(3) for x in ("down", "up")
    }


def test_state_keeps_its_dtypes(tmp_path):
    """Bytes stay bytes whatever the parameters are cast to."""

    class Spy(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.dtypes = {n.rpartition(".")[2]: t.dtype for n, t in pl_module.state_dict().items() if "blocks" in n}

    for precision in ("64-true", "bf16-true"):
        spy = Spy()
        make_trainer(tmp_path, SLoPeCallback(CONFIG), spy, precision=precision, max_steps=13).fit(Toy())
        assert {k: v for k, v in spy.dtypes.items() if v == torch.uint8}.keys() == {
            "indices",
            "backward_indices",
            "adapter_active",
        }
