"""Encoders of transformers behind one forward: tiny random ones of every family, and MiniLM's real weights."""

import sys

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from slope_pl import SLoPeConfig, activation_norms, dense_state_dict, sparse_layers, sparsify
from slope_pl.models import (
    ENCODER_TYPES,
    BertForQuestionAnswering,
    Encoder,
    PretrainedFilesError,
    PretrainedMismatchError,
    PretrainedUnavailableError,
    QuestionAnsweringOutput,
    SequenceClassificationOutput,
    encoder_from_config,
    load_config,
    load_encoder,
    load_pretrained,
)
from slope_pl.nn import choose_layers
from tests.helpers import minilm_dir

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 40,
}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 96, "max_position_embeddings": 40}
CONFIGS = {
    "bert": SMALL,
    "roberta": SMALL | {"type_vocab_size": 1},
    "xlm-roberta": SMALL | {"type_vocab_size": 1},
    "camembert": SMALL | {"type_vocab_size": 1},
    "distilbert": DISTIL,
    "electra": SMALL | {"embedding_size": 16},
}
LABELS = {"question_answering": None, "classification": 3, "regression": None}


def first(prefix, names="query key value"):
    return {f"model.{prefix}.{name}" for name in names.split()}


ATTENTION = "encoder.layer.0.attention.self"
FIRST = {
    "bert": first(f"bert.{ATTENTION}"),
    "roberta": first(f"roberta.{ATTENTION}"),
    "xlm-roberta": first(f"roberta.{ATTENTION}"),
    "camembert": first(f"roberta.{ATTENTION}"),
    "distilbert": first("distilbert.transformer.layer.0.attention", "q_lin k_lin v_lin"),
    "electra": {"model.electra.embeddings_project"},
}
ONE_HEAD, TWO_LAYERS = {"model.classifier"}, {"model.classifier.dense", "model.classifier.out_proj"}
HEADS = {"bert": ONE_HEAD, "distilbert": {"model.classifier", "model.pre_classifier"}} | dict.fromkeys(
    ("roberta", "xlm-roberta", "camembert", "electra"), TWO_LAYERS
)
# Two blocks of six layers; 3 of them stay dense but in ELECTRA; BERT's pooler is sparse.
SPARSE = {"bert": 10, "roberta": 9, "xlm-roberta": 9, "camembert": 9, "distilbert": 9, "electra": 12}


def build(kind, task="question_answering"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = encoder_from_config(CONFIGS[kind] | {"model_type": kind}, task, LABELS[task])
        with torch.no_grad():  # weights of 0.02 make every output alike
            for parameter in encoder.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return encoder.eval()


def inputs(kind="bert"):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 96, (2, 12), generator=generator)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    ids[mask == 0] = 0 if kind in ("bert", "distilbert", "electra") else 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(12) >= 6).long().expand(2, 12)}


def test_every_architecture_is_tested():
    assert tuple(CONFIGS) == ENCODER_TYPES


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_outputs_are_those_of_transformers(kind, task):
    encoder, batch = build(kind, task), inputs(kind)
    out = encoder(**batch)
    if kind not in ("bert", "electra"):
        batch.pop("token_type_ids")
    theirs = encoder.model(**batch)
    if task == "question_answering":
        assert type(out) is QuestionAnsweringOutput
        assert torch.equal(out.start_logits, theirs.start_logits)
        assert torch.equal(out.end_logits, theirs.end_logits)
        assert out.start_logits.shape == (2, 12)
    else:
        assert type(out) is SequenceClassificationOutput
        assert torch.equal(out.logits, theirs.logits)
        assert out.logits.shape == (2, LABELS[task] or 1)


@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_segments_count_where_there_are_some(kind):
    encoder, batch = build(kind), inputs(kind)
    zero = encoder(**(batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])})).start_logits
    assert torch.equal(encoder(batch["input_ids"], batch["attention_mask"]).start_logits, zero)
    assert torch.equal(encoder(**batch).start_logits, zero) == (kind not in ("bert", "electra"))


