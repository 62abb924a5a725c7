"""Tiny nets, data and trainers that the training tests share."""

import copy
import itertools
import os

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from slope_pl import SLoPeCallback, SLoPeConfig
from slope_pl.data.loading import EpochSampler, ResumableDataLoader
from tests.unit.reference import spread

WIDTH, CLASSES = 16, 4

# Third-party warnings that a tiny run on a CPU cannot avoid; pytest turns every other one into an error.
QUIET = [
    # The data is a handful of tensors: worker processes would only be slower.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # A resumed run needs no saver of its own to be the same run, or has one that writes elsewhere.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*(Model|Step)Checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # Lightning 2.6 itself calls a pytree function that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]


class Tokens(Dataset):
    """Item i is a function of i alone: a vector, a sentence and a class."""

    def __init__(self, length: int = 64) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + i)
        x = torch.randn(WIDTH, generator=generator)
        ids = torch.randint(1, 32, (8,), generator=generator)
        return {"x": x, "ids": ids, "label": x[:CLASSES].argmax()}


class Net(nn.Module):
    """A dense first layer, three sparse ones, a dense head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList([nn.Linear(WIDTH, 32), nn.Linear(32, 32), nn.Linear(32, WIDTH)])
            self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, batch):
        x = F.gelu(self.first(batch["x"]))
        for block in self.blocks:
            x = F.gelu(block(x))
        return self.head(x)


def hf_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return _hugging_face(
        BertForSequenceClassification,
        BertConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=16,
            num_labels=CLASSES,
        ),
    )


def hf_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return _hugging_face(
        GPT2ForSequenceClassification,
        GPT2Config(
            vocab_size=32,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            num_labels=CLASSES,
            pad_token_id=0,
        ),
    )


class _HuggingFace(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(input_ids=batch["ids"]).logits


def _hugging_face(kind, config) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _HuggingFace(kind(config))


class Toy(pl.LightningModule):
    """A plain LightningModule that knows nothing of sparsity; ``losses`` holds every micro-batch's."""

    def __init__(self, net: nn.Module | None = None, length: int = 64, batch_size: int = 8, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = Net() if net is None else net
        self.length, self.batch_size, self.lr = length, batch_size, lr
        self.losses: list[float] = []

    def forward(self, batch):
        return self.net(batch)

    def loss(self, batch) -> torch.Tensor:
        return F.cross_entropy(self(batch), batch["label"])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

    def train_dataloader(self):
        sampler = EpochSampler(
            Tokens(self.length), num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, seed=0
        )
        return ResumableDataLoader(Tokens(self.length), batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return eval_loader()

    predict_dataloader = val_dataloader


class Manual(Toy):
    """Optimizes by hand: with several optimizers every batch is as many of Lightning's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


def eval_loader(length: int = 16):
    return torch.utils.data.DataLoader(Tokens(length), batch_size=length)


def fixed_batch(length: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    batch = next(iter(eval_loader(length)))
    return {**batch, "x": batch["x"].to(dtype)}


CONFIG = SLoPeConfig(backward_refresh_steps=5, adapter_rank=4, adapter_start_step=12)


def make_trainer(tmp_path, *callbacks, **settings) -> pl.Trainer:
    """A silent trainer on one CPU; no sampler is injected, so that every strategy sees the same data."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 20,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**(defaults | settings), callbacks=list(callbacks))


def fit(tmp_path, module: pl.LightningModule | None = None, *callbacks, config=CONFIG, **settings):
    """Train with a SLoPeCallback first; returns module and trainer."""
    module = Toy() if module is None else module
    trainer = make_trainer(tmp_path, SLoPeCallback(config), *callbacks, **settings)
    trainer.fit(module)
    return module, trainer


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same(a, b) -> None:
    """Bit-identical trees of tensors and numbers."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


class Recorder(pl.Callback):
    """What the state was when: ``at[step]`` before that step's batch, after SLoPeCallback has acted."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at.setdefault(trainer.global_step, snapshot(pl_module))

    def changes(self, ending: str) -> list[int]:
        """Steps before which any tensor whose name ends so differs from what it was a step earlier."""
        steps = sorted(self.at)
        return [
            now
            for before, now in itertools.pairwise(steps)
            if any(
                name.endswith(ending) and not torch.equal(tensor, self.at[before][name])
                for name, tensor in self.at[now].items()
            )
        ]


def oracle_logits(state: dict[str, torch.Tensor], batch, rank: int = 4, prefix: str = "net.") -> torch.Tensor:
    """Net's logits in dense matrices, from the tensors of a state dict: nothing derived, nothing cached."""
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    x = F.gelu(F.linear(batch["x"], state["first.weight"], state["first.bias"]))
    for i in range(3):
        layer = {
            key: state.get(f"blocks.{i}.{key}") for key in ("values", "indices", "bias", "adapter_down", "adapter_up")
        }
        y = F.linear(x, spread(layer["values"], layer["indices"]), layer["bias"])
        if state[f"blocks.{i}.adapter_active"]:
            y = y + F.linear(F.linear(x, layer["adapter_down"]) / rank, layer["adapter_up"])
        x = F.gelu(y)
    return F.linear(x, state["head.weight"], state["head.bias"])
