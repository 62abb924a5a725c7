"""BERT against transformers: mathematics, dropout, compilation, configuration."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn import functional as F

from slope_pl.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    load_config,
    load_pretrained,
)
from tests.helpers import minilm_dir
from tests.unit.bert_cases import KINDS, MINI, OUTPUTS, batch, build, build_theirs, difference, randomise, same_outputs

# --- the mathematics, against transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_logits_equal_transformers_for_every_head_and_activation(kind, act):
    config = replace(MINI, hidden_act=act, layer_norm_eps=1e-3)
    theirs, ours = build_theirs(kind, config), build(kind, config, seed=9)
    inputs = batch()
    assert difference(kind, ours, theirs, inputs) > 0.1
    ours.load_state_dict(theirs.state_dict())  # strict: every name is Hugging Face's
    assert difference(kind, ours, theirs, inputs) < 1e-5
    assert difference(kind, ours, theirs, {"input_ids": inputs["input_ids"]}) < 1e-5
    positions = torch.arange(16).flip(0).expand(2, 16)
    assert difference(kind, ours, theirs, inputs | {"position_ids": positions}) < 1e-5


@pytest.mark.parametrize("kind", ["pretraining", "qa", "classification"])
def test_bert_large_logits_equal_transformers(kind):
    config = BertConfig.large()
    # Theirs takes the tensors of ours: one BERT-Large in memory, and transformers' slow initialisation is skipped.
    torch.manual_seed(0)
    ours = randomise(BertForSequenceClassification(config, 3) if kind == "classification" else KINDS[kind][0](config))
    content = config.to_dict() | {"num_labels": 3 if kind == "classification" else 2}
    with torch.device("meta"):
        theirs = KINDS[kind][1](transformers.BertConfig.from_dict(content))
    buffers = {"position_ids": torch.arange(512)[None], "token_type_ids": torch.zeros(1, 512, dtype=torch.int64)}
    for name, buffer in buffers.items():
        setattr(theirs.bert.embeddings, name, buffer)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    inputs = batch(config, size=1)
    assert difference(kind, ours.eval(), theirs.eval(), inputs) < 1e-5


def test_minilm_hidden_states_equal_transformers():
    folder = minilm_dir()
    ours = BertModel(load_config(folder)).eval()
    report = load_pretrained(ours, folder)
    assert report.missing == report.unexpected == ()
    assert len(report.loaded) == len(list(ours.parameters()))
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    assert difference("base", ours, theirs, batch(ours.config, length=64)) < 1e-5


@pytest.mark.parametrize("kind", ["base", "pretraining"])
@torch.no_grad()
def test_hidden_states_equal_transformers(kind):
    theirs, ours, inputs = build_theirs(kind), build(kind, seed=9), batch()
    ours.load_state_dict(theirs.state_dict())
    without = ours(**inputs)
    assert not hasattr(without, "hidden_states"), "outputs can be unpacked as ever"
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        expected = theirs(**given, output_hidden_states=True).hidden_states
        found = ours(**given, output_hidden_states=True).hidden_states
        assert isinstance(found, tuple)
        assert len(found) == len(expected) == MINI.num_hidden_layers + 1
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert all((a - b).abs().max() > 0.1 for a, b in zip(found[1:], found, strict=False))
    asked = ours(**inputs, output_hidden_states=True)
    assert all(torch.equal(getattr(asked, name), getattr(without, name)) for name in OUTPUTS[kind])
    if kind == "base":
        assert torch.equal(asked.hidden_states[-1], asked.last_hidden_state)


def test_hidden_states_carry_gradients_and_come_with_masked_positions():
    model, inputs = build("pretraining"), batch()
    asked = model(**inputs, masked_positions=torch.tensor([[3], [0]]), output_hidden_states=True)
    assert [tuple(state.shape) for state in asked.hidden_states] == [(2, 16, 32)] * 4  # of all positions
    assert torch.equal(asked.pooler_output, model.bert(**inputs).pooler_output)
    assert not hasattr(model(**inputs), "pooler_output")
    none = model(**inputs, masked_positions=torch.empty(2, 0, dtype=torch.int64), output_hidden_states=True)
    assert tuple(none.prediction_logits.shape) == (2, 0, 97)
    for name in ("hidden_states", "pooler_output", "seq_relationship_logits"):
        torch.testing.assert_close(getattr(none, name), getattr(asked, name), rtol=0, atol=0)
    asked.hidden_states[1].square().sum().backward()
    layers = model.bert.encoder.layer
    assert layers[0].output.dense.weight.grad.abs().max() > 0
    assert layers[1].output.dense.weight.grad is None


def test_large_and_base_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in BertModel(c).parameters()) for c in (BertConfig.base(), BertConfig.large())]
    assert counts == [109_482_240, 335_141_888]


def test_initialisation_is_normal_with_zero_biases_and_a_zero_row_for_padding():
    torch.manual_seed(0)
    config = replace(MINI, hidden_size=128, initializer_range=0.02, pad_token_id=5)
    for model in (
        BertForPreTraining(config),
        BertForQuestionAnswering(config),
        BertForSequenceClassification(config, 9),
    ):
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                assert (parameter == 1).all(), name
            elif name.endswith("bias"):
                assert (parameter == 0).all(), name
            else:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        words = model.bert.embeddings.word_embeddings.weight
        assert (words.abs().sum(1) == 0).nonzero().flatten().tolist() == [5]


# --- masking, positions, dropout, gradients, compilation -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_padding_does_not_change_the_other_tokens(dtype):
    model, inputs = build("base"), batch()
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    changed = {k: v.clone() for k, v in inputs.items()}
    changed["input_ids"][-1, -5:] = 3
    a, b = model(**inputs).last_hidden_state, model(**changed).last_hidden_state
    assert torch.equal(a[-1, :-5], b[-1, :-5])
    assert not torch.equal(a[-1, -5:], b[-1, -5:])
    unmasked = model(inputs["input_ids"], None, inputs["token_type_ids"]).last_hidden_state
    assert (a[-1, :-5] - unmasked[-1, :-5]).abs().max() > 0.01
    torch.testing.assert_close(a[0], unmasked[0])


def test_masked_positions_give_the_logits_and_gradients_of_those_positions():
    model, inputs = build("pretraining"), batch()
    positions = torch.tensor([[3, 1, 15], [0, 7, 7]])
    full = model(**inputs)
    part = model(**inputs, masked_positions=positions)
    assert part.prediction_logits.shape == (2, 3, 97)
    assert torch.equal(part.seq_relationship_logits, full.seq_relationship_logits)
    expected = torch.stack([full.prediction_logits[b, positions[b]] for b in range(2)])
    torch.testing.assert_close(part.prediction_logits, expected, rtol=0, atol=1e-5)

    weight = model.bert.encoder.layer[0].attention["self"].query.weight
    (of_part,) = torch.autograd.grad(part.prediction_logits.square().sum(), weight)
    (of_full,) = torch.autograd.grad(expected.square().sum(), weight)
    assert of_full.abs().max() > 0
    torch.testing.assert_close(of_part, of_full, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind):
    model, inputs = build(kind), batch()
    assert same_outputs(model, model, inputs)
    model.train()
    assert not same_outputs(model, model, inputs)


@pytest.mark.parametrize(
    ("kind", "field", "count"),
    [
        # Hidden dropout: one after the embeddings, two in each of the three layers, one before the classifier only.
        ("base", "hidden_dropout_prob", 7),
        ("qa", "hidden_dropout_prob", 7),
        ("pretraining", "hidden_dropout_prob", 7),
        ("classification", "hidden_dropout_prob", 8),
        ("base", "attention_probs_dropout_prob", 3),
    ],
)
def test_each_dropout_of_the_original_is_there_once_with_its_rate(kind, field, count, monkeypatch):
    rates = []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def spy_dropout(x, p=0.5, training=True, inplace=False):
        rates.append(p if training else 0.0)
        return dropout(x, p, training, inplace)

    def spy_attention(*args, dropout_p=0.0, **kwargs):
        rates.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "dropout", spy_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy_attention)
    rate_of_both = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | {field: 0.25}
    model = build(kind, replace(MINI, **rate_of_both)).train()
    model(**batch())
    assert [rate for rate in rates if rate] == [0.25] * count
    rates.clear()
    model.eval()(**batch())
    assert not any(rates)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_random_numbers_training_equals_transformers(kind):
    theirs, ours, inputs = build_theirs(kind).train(), build(kind, seed=9).train(), batch()
    ours.load_state_dict(theirs.state_dict())
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(model(**inputs))
    for name in OUTPUTS[kind]:
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name), rtol=0, atol=1e-5)


def test_attention_dropout_keeps_the_expectation():
    config = replace(MINI, attention_probs_dropout_prob=0.3)
    attention = build("base", config).encoder.layer[0].attention["self"]
    torch.manual_seed(0)
    x = torch.randn(1, 8, 32).expand(4096, 8, 32)
    with torch.no_grad():
        exact = attention(x[:1], None)
        samples = attention.train()(x, None)
    error = samples.std(0) / 4096**0.5
    assert (error > 0).all()
    assert ((samples.mean(0) - exact[0]).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind):
    model = build(kind)
    outputs = model(**batch())
    torch.manual_seed(2)
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_full_graph_equals_eager(kind):
    torch.compiler.reset()
    model, inputs = build(kind), batch()
    if kind == "pretraining":
        inputs["masked_positions"] = torch.tensor([[3, 1, 15], [0, 7, 7]])
    # Backend eager: what is tested is that dynamo captures one graph; the kernels of inductor are not ours.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for a, b in zip(compiled(**inputs), model(**inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_only_modules_are_called_so_that_surgery_can_replace_them():
    class Opaque(torch.nn.Module):
        """A layer without a weight, as a sparse one may be."""

        def __init__(self, linear):
            super().__init__()
            self.compute = linear.forward

        def forward(self, x):
            return self.compute(x)

    model, inputs = build("pretraining"), batch()
    expected = model(**inputs).prediction_logits
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith("decoder"):
            model.set_submodule(name, Opaque(module))
    assert sum(isinstance(m, Opaque) for m in model.modules()) == 3 * 6 + 3
    assert torch.equal(model(**inputs).prediction_logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_ids": torch.ones(5, dtype=torch.int64)},
            r"input_ids has shape \(5,\), expected \(B, T\) with T <= 24",
        ),
        ({"input_ids": torch.ones(2, 25, dtype=torch.int64)}, r"input_ids has shape \(2, 25\).*T <= 24"),
        ({"attention_mask": torch.ones(2, 15)}, r"attention_mask has shape \(2, 15\), expected.*\(2, 16\)"),
        ({"attention_mask": torch.zeros(2, 16)}, "attention_mask is torch.float32, expected bool or integers"),
        ({"token_type_ids": torch.ones(1, 16)}, r"token_type_ids has shape \(1, 16\), expected.*\(2, 16\)"),
        ({"position_ids": torch.ones(15)}, r"position_ids has shape \(15,\), expected \(2, 16\) or \(16,\)"),
        ({"masked_positions": torch.ones(3, 2)}, r"masked_positions has shape \(3, 2\), expected \(B, P\) with B = 2"),
    ],
)
def test_forward_refuses_wrong_shapes_and_float_masks(change, message):
    with pytest.raises(ValueError, match=message):
        build("pretraining")(**(batch() | change))


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="num_labels=0, expected at least 1"):
        BertForSequenceClassification(MINI, 0)


# --- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("vocab_size", 0, "an integer of at least 1"),
        ("hidden_size", 768.0, "an integer of at least 1"),
        ("num_hidden_layers", True, "an integer of at least 1"),
        ("num_attention_heads", 5, "a divisor of hidden_size=768"),
        ("hidden_act", "swish", "one of"),
        ("hidden_dropout_prob", 1.0, r"a number in \[0, 1\)"),
        ("attention_probs_dropout_prob", float("nan"), r"a number in \[0, 1\)"),
        ("hidden_dropout_prob", "0.1", r"a number in \[0, 1\)"),
        ("initializer_range", -0.02, "a positive number"),
        ("layer_norm_eps", 0.0, "a positive number"),
        ("layer_norm_eps", float("inf"), "a positive number"),
        ("pad_token_id", 30522, r"None or an integer in \[0, vocab_size=30522\)"),
    ],
)
def test_config_refuses_naming_field_value_and_expectation(field, value, expected):
    with pytest.raises(ValueError, match=rf"BertConfig: {field}={value!r}, expected {expected}.*; .+\."):
        BertConfig(**{field: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
        ("classifier_dropout", 0.3),
        ("hidden_act", "silu"),
    ],
)
def test_from_dict_refuses_other_mathematics(key, value):
    with pytest.raises(ValueError, match=f"BertConfig: {key}="):
        BertConfig.from_dict(MINI.to_dict() | {key: value})


def test_from_dict_reads_what_transformers_writes_and_to_dict_gives_it_back():
    content = transformers.BertConfig(hidden_size=36, classifier_dropout=0.1, pad_token_id=None).to_dict()
    config = BertConfig.from_dict(content)
    assert config == BertConfig(hidden_size=36, pad_token_id=None)
    assert BertConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["model_type"] == "bert"


def test_large_takes_overrides():
    config = BertConfig.large(vocab_size=30528, num_hidden_layers=2)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (1024, 16, 4096)
    assert (config.vocab_size, config.num_hidden_layers) == (30528, 2)
