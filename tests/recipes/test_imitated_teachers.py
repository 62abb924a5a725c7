"""What a recovery is made of: its teacher, its frozen heads, its dropout, its step."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from recipes.bert_large.imitation import ImitationConfig, freeze_heads, load_imitated, set_dropout
from recipes.bert_large.pretrain_module import BertPretraining, _imitation_loss
from slope_pl import (
    CheckpointError,
    ConfigError,
    Distillation,
    SLoPeConfig,
    sparsify,
    wake_adapters,
)
from slope_pl.models import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertModel,
    save_pretrained,
)
from slope_pl.models.bert import BertSelfAttention
from tests.recipes.test_imitation import CONFIG, run
from tests.recipes.test_pretrain_recipe import ROOT
from tests.unit.bert_cases import randomise


@pytest.mark.parametrize(
    "slope", [None, SLoPeConfig(), SLoPeConfig(adapter_rank=4)], ids=["dense", "sparse", "adapters"]
)
def test_heads_are_frozen_where_nothing_teaches_them(slope):
    """Not merely left without a gradient: DDP would wait for one. The decoder's matrix is the embeddings'."""

    def frozen(imitation):
        module = BertPretraining(bert=CONFIG, weights="folder", slope=slope, imitation=imitation)
        module.configure_model()
        wake_adapters(module)
        parts = {name.split(".")[1] for name, p in module.net.named_parameters() if not p.requires_grad}
        words = module.net.bert.embeddings.word_embeddings.weight
        assert words.requires_grad
        assert all(p.requires_grad for p in module.net.bert.pooler.parameters())
        return parts, [p.requires_grad for p in module.net.cls.parameters() if p is not words]

    parts, learnt = frozen(ImitationConfig())
    assert parts == {"predictions", "seq_relationship"}
    assert not any(learnt)
    for imitation in (ImitationConfig(weight=0.5), None):
        parts, learnt = frozen(imitation)
        assert parts == set()
        assert all(learnt)


def test_what_is_imitated_is_what_is_named_then_what_the_run_starts_from():
    for teacher, weights, start_from, expected in (
        ("named", "folder", None, "named"),
        (None, "folder", None, "folder"),
        (None, None, "a.ckpt", "a.ckpt"),
        ("named", None, "a.ckpt", "named"),
        ("", "folder", None, ""),  # no way to say nothing: null is
        ("", None, "a.ckpt", ""),
    ):
        assert ImitationConfig(teacher=teacher).source(weights, start_from) == expected
    with pytest.raises(ConfigError, match="nothing to imitate"):
        ImitationConfig().source(None, None)


def test_dropout_is_set_in_every_place_and_not_in_the_configuration():
    """One of the embeddings, two of each layer, and that of its attention, which is a field and no module."""
    for sparse in (False, True):
        module = BertPretraining(bert=CONFIG, slope=SLoPeConfig() if sparse else None, dropout=0.25)
        module.configure_model()
        rates = [part.p for part in module.modules() if isinstance(part, nn.Dropout)]
        rates += [part.dropout_prob for part in module.modules() if isinstance(part, BertSelfAttention)]
        assert rates == [0.25] * (1 + 2 * 2 + 2)
        assert module.net.config.hidden_dropout_prob == module.net.config.attention_probs_dropout_prob == 0.1
    net = BertForPreTraining(CONFIG).train()
    ids = torch.randint(5, 2048, (2, 16))
    assert not torch.equal(net(ids).prediction_logits, net(ids).prediction_logits)
    set_dropout(net, 0.0)
    assert torch.equal(net(ids).prediction_logits, net(ids).prediction_logits)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_step_is_one_graph_for_the_compiler(weight):
    """On a GPU the config has it compiled; here dynamo alone captures it."""
    torch.compiler.reset()
    torch.manual_seed(0)
    config = replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher, net = BertModel(config), BertForPreTraining(config)
    sparsify(net, SLoPeConfig())
    distillation = Distillation(teacher, "hidden_states", weight=weight)
    ids = torch.randint(5, 2048, (2, 16))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids).tril(12),
        "token_type_ids": ids % 2,
        "masked_positions": torch.tensor([[3, 1], [0, 7]]),
        "masked_labels": torch.tensor([[9, 9], [9, -100]]),
        "next_sentence_label": torch.tensor([0, 1]),
    }
    names = ("input_ids", "attention_mask", "token_type_ids")
    theirs = distillation.outputs({name: batch[name] for name in names} | {"output_hidden_states": True})
    given = (net, batch, theirs, distillation.distance, weight)
    found, expected = (
        f(*given) for f in (torch.compile(_imitation_loss, fullgraph=True, backend="eager"), _imitation_loss)
    )
    torch.testing.assert_close(found[:2], expected[:2])
    assert (found[2] is None) == (expected[2] is None) == (weight == 1)


@pytest.mark.parametrize("weight", [0, -0.5, 1.01, True, "1", None, float("nan")])
def test_weights_out_of_range(weight):
    with pytest.raises(ConfigError, match=r"model\.imitation\.weight=.*above 0 and at most 1"):
        ImitationConfig(weight=weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "has num_hidden_layers=3, the model 2: hidden states are compared layer by layer"),
        ({"hidden_size": 64}, "has hidden_size=64, the model 32"),
        ({"vocab_size": 2047}, "the tokenizer has 2048 tokens, the teacher {} a vocabulary of 2047"),
        (
            {"max_position_embeddings": 31},
            "data.max_length is 32, but the teacher {} has 31 positions: make data.max_len",
        ),
    ],
)
def test_teachers_that_do_not_fit(tmp_path, change, message):
    save_pretrained(BertModel(replace(CONFIG, **change)), tmp_path)
    with pytest.raises(ConfigError, match=message.format(tmp_path)):
        load_imitated(str(tmp_path), CONFIG, 2048, 32)


@pytest.mark.parametrize("place", ["nowhere", "", "weightless"])
def test_a_teacher_that_is_not_there_is_said_with_the_setting(tmp_path, place):
    (tmp_path / "weightless").mkdir()
    save_pretrained(BertModel(CONFIG), tmp_path / "weightless")
    (tmp_path / "weightless/model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no teacher to imitate: .*\. Another place: model\.imitation\.teacher\.$"):
        load_imitated(str(tmp_path / place), CONFIG, 2048, 32)
    with pytest.raises(CheckpointError, match="no such file"):  # of a file it is said what was expected
        load_imitated(str(tmp_path / "nowhere.ckpt"), CONFIG, 2048, 32)


def test_teachers_that_are_not_the_same_in_all_else_fit(tmp_path):
    """More words than the tokenizer's, another width inside the layers, fewer positions if these are enough."""
    other = {"vocab_size": 2049, "intermediate_size": 96, "num_attention_heads": 2, "max_position_embeddings": 32}
    save_pretrained(BertModel(replace(CONFIG, **other)), tmp_path)
    teacher = load_imitated(str(tmp_path), CONFIG, 2048, 32)
    assert (teacher.config.vocab_size, teacher.config.max_position_embeddings) == (2049, 32)


