"""Training through the package equals, step by step, a loop in dense masked matrices that shares no code with it."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from slope_pl import SLoPeCallback, SLoPeConfig, SparseLinear
from slope_pl.models import BertConfig, BertForQuestionAnswering
from tests.lightning.toy import QUIET, make_trainer
from tests.parity.dense_slope import MaskedLinear, best_tiles, two_of_four
from tests.unit.reference import mask_of, spread

pytestmark = QUIET

STEPS, REFRESH, WAKE, RANK, CLIP = 150, 20, 120, 4, 0.1
BERT = BertConfig(
    vocab_size=24,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=8,
    initializer_range=0.2,
)
# Both sides add up the same float64 products in another order: some 1e-15 a step, which the optimizer amplifies to about
# 1e-12 in 150 steps. A wrong column, scale or step shows at 1e-4 and more.
RTOL, ATOL = 1e-9, 1e-10


def make_net():
    torch.manual_seed(0)
    return BertForQuestionAnswering(BERT).double()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "ids": torch.randint(1, BERT.vocab_size, (4, 8), generator=generator),
            "spans": torch.randint(0, 8, (2, 4), generator=generator),
        }
        for _ in range(count)
    ]


def loss_of(net, batch):
    start, end = net(batch["ids"])
    return F.cross_entropy(start, batch["spans"][0]) + F.cross_entropy(end, batch["spans"][1])


def make_optimizer(net):
    # Some biases cannot change the loss (softmax), so their gradient is rounding; eps keeps Adam from normalising it.
    return torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1, eps=1e-6)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = make_net(), []

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return make_optimizer(self.net)


class Initial(pl.Callback):
    """Copies what no loop could know: the adapters that were drawn, and a random mask."""

    def on_fit_start(self, trainer, pl_module):
        layers = {name: m for name, m in pl_module.net.named_modules() if isinstance(m, SparseLinear)}
        self.down = {name: layer.adapter_down.detach().clone() for name, layer in layers.items()}
        self.mask = {name: mask_of(layer.indices) for name, layer in layers.items()}
        assert all(not layer.adapter_up.any() for layer in layers.values())


def sparse_run(tmp_path, mask, accumulate=1):
    config = SLoPeConfig(mask=mask, backward_refresh_steps=REFRESH, adapter_rank=RANK, adapter_start=WAKE / STEPS)
    module, initial = Module(), Initial()
    trainer = make_trainer(
        tmp_path,
        SLoPeCallback(config),
        initial,
        max_steps=STEPS,
        gradient_clip_val=CLIP,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, DataLoader(batches(STEPS * accumulate), batch_size=None))
    return SimpleNamespace(net=module.net, losses=module.losses, initial=initial)


SPARSE_NAMES = {
    *(f"bert.encoder.layer.1.attention.self.{x}" for x in ("query", "key", "value")),
    *(f"bert.encoder.layer.{i}.{x}.dense" for i in (0, 1) for x in ("attention.output", "intermediate", "output")),
}


def dense_run(mask, initial, accumulate=1, exact=False):
    net, layers = make_net(), {}
    for name in SPARSE_NAMES:
        old = net.get_submodule(name)
        chosen = {"magnitude": lambda w: two_of_four(w.abs()), "transposable": best_tiles}.get(mask)
        keep = initial.mask[name] if chosen is None else chosen(old.weight.detach())
        layers[name] = MaskedLinear(old, keep, initial.down[name], exact)
        net.set_submodule(name, layers[name])
        if mask != "transposable":
            layers[name].pick()
    at_start = {name: layer.changed for name, layer in layers.items()}
    optimizer, losses, clipped = make_optimizer(net), [], 0
    stream = iter(batches(STEPS * accumulate))
    for step in range(STEPS):
        if mask != "transposable" and step and step % REFRESH == 0:
            for layer in layers.values():
                layer.pick()
        if step == WAKE:
            for layer in layers.values():
                layer.wake()
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss = loss_of(net, next(stream))
            losses.append(loss.item())
            (loss / accumulate).backward()
        for layer in layers.values():
            layer.project()
        clipped += torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP).item() > CLIP
        optimizer.step()
    changed = sum(layer.changed - at_start[name] for name, layer in layers.items())
    return SimpleNamespace(net=net, losses=losses, layers=layers, changed=changed, clipped=clipped)


def assert_equal_runs(sparse, dense):
    got, want = (torch.tensor(run.losses, dtype=torch.float64) for run in (sparse, dense))
    torch.testing.assert_close(got, want, rtol=RTOL, atol=0)
    found = {name: m for name, m in sparse.net.named_modules() if isinstance(m, SparseLinear)}
    assert set(found) == SPARSE_NAMES
    for name, layer in found.items():
        want = dense.layers[name]
        got = {"weight": spread(layer.values.detach(), layer.indices), "bias": layer.bias}
        got |= {"down": layer.adapter_down, "up": layer.adapter_up}
        for part, tensor in got.items():
            torch.testing.assert_close(
                tensor, getattr(want, part), rtol=RTOL, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert want.up.abs().max() > 1e-3, "the adapters did not train, the comparison shows nothing"
    rest = [name for name, _ in sparse.net.named_parameters() if name.rpartition(".")[0] not in SPARSE_NAMES]
    for name in rest:
        got, want = sparse.net.get_parameter(name), dense.net.get_parameter(name)
        torch.testing.assert_close(got, want, rtol=RTOL, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("mask", "accumulate"), [("magnitude", 1), ("magnitude", 2), ("random", 1), ("transposable", 1)]
)
def test_every_loss_and_weight_equals_the_dense_masked_loop(tmp_path, mask, accumulate):
    sparse = sparse_run(tmp_path, mask, accumulate)
    dense = dense_run(mask, sparse.initial, accumulate)
    assert dense.clipped > STEPS // 5, "clipping must be at work"
    assert (dense.changed > 50) == (mask != "transposable"), "re-setups must have something to do"
    assert_equal_runs(sparse, dense)


def test_transposable_training_is_plain_dense_training_with_projected_gradients(tmp_path):
    sparse = sparse_run(tmp_path, "transposable")
    assert_equal_runs(sparse, dense_run("transposable", sparse.initial, exact=True))