@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_padding_does_not_change_the_rest(kind):
    encoder, batch = build(kind), inputs(kind)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["attention_mask"][1, 8:] = 0
    short = {name: tensor[1:, :8] for name, tensor in batch.items()}
    torch.testing.assert_close(encoder(**other).start_logits[1:, :8], encoder(**short).start_logits)


@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_a_sequence_that_is_too_long(kind):
    encoder = build(kind)
    assert encoder.max_length == (38 if kind in ("roberta", "xlm-roberta", "camembert") else 40)
    encoder(torch.full((1, encoder.max_length), 5))
    with pytest.raises(ValueError, match=rf"\(1, {encoder.max_length + 1}\), expected .* T <= {encoder.max_length}"):
        encoder(torch.full((1, encoder.max_length + 1), 5))


# ---------------------------------------------------------------------------------------------------- sparse


@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_layers_that_stay_dense(kind):
    for task in LABELS:
        encoder = build(kind, task)
        dense = {choice.name for choice in choose_layers(encoder, SLoPeConfig()) if choice.reason is not None}
        question = task == "question_answering"
        assert dense == FIRST[kind] | ({"model.qa_outputs"} if question else HEADS[kind])
        layers = sparsify(encoder, SLoPeConfig())
        expected = SPARSE[kind] - (question and kind == "bert")
        assert len(layers) == expected


@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_models_of_transformers_themselves_have_the_same_dense_layers(kind):
    """Without :class:`Encoder`: XLM-RoBERTa and CamemBERT define their head first."""
    encoder = build(kind, "classification")
    dense = {choice.name for choice in choose_layers(encoder.model, SLoPeConfig()) if choice.reason is not None}
    assert dense == {name.removeprefix("model.") for name in FIRST[kind] | HEADS[kind]}


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_a_step_of_calibrated_sparse_training(kind, task):
    config = SLoPeConfig(mask_calibration_batches=1, adapter_rank=4)
    encoder, batch = build(kind, task), inputs(kind)
    layers = sparsify(encoder, config, norms=activation_norms(encoder, config, [batch]))
    masks = {name: layer.forward_mask() for name, layer in layers.items()}
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        out = encoder(**batch)
        if task == "question_answering":
            loss = F.cross_entropy(out.start_logits, torch.tensor([3, 1]))
        elif task == "classification":
            loss = F.cross_entropy(out.logits, torch.tensor([0, 2]))
        else:
            loss = F.mse_loss(out.logits[:, 0], torch.tensor([0.5, -0.5]))
        optimizer.zero_grad()
        loss.backward()
        assert all(layer.values.grad.abs().sum() > 0 for name, layer in layers.items() if not name.endswith("key"))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.forward_mask(), masks[name]) for name, layer in layers.items())


def test_a_sparse_encoder_goes_back_into_a_dense_one():
    encoder, batch = build("roberta", "classification"), inputs("roberta")
    sparsify(encoder, SLoPeConfig())
    other = encoder_from_config(encoder.config.to_dict(), "classification", 3).eval()
    other.load_state_dict(dense_state_dict(encoder))
    torch.testing.assert_close(other(**batch).logits, encoder(**batch).logits)


# ---------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every family's encoder, saved in float16 with a head for two classes."""
    root = tmp_path_factory.mktemp("encoders")
    for kind in ENCODER_TYPES:
        build(kind, "regression").model.half().save_pretrained(root / kind)
    return root


@pytest.mark.parametrize("kind", ENCODER_TYPES)
@pytest.mark.parametrize("task", LABELS)
def test_a_folder(folders, kind, task):
    encoder = load_encoder(folders / kind, task, LABELS[task])
    assert isinstance(encoder, Encoder)
    assert encoder.training
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}, "the default dtype, not the file's"
    source = build(kind, "regression").half().float()
    own, theirs = encoder.state_dict(), source.state_dict()
    shared = [name for name in own if not any(head in name for head in ("classifier", "qa_outputs", "pooler"))]
    assert len(shared) > 30
    assert all(torch.equal(own[name], theirs[name]) for name in shared)
    if task == "regression":  # the head is in the file; that of three classes is fresh
        torch.testing.assert_close(encoder.eval()(**inputs(kind)), source.eval()(**inputs(kind)))


