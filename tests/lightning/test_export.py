"""Sparse checkpoints come back, and leave for dense formats, with the same logits."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import slope_pl
from slope_pl import CheckpointError, SLoPeCallback, SLoPeLightningModule, sparse_layers
from slope_pl.models import BertConfig, BertForSequenceClassification, save_pretrained
from tests.lightning.toy import (
    CLASSES,
    CONFIG,
    QUIET,
    Net,
    Toy,
    assert_same,
    fixed_batch,
    hf_bert,
    hf_gpt2,
    make_trainer,
    oracle_logits,
)

pytestmark = QUIET

WAKE = [8, 14]  # steps to train: before and after CONFIG's wake
ASLEEP_OR_AWAKE = pytest.mark.parametrize("steps", WAKE, ids=["asleep", "awake"])


class Module(SLoPeLightningModule, Toy):
    def __init__(self, slope=None, seed=0):
        super().__init__(slope=slope, net=Net(seed))
        self.save_hyperparameters()


def train(tmp_path, module, steps, callbacks=(), **settings):
    """All runs plan 20 steps; the file of the step asked for is what is used."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, **settings)
    make_trainer(tmp_path, *callbacks, saver, enable_checkpointing=True, max_steps=14).fit(module)
    return tmp_path / f"step={steps}.ckpt"


@torch.no_grad()
def logits(module):
    return module.eval()(fixed_batch())


def wanted(path):
    """Logits by the dense oracle, from nothing but the file."""
    with torch.no_grad():
        return oracle_logits(torch.load(path, weights_only=True)["state_dict"], fixed_batch())


@ASLEEP_OR_AWAKE
@pytest.mark.parametrize("weights_only_file", [False, True])
def test_load_from_checkpoint(tmp_path, steps, weights_only_file):
    path = train(tmp_path, Module(slope=CONFIG), steps, save_weights_only=weights_only_file)
    module = Module.load_from_checkpoint(path, seed=9)
    assert {layer.adapters_awake for layer in sparse_layers(module).values()} == {steps == 14}
    torch.testing.assert_close(logits(module), wanted(path))
    assert module.slope_config == CONFIG


def test_load_from_checkpoint_without_the_config_says_what_to_do(tmp_path):
    path = train(tmp_path, Module(slope=CONFIG), 8)
    with pytest.raises(CheckpointError, match="slope=SLoPeConfig"):
        Module.load_from_checkpoint(path, slope=None)


@ASLEEP_OR_AWAKE
@pytest.mark.parametrize("way", ["callback", "module", "strategy"])
def test_validate_and_predict_read_a_checkpoint(tmp_path, steps, way):
    path = train(tmp_path, Toy(), steps, [SLoPeCallback(CONFIG)])
    module, callbacks, settings = {
        "callback": (Toy(Net(9)), [SLoPeCallback(CONFIG)], {}),
        "module": (Module(slope=CONFIG, seed=9), [], {}),
        "strategy": (Toy(Net(9)), [], {"strategy": slope_pl.SLoPeDDPStrategy(config=CONFIG)}),
    }[way]
    trainer = make_trainer(tmp_path, *callbacks, limit_val_batches=1, **settings)
    batch, want = fixed_batch(), wanted(path)
    (metrics,) = trainer.validate(module, ckpt_path=path, verbose=False)
    assert metrics["val/loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(want, batch["label"]).item(), rel=1e-5
    )
    (predicted,) = trainer.predict(module, ckpt_path=path)
    torch.testing.assert_close(predicted, want)


def test_fit_after_validate_and_predict_is_a_plain_fit(tmp_path):
    """Stages share module, trainer and callback; evaluation leaves nothing behind."""
    trainer, module = make_trainer(tmp_path, SLoPeCallback(CONFIG), limit_val_batches=1), Toy()
    trainer.validate(module, verbose=False)
    trainer.predict(module)
    trainer.fit(module)
    want = Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(want)
    assert_same(module.state_dict(), want.state_dict())


@ASLEEP_OR_AWAKE
def test_densify_keeps_the_logits(tmp_path, steps):
    module = Module.load_from_checkpoint(train(tmp_path, Module(slope=CONFIG), steps))
    before, dense = logits(module), slope_pl.dense_state_dict(module)
    slope_pl.densify(module)
    torch.testing.assert_close(logits(module), before)
    assert_same(module.state_dict(), dense)
    zeros = (module.net.blocks[1].weight == 0).float().mean().item()
    assert (zeros == 0.5) == (steps == 8), "awake adapters fill the zeros"


@pytest.mark.parametrize("make", [hf_bert, hf_gpt2])
@ASLEEP_OR_AWAKE
def test_hugging_face_model_takes_the_dense_state_dict(tmp_path, make, steps):
    """The state dict of a trained sparse Hugging Face model loads into the model that it came from."""
    module = Toy(make())
    path = train(tmp_path, module, steps, [SLoPeCallback(CONFIG)])
    make_trainer(tmp_path, SLoPeCallback(CONFIG), limit_val_batches=1).validate(module, ckpt_path=path, verbose=False)
    dense = make()
    assert not torch.allclose(logits(Toy(dense)), logits(module), atol=1e-3)
    dense.load_state_dict(slope_pl.dense_state_dict(module.net))
    torch.testing.assert_close(logits(Toy(dense)), logits(module), rtol=1e-4, atol=1e-5)


class OwnBert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=16,
        )
        self.bert = BertForSequenceClassification(config, CLASSES)

    def forward(self, batch):
        return self.bert(batch["ids"]).logits


@ASLEEP_OR_AWAKE
def test_transformers_loads_the_export_to_the_same_logits(tmp_path, steps):
    from transformers import BertForSequenceClassification as Theirs

    module = Toy(OwnBert())
    path = train(tmp_path, module, steps, [SLoPeCallback(CONFIG)])
    make_trainer(tmp_path, SLoPeCallback(CONFIG), limit_val_batches=1).validate(module, ckpt_path=path, verbose=False)
    net = module.net.bert
    folder = save_pretrained(net, tmp_path / "export", slope_pl.dense_state_dict(net))
    theirs = Theirs.from_pretrained(folder, num_labels=CLASSES).eval()
    with torch.no_grad():
        got = theirs(input_ids=fixed_batch()["ids"]).logits
    torch.testing.assert_close(got, logits(module), rtol=1e-4, atol=1e-5)
    weight = theirs.bert.encoder.layer[1].output.dense.weight
    assert ((weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all() == (steps == 8), "2:4 zeros in place while asleep"


@pytest.mark.parametrize("way", ["callback", "module"])
def test_a_densified_model_stays_what_it_is_in_the_next_stage(tmp_path, way):
    """Train, densify, evaluate: pruning the merged weights a second time would change the result in silence."""
    module = Module(slope=CONFIG) if way == "module" else Toy()
    callbacks = [] if way == "module" else [SLoPeCallback(CONFIG)]
    trainer = make_trainer(tmp_path, *callbacks, limit_val_batches=1)
    trainer.fit(module)
    (before,) = trainer.validate(module, verbose=False)
    slope_pl.densify(module)
    (after,) = trainer.validate(module, verbose=False)
    assert after["val/loss"] == pytest.approx(before["val/loss"], rel=1e-5)
