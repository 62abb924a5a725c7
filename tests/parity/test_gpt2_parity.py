"""The GPT-2 recipe by every method equals, loss by loss and weight by weight, a loop over transformers' GPT-2.

Layers of the loop are the dense masked ones of the other parity tests; optimizer groups, schedule and clipping are written
down a second time. Targets are the shifted tokens.
"""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader

from recipes.gpt2.module import GPT2Pretraining
from slope_pl import SLoPeConfig
from slope_pl.baselines import FSTConfig, SRSTEConfig, masked_layers
from slope_pl.models import GPT2, GPT2Config, save_gpt2
from slope_pl.nn import sparse_layers
from tests.lightning.toy import QUIET
from tests.parity.dense_slope import MaskedLinear, best_tiles, two_of_four
from tests.parity.test_baseline_parity import PlainLayer, add_decay
from tests.unit.reference import mask_of, spread

pytestmark = QUIET

STEPS, WARMUP, REFRESH, MARK, RANK, CLIP, RATE = 24, 4, 5, 18, 4, 0.5, 1e-2
MINI = {
    "vocab_size": 96,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "initializer_range": 0.1,
} | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
BLOCK = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SPARSE = {f"h.{i}.{part}" for i in (0, 1) for part in BLOCK} - {"h.0.attn.c_attn"}
FEED_FORWARD = {name for name in SPARSE if "mlp" in name}
# The loss is taken in float32 on both sides: a sum that rounds the other way is 1e-7, a wrong column or step 1e-3 and more.
RTOL, ATOL = 1e-5, 1e-6