def test_dropout_can_be_set(folders):
    encoder = load_encoder(folders / "bert", "question_answering", hidden_dropout_prob=0.25)
    assert {m.p for m in encoder.modules() if isinstance(m, nn.Dropout)} >= {0.25}
    with pytest.raises(ValueError, match="a bert config has no hidden_droput"):
        load_encoder(folders / "bert", "question_answering", hidden_droput=0.25)


def test_minilm_is_a_bert():
    folder = minilm_dir()
    encoder = load_encoder(folder, "question_answering").eval()
    ours = BertForQuestionAnswering(load_config(folder)).eval()
    load_pretrained(ours, folder)
    with torch.no_grad():
        ours.qa_outputs.weight.copy_(encoder.model.qa_outputs.weight)
        ours.qa_outputs.bias.copy_(encoder.model.qa_outputs.bias)
        batch = {name: tensor % 30522 for name, tensor in inputs().items()}
        mine, theirs = ours(**batch), encoder(**batch)
    valid = batch["attention_mask"].bool()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a[valid], b[valid], atol=1e-5, rtol=1e-4)
    layers = sparsify(encoder, SLoPeConfig())
    assert len(layers) == 6 * 6 - 3
    assert not any(name.startswith("model.bert.encoder.layer.0.attention.self") for name in layers)
    assert sparse_layers(encoder) == layers


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("ranking", None, "task='ranking' is unknown; choose one of question_answering"),
        ("classification", None, "num_labels=None for classification; give the number"),
        ("classification", 1, "num_labels=1"),
        ("regression", 2, "num_labels=2 for regression, which has 1"),
        ("question_answering", 3, "num_labels=3 for question_answering, which has 2"),
    ],
)
def test_tasks_and_labels(folders, task, labels, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(folders / "bert", task, labels)
    with pytest.raises(ValueError, match=message):
        encoder_from_config(SMALL | {"model_type": "bert"}, task, labels)


def test_other_architectures(tmp_path):
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"it is a gpt2, expected an encoder: bert, roberta.*MiniLM is a bert"):
        load_encoder(tmp_path / "gpt2", "regression")
    with pytest.raises(ValueError, match="model_type is 'gpt2', expected an encoder"):
        encoder_from_config(config.to_dict(), "regression")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"model_type": "hyperbert"}')
    with pytest.raises(ValueError, match=r"hyperbert.*expected an encoder"):
        load_encoder(tmp_path / "new", "regression")


def test_weights_of_another_model(tmp_path, folders):
    build("bert", "regression").model.save_pretrained(tmp_path)
    state = {name: torch.zeros(2) for name in ("something", "else")}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PretrainedMismatchError, match=r"lack \d+ tensors of the bert encoder \(bert\.embeddings"):
        load_encoder(tmp_path, "regression")


def test_folders_that_are_none(tmp_path):
    with pytest.raises(PretrainedFilesError, match="No such folder"):
        load_encoder(tmp_path / "nowhere", "regression")
    with pytest.raises(PretrainedFilesError, match="No such folder"):
        load_encoder("./models/mine", "regression")
    with pytest.raises(PretrainedFilesError, match=r"has no config\.json"):
        load_encoder(tmp_path, "regression")
    build("bert").config.save_pretrained(tmp_path)
    with pytest.raises(PretrainedFilesError, match="lacks files"):
        load_encoder(tmp_path, "regression")


def test_the_hub_does_not_answer(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", offline)
    with pytest.raises(PretrainedUnavailableError, match=r"roberta-base could not be fetched.*couldn't connect"):
        load_encoder("FacebookAI/roberta-base", "regression")


def test_transformers_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'slope_pl\[hf\]'"):
        load_encoder("FacebookAI/roberta-base", "regression")
    with pytest.raises(ImportError, match="not installed"):
        encoder_from_config(SMALL | {"model_type": "bert"}, "regression")