def test_a_source_without_a_pooler_teaches_none(tmp_path):
    """A pooler drawn anew would be another one at each start."""
    torch.manual_seed(1)
    save_pretrained(randomise(BertForQuestionAnswering(CONFIG)), tmp_path)
    assert load_imitated(str(tmp_path), CONFIG, 2048, 32).pooler is None
    start = ["--data.tokenizer", str(ROOT / "data/sample/vocab.txt"), "--model.slope", "null"]
    once = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--model.learning_rate", "1e-9"]
    (tmp_path / "runs").mkdir()
    found = run(tmp_path / "runs", "fit", str(tmp_path), *start, *once)
    assert found["scores"]["val/imitation"] < 1e-9, "an unpruned student is its own teacher"


@pytest.mark.parametrize("pooled", [False, True])
def test_every_trained_parameter_has_a_gradient(pooled):
    """DDP waits for them."""
    torch.manual_seed(0)
    net, teacher = BertForPreTraining(CONFIG), BertModel(CONFIG, add_pooling_layer=pooled)
    freeze_heads(net)
    names = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "masked_positions",
        "masked_labels",
        "next_sentence_label",
    )
    shapes = ((2, 9), (2, 9), (2, 9), (2, 3), (2, 3), (2,))
    batch = {name: torch.ones(shape, dtype=torch.int64) for name, shape in zip(names, shapes, strict=True)}
    with torch.no_grad():
        theirs = teacher(batch["input_ids"], output_hidden_states=True)
    distance = Distillation(teacher, "hidden_states", weight=1.0).distance
    loss, shown, _ = _imitation_loss(net, batch, theirs, distance, 1.0)
    assert loss.item() == shown.item()
    loss.backward()
    lacking = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert bool(net.bert.pooler.dense.weight.grad.any()) == pooled
