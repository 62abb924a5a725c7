"""One of one or two gloo processes: where runs under ZeRO-3 begin. All ranks see the same batches, as one process would."""

import os
import sys
import traceback
import warnings
from collections import Counter
from operator import itemgetter
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from recipes.bert_large import finetuning
from recipes.bert_large.module import BertSquad
from recipes.bert_large.pretrain_module import BertPretraining
from recipes.gpt2.module import GPT2Pretraining
from recipes.gpt2.optimizer import parameter_groups
from slope_pl import SLoPeCallback, SLoPeConfig, SLoPeLightningModule
from slope_pl.models import (
    GPT2,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    encoder_from_config,
    load_encoder,
    save_gpt2,
    save_pretrained,
)
from tests.distributed.sharded_worker import CPUZero, PlainCPUZero, whole_state
from tests.lightning.toy import make_trainer

STEPS, WORDS, LENGTH = 5, 96, 16
SLOPE = SLoPeConfig(adapter_rank=4, adapter_start_step=3)
GPT = GPT2Config(WORDS, LENGTH, 32, 2, 2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": LENGTH + 2} | NO_DROPOUT
BERT = BertConfig(**SIZES)


# What is this small, or soon needed again, ZeRO-3 would keep whole from the first step on.
EAGER_TO_RELEASE = {
    f"stage3_{name}": 0
    for name in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
}


class Data(pl.LightningDataModule):
    """Random batches with the face of the recipes' data modules."""

    vocab_size, context, max_length, pad = WORDS, LENGTH, LENGTH, 1

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(1)

        def numbers(*shape, below=WORDS):
            return torch.randint(2, below, shape, generator=draw)

        batches = [
            {
                "input_ids": numbers(4, LENGTH),
                "targets": numbers(4, LENGTH),
                "attention_mask": torch.ones(4, LENGTH, dtype=torch.int64),
                "token_type_ids": torch.zeros(4, LENGTH, dtype=torch.int64),
                "masked_positions": numbers(4, 3, below=LENGTH),
                "masked_labels": numbers(4, 3),
                "next_sentence_label": numbers(4, below=4) - 2,
                "start_positions": numbers(4, below=LENGTH),
                "end_positions": numbers(4, below=LENGTH),
            }
            for _ in range(STEPS)
        ]
        return DataLoader(batches, batch_size=1, collate_fn=itemgetter(0))


class Draws(nn.Module):
    """Initialises what its children have drawn, in the ways of hand-written nets."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(32, WORDS, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("linear2.weight"):
                nn.init.normal_(parameter, std=0.01)
            elif parameter.dim() > 1:  # under zero.Init all have one dimension
                nn.init.xavier_uniform_(parameter)
        self.layers[0].linear1.weight.data.mul_(3.0)
        self.head.weight = self.words.weight

    def forward(self, input_ids):
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Own(pl.LightningModule):
    """A module that knows nothing of this package and builds in configure_model, as Lightning asks of large nets."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Draws()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())

    def configure_optimizers(self):
        decay = {"values": 0.5, "weights": 0.5, "adapters": 0.1}
        # A bias of keys has gradients of rounding alone, which a small eps would turn into steps.
        return torch.optim.AdamW(parameter_groups(self, 1e-3, decay=decay, scale={}), eps=1e-4)


class OwnSparse(SLoPeLightningModule, Own):
    """The same, sparse by construction."""


class Emptied(SLoPeLightningModule):
    """Enters zero.Init by itself: a net too large to be whole. This package's models start as they should, even there."""

    def __init__(self, build):
        super().__init__(slope=SLOPE)
        self.build, self.net, self.numbers = build, None, []

    def configure_model(self):
        if self.net is None and not isinstance(self.trainer.strategy, CPUZero):
            self.net = self.build()
        elif self.net is None:
            import deepspeed

            with deepspeed.zero.Init(config_dict_or_path=self.trainer.strategy.config):
                self.net = self.build()
                super().configure_model()
            plain = nn.Linear(8, 8).to(torch.float32)  # once, GPT2 left a hook behind that emptied whatever came later
            assert not hasattr(plain.weight, "ds_id")
            self.numbers = [parameter.numel() for parameter in self.parameters()]
        super().configure_model()

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch["input_ids"])
        return sum(F.softplus(out).mean() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))

    def configure_optimizers(self):
        decay = {"weights": 0.5, "no_decay": 0.0, "adapters": 0.1}
        return torch.optim.AdamW(finetuning.parameter_groups(self.named_parameters(), decay), lr=1e-3, eps=1e-4)


