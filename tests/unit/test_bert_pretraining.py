"""The pretraining model and its loss against transformers, on batches of the data module."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from slope_pl.data import MlmDataModule
from slope_pl.models import (
    BertConfig,
    BertForPreTraining,
    PreTrainingOutput,
    load_config,
    load_pretrained,
    pretraining_loss,
    save_pretrained,
)
from tests.unit.bert_cases import randomise
from tests.unit.test_mlm_sentences import toy_place  # noqa: F401 - a fixture


@pytest.fixture
def batch(toy_place):  # noqa: F811
    data = MlmDataModule(
        source=str(toy_place / "corpus.txt"), tokenizer=str(toy_place / "vocab.txt"), separator="\0", max_length=24,
        max_predictions=4, batch_size=4, val_fraction=0.0, cache_dir=str(toy_place / "cache"),
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return data.vocab_size, next(iter(data.train_dataloader()))


def models(vocabulary, tmp_path):
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=24, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = randomise(BertForPreTraining(config)).eval()
    save_pretrained(ours, tmp_path)
    return ours, transformers.BertForPreTraining.from_pretrained(tmp_path).eval()


@torch.no_grad()
def test_logits_and_loss_equal_transformers_on_a_batch(batch, tmp_path):
    vocabulary, batch = batch
    ours, theirs = models(vocabulary, tmp_path)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    labels = torch.full_like(batch["input_ids"], -100)
    for row in range(len(labels)):
        chosen = batch["masked_labels"][row] != -100
        labels[row, batch["masked_positions"][row][chosen]] = batch["masked_labels"][row][chosen]
    expected = theirs(**inputs, labels=labels, next_sentence_label=batch["next_sentence_label"])
    full = ours(**inputs)
    part = ours(**inputs, masked_positions=batch["masked_positions"])
    torch.testing.assert_close(full.prediction_logits, expected.prediction_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(full.seq_relationship_logits, expected.seq_relationship_logits, rtol=0, atol=1e-5)
    gathered = expected.prediction_logits.take_along_dim(batch["masked_positions"][..., None], 1)
    torch.testing.assert_close(part.prediction_logits, gathered, rtol=0, atol=1e-5)
    loss = pretraining_loss(part, batch["masked_labels"], batch["next_sentence_label"])
    torch.testing.assert_close(loss.total, expected.loss, rtol=0, atol=1e-5)
    assert loss.total == loss.masked_words + loss.next_sentence
    wrong = pretraining_loss(part, batch["masked_labels"], 1 - batch["next_sentence_label"])
    assert (wrong.total - expected.loss).abs() > 1e-3


@torch.no_grad()
def test_weights_of_transformers_load_with_both_heads(batch, tmp_path):
    vocabulary, batch = batch
    _, theirs = models(vocabulary, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BertForPreTraining(load_config(tmp_path / "theirs")).eval()
    report = load_pretrained(ours, tmp_path / "theirs")
    assert report.missing == report.unexpected == ()
    expected, found = theirs(batch["input_ids"]), ours(batch["input_ids"])
    torch.testing.assert_close(found.prediction_logits, expected.prediction_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.seq_relationship_logits, expected.seq_relationship_logits, rtol=0, atol=1e-5)


@given(st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(0, 99))
def test_unused_slots_have_no_share_in_the_loss(rows, seed):
    labels = torch.tensor(rows)
    labels[labels < 0] = -100
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*labels.shape, 7, generator=generator)
    pairs, following = torch.randn(len(rows), 2, generator=generator), torch.zeros(len(rows), dtype=torch.int64)
    loss = pretraining_loss(PreTrainingOutput(logits, pairs), labels, following)
    logs, used = logits.log_softmax(-1), labels != -100
    expected = -logs[used].gather(1, labels[used][:, None]).mean() if used.any() else torch.tensor(0.0)
    torch.testing.assert_close(loss.masked_words, expected)
    logits[~used] += 5 * torch.randn(int((~used).sum()), 7, generator=generator)
    assert pretraining_loss(PreTrainingOutput(logits, pairs), labels, following).total == loss.total


def test_the_loss_of_bfloat16_logits_is_computed_in_float32():
    logits = torch.randn(2, 3, 1000).bfloat16().requires_grad_()
    output = PreTrainingOutput(logits, torch.randn(2, 2).bfloat16())
    labels, following = torch.randint(0, 1000, (2, 3)), torch.tensor([0, 1])
    loss = pretraining_loss(output, labels, following)
    exact = pretraining_loss(PreTrainingOutput(logits.double(), output[1].double()), labels, following)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, exact.total.float(), rtol=1e-5, atol=1e-5)
    loss.total.backward()
    assert logits.grad.abs().max() > 0


def test_labels_of_other_positions_are_an_error():
    output = PreTrainingOutput(torch.zeros(2, 24, 9), torch.zeros(2, 2))
    with pytest.raises(
        ValueError, match=r"masked_labels has shape \(2, 4\), the logits are of \(2, 24, 9\).*masked_positions"
    ):
        pretraining_loss(output, torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
