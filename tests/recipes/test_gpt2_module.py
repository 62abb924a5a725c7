"""The GPT-2 recipe's parts: loss, rates, groups, sampling, and a mini training equal to an independent loop."""

import json
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from recipes.gpt2.module import GPT2Pretraining, next_token_loss
from recipes.gpt2.optimizer import parameter_groups, rate_schedule
from recipes.gpt2.sampling import continue_text
from slope_pl import SLoPeConfig
from slope_pl.baselines import FSTConfig, SRSTEConfig
from slope_pl.models import GPT2, GPT2Config

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MINI = {"vocab_size": 96, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, **NO_DROPOUT}


def batches(count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    windows = torch.randint(0, 96, (count, 4, 17), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": window[:, :-1], "targets": window[:, 1:]} for window in windows]


class Data(pl.LightningDataModule):
    """Random tokens with the face of a TextDataModule."""

    def __init__(self, train, val=(), vocab_size=96, context=16):
        super().__init__()
        self.train, self.val = train, list(val)
        self.vocab_size, self.context, self.val_windows = vocab_size, context, self.val

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=None) if self.val else []


def trainer(steps: int, **options) -> pl.Trainer:
    return pl.Trainer(
        **{
            **{"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", "devices": 1, "logger": False},
            **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
            **{"gradient_clip_val": 1.0, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None},
            "limit_val_batches": 0,
            **options,
        }
    )


def losses_of(module: GPT2Pretraining, train, **options) -> list[float]:
    seen: list[float] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["loss"].item())

    trainer(len(train), callbacks=[Keep()], val_check_interval=len(train), **options).fit(module, Data(train))
    return seen


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dense_training_equals_an_independent_loop(schedule):
    """Loss, groups, warm-up, decay and clipping, written down a second time; the targets are the shifted tokens."""
    train = batches(10)
    module = GPT2Pretraining(1e-2, gpt2=MINI, schedule=schedule, warmup=3, min_rate_share=0.1, sample_tokens=0)
    torch.manual_seed(3)
    found = losses_of(module, train)

    torch.manual_seed(3)
    net = GPT2(GPT2Config(**MINI))
    matrices = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    expected = []
    for step, batch in enumerate(train):
        if step < 3:
            share = (step + 1) / 4
        else:
            done = (step - 3) / 7
            fall = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
            share = 0.1 + 0.9 * fall
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * share
        logits = net(batch["input_ids"])
        whole = torch.cat([batch["input_ids"], batch["targets"][:, -1:]], dim=1)
        loss = F.cross_entropy(logits.reshape(-1, 96), whole[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("rows", [7, 32, 64])
def test_loss_in_pieces_is_the_loss(rows):
    net, (batch,) = GPT2(GPT2Config(**MINI)), batches(1)
    whole = next_token_loss(net, batch["input_ids"], batch["targets"], rows=None)
    gradients = torch.autograd.grad(whole, [*net.parameters()])
    pieces = next_token_loss(net, batch["input_ids"], batch["targets"], rows=rows)
    torch.testing.assert_close(pieces, whole)
    for piece, gradient in zip(torch.autograd.grad(pieces, [*net.parameters()]), gradients, strict=True):
        torch.testing.assert_close(piece, gradient, rtol=1e-5, atol=1e-7)


# torch 2.13's compiler instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "method",
    [{"slope": SLoPeConfig(adapter_rank=4, adapter_start=0.5)}, {"srste": SRSTEConfig()}, {"fst": FSTConfig()}],
)
def test_compiled_training_is_the_eager_one(monkeypatch, method):
    """Through the wake of adapters and the dense finish; only the backend is left out, which takes a minute."""
    train = batches(6)

    def run() -> list[float]:
        torch.manual_seed(3)
        return losses_of(GPT2Pretraining(1e-2, gpt2=MINI, compile=True, sample_tokens=0, **method), train)

    torch.compiler.reset()
    eager, compile_, calls = run(), torch.compile, []
    monkeypatch.setattr(GPT2Pretraining, "_compiles", lambda self: True)
    monkeypatch.setattr(torch, "compile", lambda f, **k: calls.append(k) or compile_(f, backend="aot_eager", **k))
    assert run() == pytest.approx(eager, abs=1e-5)
    assert calls == [{"dynamic": False}]


def test_groups_have_their_own_rate_and_decay():
    module = GPT2Pretraining(
        1e-3,
        gpt2=MINI,
        slope=SLoPeConfig(adapter_rank=4),
        warmup=0,
        values_learning_rate_scale=2.0,
        adapter_learning_rate_scale=10.0,
        values_weight_decay=0.01,
        sample_tokens=0,
    )
    run = trainer(2, val_check_interval=2)
    run.fit(module, Data(batches(2)))
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    assert {name: (g["initial_lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "values": (2e-3, 0.01),
        "weights": (1e-3, 0.1),
        "no_decay": (1e-3, 0.0),
        "adapters": (1e-2, 1e-4),
    }
    held = sum(p.numel() for group in groups.values() for p in group["params"])
    assert held == sum(p.numel() for p in module.parameters())


def test_validation_counts_tokens_not_batches():
    """The last batch is smaller: a mean of means would be another number."""
    big, small = batches(2)
    val = [big, {key: value[:1] for key, value in small.items()}]
    module = GPT2Pretraining(1e-3, gpt2=MINI, sample_tokens=0)
    (scores,) = trainer(1, limit_val_batches=1.0).validate(module, Data(batches(1), val), verbose=False)
    net = module.net
    total = sum(
        F.cross_entropy(net(b["input_ids"]).flatten(0, 1), b["targets"].flatten(), reduction="sum") for b in val
    )
    assert scores["val/loss"] == pytest.approx(total.item() / (5 * 16), abs=1e-6)
    assert scores["val/perplexity"] == pytest.approx(math.exp(scores["val/loss"]), rel=1e-6)
    assert scores["val/tokens"] == 80


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
        ({"learning_rate": 6.0}, "learning_rate=6.0"),
        ({"warmup": 1.5}, "warmup=1.5: a share below 1, or an integer"),
        ({"warmup": -1}, "warmup=-1"),
        ({"min_rate_share": 2.0}, "min_rate_share=2.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"schedule": "step"}, "schedule=step"),
        ({"values_learning_rate_scale": 0.0}, "values_learning_rate_scale=0.0"),
        ({"slope": SLoPeConfig(), "fst": FSTConfig()}, "slope and fst are both set"),
        ({"gpt2": {**MINI, "n_head": 5}}, "n_head=5"),
        ({"srste": {"decai": 1.0}}, "decai"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GPT2Pretraining(**{"learning_rate": 1e-3, "gpt2": MINI, **settings})


def test_a_rate_is_asked_for():
    with pytest.raises(TypeError, match="learning_rate"):
        GPT2Pretraining(gpt2=MINI)


@pytest.mark.parametrize(
    ("module", "options", "data", "message"),
    [
        ({}, {"max_steps": -1}, {}, "the number of steps is missing.*max_steps"),
        ({"warmup": 8}, {}, {}, "warmup=8 is 8 steps, and the run ends after 8"),
        ({}, {}, {"vocab_size": 97}, "the tokenizer has 97 tokens, the model's vocabulary 96"),
        ({}, {}, {"context": 17}, "data.context=17 tokens, but the model has positions for 16"),
        (
            {},
            {"val_check_interval": 3, "limit_val_batches": 1.0},
            {"val": True},
            "val_check_interval=3 batches does not divide the 8 batches",
        ),
        ({"values_learning_rate_scale": 2.0}, {}, {}, "values_learning_rate_scale=2.0 has no effect"),
        ({"values_weight_decay": 0.1}, {}, {}, "values_weight_decay=0.1 has no effect: this model has no values"),
        ({"adapter_learning_rate_scale": 2.0}, {}, {}, "adapter_learning_rate_scale=2.0 has no effect"),
        ({"adapter_weight_decay": 0.0}, {}, {}, "adapter_weight_decay=0.0 has no effect: this model has no adapters"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(module, options, data, message):
    data = {**data, "val": batches(1) if data.get("val") else ()}
    run = trainer(8, **{"val_check_interval": 8, **options})
    with pytest.raises(ValueError, match=message):
        run.fit(GPT2Pretraining(**{"learning_rate": 1e-3, "gpt2": MINI, **module}), Data(batches(8), **data))
    assert run.global_step == 0


def test_size_replaces_widths_and_depth_alone(caplog):
    caplog.set_level("INFO")
    module = GPT2Pretraining(1e-3, size="medium", gpt2={**MINI, "n_positions": 64})
    said = "gpt2: n_embd=32, n_layer=2, n_head=2 has no effect: size=medium has {'n_embd': 1024, 'n_layer': 24, 'n_head': 16}"
    assert said in caplog.text
    caplog.clear()
    GPT2Pretraining(1e-3, size="medium", gpt2={"vocab_size": 96})
    assert not caplog.text
    assert module.architecture == GPT2Config.medium(vocab_size=96, n_positions=64, **NO_DROPOUT)
    assert GPT2Pretraining(1e-3).architecture is None


def test_rates_rise_and_fall():
    share = rate_schedule("linear", 100, 0.1, 0.0)
    assert share(0) == pytest.approx(1 / 11)
    assert max(map(share, range(100))) == share(10) == 1.0
    assert 0 < share(99) < 0.02
    assert share(100) == 0.0
    cosine = rate_schedule("cosine", 100, 10, 0.1)
    assert cosine(10) == 1.0
    assert cosine(55) == pytest.approx(0.55)
    assert cosine(100) == pytest.approx(0.1)


class Letters:
    """A tokenizer of letters; token 0 ends a text, the model knows more tokens than it."""

    vocab_size, end_of_text = 27, 0

    def encode_batch(self, texts):
        return [[ord(letter) - 96 for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


class TestSampling:
    def test_greedy_text_is_that_of_the_growing_context(self):
        """Padding to the window changes nothing, and texts longer than the window go on."""
        net = GPT2(GPT2Config(**MINI)).eval()
        (text,) = continue_text(net, Letters(), ["hello"], 24, temperature=0)
        ids = [0, *Letters().encode_batch(["hello"])[0]]
        expected: list[int] = []
        for _ in range(24):
            token = int(net(torch.tensor([ids[-16:]]))[0, -1, :27].argmax())
            if token == 0:
                break
            ids.append(token)
            expected.append(token)
        assert text == Letters().decode(expected)
        assert text

    def test_a_seed_gives_a_text_and_leaves_torchs_own_generator(self):
        net = GPT2(GPT2Config(**MINI)).train()
        before = torch.get_rng_state()
        texts = [continue_text(net, Letters(), ["a", "bc"], 12, top_k=None, seed=s) for s in (1, 1, 2)]
        assert torch.equal(before, torch.get_rng_state())
        assert texts[0] == texts[1] != texts[2]
        assert net.training
        assert all(set(text) <= set("abcdefghijklmnopqrstuvwxyz") for row in texts for text in row)

    @pytest.mark.parametrize("wrong", [{"tokens": 0}, {"temperature": -1}, {"top_k": 0}, {"window": 17}])
    def test_wrong_numbers_are_named(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            continue_text(GPT2(GPT2Config(**MINI)), Letters(), [""], **{"tokens": 1, **wrong})


@pytest.mark.parametrize("method", [{}, {"slope": SLoPeConfig()}, {"srste": SRSTEConfig()}, {"fst": FSTConfig()}])
def test_export_keeps_the_module(method, tmp_path):
    module = GPT2Pretraining(1e-3, gpt2=MINI, **method)
    module.configure_model()
    names = [name for name, _ in module.named_modules()]
    kinds = {type(m) for m in module.modules()}
    module.export(str(tmp_path))
    assert {type(m) for m in module.modules()} == kinds
    assert [name for name, _ in module.named_modules()] == names
    assert json.loads((tmp_path / "config.json").read_text())["n_embd"] == 32


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DeepSpeedStrategy])
def test_gradients_of_a_fused_optimizer_are_clipped_once(strategy, monkeypatch):
    """What replaces Lightning's refusal clips all groups together, by their norm; DeepSpeed's engine clips by itself."""
    module = GPT2Pretraining(1e-3)
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.full((3,), 2.0)
    asked = []
    monkeypatch.setattr(module, "_fused", lambda: True)
    monkeypatch.setattr(module, "clip_gradients", lambda *arguments: asked.append(arguments))
    module._trainer = SimpleNamespace(strategy=object.__new__(strategy))
    optimizer = SimpleNamespace(param_groups=[{"params": [w]} for w in weights])
    module.configure_gradient_clipping(optimizer, 1.0, None)
    norm = torch.cat([w.grad for w in weights]).norm().item()
    if strategy is DeepSpeedStrategy:
        assert asked == [(optimizer, 1.0, None)]
        assert norm == pytest.approx(24**0.5)
    else:
        assert not asked
        assert norm == pytest.approx(1.0, abs=1e-5)


def test_a_matrix_that_zero_3_has_spread_decays_as_one():
    net = nn.Linear(4, 4)
    net.weight.ds_shape, net.weight.data = net.weight.shape, torch.empty(0)
    groups = parameter_groups(net, 1e-3, decay={"weights": 0.1}, scale={})
    assert [(group["name"], group["params"]) for group in groups] == [
        ("weights", [net.weight]),
        ("no_decay", [net.bias]),
    ]