class Applies(nn.Module):
    """Initialises by ``apply``, for which DeepSpeed gathers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, WORDS)
        self.apply(lambda part: part.weight.data.normal_(std=0.02) if hasattr(part, "weight") else None)

    def forward(self, input_ids):
        x = self.words(input_ids)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.head(x)


class Frozen(OwnSparse):
    """Its embeddings do not learn, so that the first block's input needs no gradient."""

    def __init__(self, build):
        super().__init__(slope=SLOPE)
        self.build = build

    def configure_model(self):
        if self.net is None:
            self.net = self.build()
            for part in self.net.modules():
                if isinstance(part, nn.Embedding):
                    part.requires_grad_(False)
            if isinstance(self.net, BertForQuestionAnswering):
                self.net.bert.embeddings.requires_grad_(False)
        super().configure_model()

    training_step = Emptied.training_step

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad or group["name"] == "adapters"]
        return optimizer


class Collectives(TorchDispatchMode):
    """Counts the operations of c10d."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


class Begin(pl.Callback):
    """State before the first step, losses, state at the end; operations of c10d in the last step."""

    def on_train_start(self, trainer, pl_module):
        self.start, self.losses = whole_state(pl_module), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.collectives = Collectives()
        self.collectives.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.collectives.__exit__(None, None, None)
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module):
        self.end = whole_state(pl_module)


def gpt2(folder, **settings):
    return GPT2Pretraining(
        **({"learning_rate": 1e-3, "gpt2": GPT, "slope": SLOPE, "weight_decay": 0.5, "sample_tokens": 0} | settings)
    )


def bert(folder, **settings):
    return BertPretraining(
        **({"learning_rate": 1e-3, "bert": BERT, "slope": SLOPE, "weight_decay": 0.5, "optimizer": "adamw"} | settings)
    )


ROBERTA = {"model_type": "roberta", "pad_token_id": 1, **SIZES}


def save_weights(folder):
    """What the runs that start from weights read; before the processes start."""
    torch.manual_seed(7)
    save_gpt2(GPT2(GPT), folder / "gpt2")
    save_pretrained(BertForPreTraining(BERT), folder / "bert")
    encoder_from_config(ROBERTA, "question_answering").model.save_pretrained(folder / "roberta")


MODULES = {
    "gpt2": gpt2,
    "gpt2_dense": lambda folder: gpt2(folder, slope=None),
    "gpt2_recomputed": lambda folder: gpt2(folder, gradient_checkpointing=True),
    "gpt2_frozen": lambda folder: Frozen(lambda: GPT2(GPT)),
    "bert_frozen": lambda folder: Frozen(lambda: BertForQuestionAnswering(BERT)),
    "gpt2_weights": lambda folder: gpt2(folder, gpt2=None, weights=str(folder / "gpt2")),
    "bert": bert,
    "bert_weights": lambda folder: bert(folder, bert=None, weights=str(folder / "bert")),
    "squad": lambda folder: BertSquad(bert=BERT, slope=SLOPE),
    "roberta": lambda folder: BertSquad(encoder=ROBERTA, slope=SLOPE),
    "roberta_weights": lambda folder: BertSquad(weights=str(folder / "roberta"), slope=SLOPE),
    "own": lambda folder: Own(),
    "own_sparse": lambda folder: OwnSparse(slope=SLOPE),
    "own_dense": lambda folder: OwnSparse(slope=None),
    "emptied_gpt2": lambda folder: Emptied(lambda: GPT2(GPT)),
    "emptied_model": lambda folder: Emptied(lambda: BertModel(BERT)),
    "emptied_bert": lambda folder: Emptied(lambda: BertForPreTraining(BERT)),
    "emptied_squad": lambda folder: Emptied(lambda: BertForQuestionAnswering(BERT)),
    "emptied_classes": lambda folder: Emptied(lambda: BertForSequenceClassification(BERT, 3)),
    "emptied_roberta": lambda folder: Emptied(lambda: encoder_from_config(ROBERTA, "question_answering")),
    "emptied_weights": lambda folder: Emptied(lambda: load_encoder(folder / "roberta", "classification", 3)),
    "emptied": lambda folder: Emptied(Applies),
}
PLAIN = ("gpt2_dense", "own", "own_dense")  # under Lightning's own strategy


def begin(name, folder, strategy="auto", devices=1):
    pl.seed_everything(0)
    module, seen = MODULES[name](folder), Begin()
    callbacks = [SLoPeCallback(SLOPE), seen] if name == "own" else [seen]
    trainer = make_trainer(folder, *callbacks, strategy=strategy, devices=devices, max_steps=STEPS)
    trainer.fit(module, Data())
    report = {"start": seen.start, "losses": seen.losses, "end": seen.end}
    report["gathers"] = seen.collectives.calls["_allgather_base_"]
    return report | {"numbers": getattr(module, "numbers", None)}


def main(folder, names):
    warnings.simplefilter("ignore")
    processes, rank, reports = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]), {}
    for name in names or MODULES:
        try:
            strategy = (PlainCPUZero if name in PLAIN else CPUZero)(stage=3)
            strategy.config["zero_optimization"] |= EAGER_TO_RELEASE
            reports[name] = begin(name, folder, strategy, processes)
        except Exception:
            reports[name] = traceback.format_exc()
    torch.save(reports, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