MASKS = {"*.mlp.c_fc": "transposable", "*.mlp.*": "random"}
ADAPTERS = {"adapter_rank": RANK, "adapter_start": MARK / STEPS, "backward_refresh_steps": REFRESH}
SLOPE = {
    "magnitude": SLoPeConfig(**ADAPTERS),
    "random": SLoPeConfig(mask="random", **ADAPTERS),
    "transposable": SLoPeConfig(mask="transposable", **ADAPTERS),
    "by layer": SLoPeConfig(layer_masks=MASKS, **ADAPTERS),
}
LEVERS = {"values_learning_rate_scale": 2.0, "values_weight_decay": 0.3, "adapter_learning_rate_scale": 3.0}
SRSTE = SRSTEConfig(decay=0.02, adapter_rank=RANK, adapter_fraction=1 - MARK / STEPS)
FST = FSTConfig(decay=0.01, mask_refresh_steps=REFRESH, mvue=False, dense_finish_fraction=1 - MARK / STEPS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Where both sides begin."""
    torch.manual_seed(0)
    return save_gpt2(GPT2(GPT2Config(**MINI)), tmp_path_factory.mktemp("begin"))


def batches():
    """A few, again and again: of random tokens nothing else can be learned."""
    windows = torch.randint(0, 96, (4, 4, 17), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": window[:, :-1], "targets": window[:, 1:]} for window in windows] * (STEPS // 4)


class Data(pl.LightningDataModule):
    vocab_size, context, val_windows = 96, 16, ()

    def train_dataloader(self):
        return DataLoader(batches(), batch_size=None)

    def val_dataloader(self):
        return []


class Watch(pl.Callback):
    """Keeps the losses, and what no loop could know: the adapters that were drawn, and random masks."""

    def __init__(self):
        self.losses, self.down, self.mask = [], {}, {}

    def on_fit_start(self, trainer, pl_module):
        for name, layer in {**sparse_layers(pl_module.net), **masked_layers(pl_module.net)}.items():
            self.down[name] = None if layer.adapter_down is None else layer.adapter_down.detach().clone()
            if hasattr(layer, "indices"):
                self.mask[name] = mask_of(layer.indices)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def recipe_run(weights, **settings):
    module = GPT2Pretraining(RATE, weights=str(weights), warmup=WARMUP, epsilon=1e-6, sample_tokens=0, **settings)
    watch = Watch()
    trainer = pl.Trainer(
        **{"max_steps": STEPS, "max_epochs": -1, "accelerator": "cpu", "devices": 1, "precision": "64-true"},
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0},
        **{"enable_model_summary": False, "gradient_clip_val": CLIP, "num_sanity_val_steps": 0},
        callbacks=[watch],
    )
    trainer.fit(module, Data())
    return SimpleNamespace(net=module.net, **vars(watch))


def as_linear(conv):
    linear = nn.Linear(*conv.weight.shape, dtype=conv.weight.dtype)
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous())
    linear.bias = conv.bias
    return linear


def chosen(kind, weight, drawn):
    return {"magnitude": lambda: two_of_four(weight.abs()), "transposable": lambda: best_tiles(weight)}.get(
        kind, lambda: drawn
    )()


def kind_of(config, name):
    if not config.layer_masks:
        return config.mask
    return {"c_fc": "transposable"}.get(name[-4:], "random") if ".mlp." in name else "magnitude"


def loop_run(weights, ours, names, layer_of, on_step, decay=None, decay_first=True, scale=(1.0, 1.0), kept_decay=0.1):
    """The plain loop; ``layer_of`` makes a layer, ``on_step`` does what a method does before a step."""
    net = transformers.GPT2LMHeadModel.from_pretrained(weights, dtype=torch.float64)
    layers = {}
    for name in sorted(names):
        layers[name] = layer_of(name, as_linear(net.transformer.get_submodule(name)), ours)
        net.transformer.set_submodule(name, layers[name])
    kept = {id(layer.weight) for layer in layers.values() if isinstance(layer, MaskedLinear)}
    groups = []
    for name, parameter in net.named_parameters():
        adapter = name.endswith((".down", ".up"))
        factor = scale[1] if adapter else scale[0] if id(parameter) in kept else 1.0
        dense = 0.1 if parameter.dim() > 1 else 0.0
        own = 1e-4 if adapter else kept_decay if id(parameter) in kept else dense
        groups.append({"params": [parameter], "weight_decay": own, "factor": factor})
    optimizer, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6), []
    clipped = 0
    for step, batch in enumerate(batches()):
        on_step(step, layers)
        share = (step + 1) / (WARMUP + 1) if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * share * group["factor"]
        logits = net(batch["input_ids"]).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if decay is not None and decay_first:
            add_decay(layers, decay)
        clipped += torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP).item() > CLIP
        if decay is not None and not decay_first:
            add_decay(layers, decay)
        optimizer.step()
    assert clipped > STEPS // 5, "clipping must be at work"
    return SimpleNamespace(net=net, layers=layers, losses=losses)


def assert_equal_runs(ours, loop, names):
    assert ours.losses == pytest.approx(loop.losses, rel=RTOL)
    assert loop.losses[-1] < loop.losses[0]
    found = {**sparse_layers(ours.net), **masked_layers(ours.net)}
    assert set(found) == set(names)
    for name, layer in found.items():
        want = loop.layers[name]
        own = spread(layer.values.detach(), layer.indices) if hasattr(layer, "values") else layer.weight
        pairs = {"weight": own, "bias": layer.bias, "down": layer.adapter_down, "up": layer.adapter_up}
        for part, tensor in pairs.items():
            if tensor is not None:
                torch.testing.assert_close(tensor, getattr(want, part), rtol=RTOL, atol=ATOL, msg=f"{name}.{part}")
    rest = [name for name, _ in ours.net.named_parameters() if name.rpartition(".")[0] not in names]
    assert len(rest) > 10
    for name in rest:
        want = loop.net.transformer.get_parameter(name)
        want = want.t() if name == "h.0.attn.c_attn.weight" or (want.dim() > 1 and ".c_" in name) else want
        torch.testing.assert_close(ours.net.get_parameter(name), want, rtol=RTOL, atol=ATOL, msg=name)


@pytest.mark.parametrize("levers", [{}, LEVERS], ids=["plain", "levers"])
@pytest.mark.parametrize("name", SLOPE)
def test_slope(weights, name, levers):
    config = SLOPE[name]
    ours = recipe_run(weights, slope=config, **levers)

    def layer_of(name, linear, run):
        mask = chosen(kind_of(config, name), linear.weight.detach(), run.mask[name])
        return MaskedLinear(linear, mask, run.down[name])

    def on_step(step, layers):
        for name, layer in layers.items():
            if step % REFRESH == 0 and kind_of(config, name) != "transposable":
                layer.pick()
            if step == MARK:
                layer.wake()

    scale = (levers.get("values_learning_rate_scale", 1.0), levers.get("adapter_learning_rate_scale", 1.0))
    kept = levers.get("values_weight_decay", 0.1)
    loop = loop_run(weights, ours, SPARSE, layer_of, on_step, scale=scale, kept_decay=kept)
    assert_equal_runs(ours, loop, SPARSE)
    assert all(layer.up.abs().max() > 1e-3 for layer in loop.layers.values()), "the adapters must train"


@pytest.mark.parametrize("method", ["srste", "fst"])
def test_baselines(weights, method):
    ours = recipe_run(weights, **{method: SRSTE if method == "srste" else FST})
    rule, names, every = ("weight", SPARSE, 1) if method == "srste" else ("fst", FEED_FORWARD, REFRESH)

    def layer_of(name, linear, run):
        layer = PlainLayer(f"net.{name}", linear, rule, run.down[name])
        layer.mvue = False
        return layer

    def on_step(step, layers):
        for layer in layers.values():
            if step == MARK:
                layer.awake, layer.dense = method == "srste", method == "fst"
                for adapter in (layer.down, layer.up) if layer.awake else ():
                    adapter.requires_grad_()
            if step % every == 0 and not layer.dense:
                layer.pick()

    decay = SRSTE.decay if method == "srste" else FST.decay
    loop = loop_run(weights, ours, names, layer_of, on_step, decay, decay_first=method == "srste")
    assert_equal_runs(ours, loop, names)
    assert sum(layer.flips for layer in loop.layers.values()) > 50, "masks must move"
