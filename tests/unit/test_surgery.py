"""Putting sparse layers into models nobody here has seen, and taking them out again."""

import copy
import itertools
import logging

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from slope_pl import SLoPeConfig, SparseLinear, dense_state_dict, densify, sparse_layers, sparsify, wake_adapters
from slope_pl.errors import ConversionError
from slope_pl.nn import choose_layers, is_head, is_linear, layer_seed
from tests.unit.reference import gaussian, mask_of

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
LLAMA = {**BERT, "num_key_value_heads": 2}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "vocab_size": 96,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 96}

MODELS = {
    "bert": lambda: hf.BertForPreTraining(hf.BertConfig(**BERT)),
    "bert_qa": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BERT)),
    "bert_classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTILBERT)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, vocab_size=96)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
}
FIRST, HEAD, TIED = "first linear layer", "output head", "tied to"


def firsts(prefix, *names):
    return dict.fromkeys((f"{prefix}.{name}" for name in names), FIRST)


BERT_FIRST = firsts("bert.encoder.layer.0.attention.self", "query", "key", "value")
DENSE = {
    "bert": BERT_FIRST | {"cls.predictions.decoder": TIED, "cls.seq_relationship": HEAD},
    "bert_qa": BERT_FIRST | {"qa_outputs": HEAD},
    "bert_classifier": BERT_FIRST | {"classifier": HEAD},
    "gpt2": firsts("transformer.h.0.attn", "c_attn") | {"lm_head": TIED},
    "distilbert": firsts("distilbert.transformer.layer.0.attention", "q_lin", "k_lin", "v_lin")
    | {"vocab_projector": TIED},
    "opt": firsts("model.decoder.layers.0.self_attn", "q_proj", "k_proj", "v_proj") | {"lm_head": TIED},
    "llama": firsts("model.layers.0.self_attn", "q_proj", "k_proj", "v_proj") | {"lm_head": HEAD},
}
SPARSE = {
    "bert": ["bert.pooler.dense", "cls.predictions.transform.dense", "bert.encoder.layer.0.attention.output.dense"],
    "bert_classifier": ["bert.pooler.dense"],
    "gpt2": ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc"],
    "distilbert": ["vocab_transform", "distilbert.transformer.layer.1.attention.q_lin"],
    "opt": ["model.decoder.layers.0.fc1"],
    "llama": ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"],
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model):
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids)[0]


def mlp(*widths):
    torch.manual_seed(0)
    widths = widths or (16, 32, 32, 16)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


class Named(nn.Module):
    """Modules under chosen names, dotted ones included."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


# ------------------------------------------------------------------------------------------------ which layers


@pytest.mark.parametrize("name", MODELS)
def test_the_rule_on_models_of_hugging_face(name):
    model = build(name)
    linear = {n for n, module in model.named_modules() if is_linear(module)}
    reasons = {choice.name: choice.reason for choice in choose_layers(model, SLoPeConfig())}
    layers = sparsify(model)
    assert set(layers) == linear - set(DENSE[name])
    assert set(SPARSE.get(name, [])) <= set(layers)
    for dense, reason in DENSE[name].items():
        assert reason in reasons[dense]
        assert is_linear(model.get_submodule(dense))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapters", [False, True])
def test_densify_gives_the_same_logits_and_classes(name, adapters):
    model = build(name)
    classes = {n: type(module) for n, module in model.named_modules()}
    layers = sparsify(model, SLoPeConfig(mask="transposable", adapter_rank=4 if adapters else 0))
    if adapters:
        assert wake_adapters(model) == len(layers)
        for layer in layers.values():
            nn.init.normal_(layer.adapter_up, std=0.1)
    before = logits(model)
    result = densify(model)
    assert set(result) == set(layers)
    assert {n: type(module) for n, module in model.named_modules()} == classes
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert densify(model) == {}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapters", [False, True])
def test_dense_state_dict_loads_strictly_into_a_fresh_dense_model(name, adapters):
    model = build(name)
    layers = sparsify(model, SLoPeConfig(adapter_rank=4 if adapters else 0))
    wake_adapters(model)
    for layer in layers.values() if adapters else ():
        nn.init.normal_(layer.adapter_up, std=0.1)
    state = dense_state_dict(model)
    assert set(sparse_layers(model)) == set(layers)
    fresh = build(name)
    fresh.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)
    densify(model)
    assert set(model.state_dict()) == set(state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_pruned_entries_of_the_dense_state_are_zero_and_kept_ones_unchanged():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    for name, layer in sparsify(model).items():
        weight = dense_state_dict(model)[f"{name}.weight"]
        assert torch.equal(weight, before[f"{name}.weight"] * mask_of(layer.indices))


@pytest.mark.parametrize("grad", [False, True])
def test_torchs_encoder_agrees_with_and_without_its_fast_path(grad):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    assert set(sparsify(encoder)) == {"layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"}
    x = gaussian(2, 5, 32)
    trained = encoder.train()(x)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(encoder.eval()(x), trained)


@pytest.mark.parametrize(
    ("settings", "sparse"),
    [
        ({}, {"1", "2"}),
        ({"keep_first_dense": False}, {"0", "1", "2"}),
        ({"exclude": ["2"]}, {"1"}),
        ({"include": ["2"]}, {"2"}),
        ({"include": ["[12]"]}, {"1", "2"}),
        ({"include": ["*"]}, {"1", "2"}),  # a wildcard is no explicit request: the rules hold
        ({"include": ["0", "1"]}, {"0", "1"}),  # a plain name is one
        ({"include": ["*"], "exclude": ["1"]}, {"2"}),
    ],
)
def test_include_and_exclude(settings, sparse):
    assert set(sparsify(mlp(), SLoPeConfig(**settings))) == sparse


@pytest.mark.parametrize(
    ("settings", "sparse"),
    [
        ({}, {"fc"}),
        ({"keep_heads_dense": False}, {"fc", "lm_head"}),
        ({"include": ["fc", "lm_head"]}, {"fc", "lm_head"}),
        ({"include": ["fc", "wide"]}, {"fc", "wide"}),
    ],
)
def test_heads_and_lopsided_layers_become_sparse_only_on_request(settings, sparse):
    def linear(d_in, d_out):
        return nn.Linear(d_in, d_out)

    model = Named(
        embed=linear(8, 16), fc=linear(16, 80), wide=linear(16, 88), odd=linear(16, 12), lm_head=linear(16, 16)
    )
    assert set(sparsify(model, SLoPeConfig(**settings))) == sparse


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("lm_head", True),
        ("cls.predictions.decoder", True),
        ("model.score", True),
        ("classifier.dense", True),
        ("lm_head.transform", True),
        ("decoder.layers.0.fc1", False),
        ("bert.pooler.dense", False),
        ("header.fc", False),
        ("attention.heads", False),
    ],
)
def test_names_of_heads(name, head):
    assert is_head(name) == head


def test_first_layer_has_no_siblings_unless_it_is_a_query_key_or_value():
    model = Named(a=nn.Linear(16, 16), query=nn.Linear(16, 16), b=nn.Linear(16, 16))
    assert set(sparsify(model)) == {"query", "b"}
    model = Named(to_q=nn.Linear(16, 16), to_k=nn.Linear(16, 16), to_out=nn.Linear(16, 16), to_v=nn.Linear(16, 16))
    assert set(sparsify(model)) == {"to_out"}


def test_subclasses_of_linear_stay_as_they_are():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(*mlp(), Special(16, 16))
    sparsify(model)
    assert type(model[3]) is Special


def test_reasons_of_dense_layers_are_logged(caplog):
    model = Named(
        a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 12), d=nn.Linear(16, 12), head=nn.Linear(16, 16)
    )
    with caplog.at_level(logging.INFO, logger="slope_pl"):
        sparsify(model)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("slope_pl")] == [
        "1 linear layer stays dense: first linear layer after the input: a",
        "2 linear layers stay dense: 12x16: both sides must be multiples of 8: c, d",
        "1 linear layer stays dense: output head: head",
    ]


# ------------------------------------------------------------------------------------------------ identity


def test_biases_and_dense_layers_are_the_same_objects_before_and_after():
    model = build("gpt2")
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    untouched = {
        n: p for n, p in model.named_parameters() if not n.endswith(("c_proj.weight", "c_fc.weight", "c_attn.weight"))
    }
    layers = sparsify(model)
    for name in (*biases, *untouched):
        assert model.get_parameter(name) is {**biases, **untouched}[name]
    assert len([n for n in layers if f"{n}.bias" in biases]) == len(layers) == 7
    densify(model)
    assert all(model.get_parameter(name) is p for name, p in biases.items())


def test_a_second_call_changes_nothing():
    model = mlp()
    first = sparsify(model, SLoPeConfig(seed=3))
    state = copy.deepcopy(model.state_dict())
    again = sparsify(model, SLoPeConfig(seed=3))
    assert first.keys() == again.keys()
    assert all(first[name] is again[name] for name in first)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_shared_module_stays_shared_both_ways():
    shared = nn.Linear(16, 16)
    model = Named(first=nn.Linear(16, 16), a=shared, b=shared, inner=Named(c=shared))
    assert list(sparsify(model)) == ["a"]
    assert model.a is model.b is model.inner.c
    state = dense_state_dict(model)
    assert list(densify(model)) == ["a"]
    assert model.a is model.b is model.inner.c
    assert type(model.a) is nn.Linear
    Named(first=nn.Linear(16, 16), a=shared, b=shared, inner=Named(c=shared)).load_state_dict(state, strict=True)


def test_tied_weights_stay_dense_and_tied():
    embedding, head = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
    head.weight = embedding.weight
    model = Named(embed=embedding, a=nn.Linear(16, 16), b=nn.Linear(16, 16), out=head)
    assert set(sparsify(model)) == {"b"}
    assert model.out.weight is model.embed.weight


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_dtype_carry_over(training):
    model = mlp().to(torch.bfloat16).train(training)
    for layer in sparsify(model).values():
        assert layer.training == training
        assert layer.values.dtype == torch.bfloat16
    for layer in densify(model).values():
        assert layer.training == training
        assert layer.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ ranks and seeds


@pytest.mark.parametrize("mask", ["magnitude", "random", "transposable"])
def test_every_rank_converts_alike_and_leaves_the_global_generator_alone(mask):
    ranks = [mlp(), mlp()]
    for rank, model in enumerate(ranks):
        torch.manual_seed(rank)
        before = torch.get_rng_state()
        sparsify(model, SLoPeConfig(mask=mask, adapter_rank=2))
        assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in ranks[0].state_dict().items():
        assert torch.equal(tensor, ranks[1].state_dict()[name]), name


def test_layers_of_one_shape_get_masks_and_adapters_of_their_own():
    layers = sparsify(mlp(64, 64, 64, 64), SLoPeConfig(mask="random", adapter_rank=2))
    assert not torch.equal(layers["1"].indices, layers["2"].indices)
    assert not torch.equal(layers["1"].adapter_down, layers["2"].adapter_down)
    assert layer_seed(0, "1") != layer_seed(0, "2")


@pytest.mark.parametrize("name", ["indices", "adapter_down"])
def test_the_configured_seed_matters(name):
    first, other = (sparsify(mlp(), SLoPeConfig(mask="random", adapter_rank=2, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first["1"].state_dict()[name], other["1"].state_dict()[name])


@pytest.mark.parametrize("seed", [2**32, 2**63])
def test_any_seed_that_the_config_accepts_works(seed):
    sparsify(mlp(), SLoPeConfig(mask="random", seed=seed))


@pytest.mark.parametrize("mask", ["random", "transposable"])
def test_the_default_device_does_not_matter(mask):
    # Lightning builds models under `with torch.device(root_device)`; meta shows on a CPU what cuda would do.
    model, expected = mlp(), mlp()
    config = SLoPeConfig(mask=mask, adapter_rank=2)
    sparsify(expected, config)
    with torch.device("meta"):
        sparsify(model, config)
    assert torch.equal(model[1].indices, expected[1].indices)
    assert torch.equal(model[1].adapter_down, expected[1].adapter_down)


def test_densify_leaves_the_global_generator_alone():
    model = nn.Sequential(nn.Linear(16, 16), Conv1D(16, 16))
    sparsify(model)
    before = torch.get_rng_state()
    densify(model)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.usefixtures("process_group")
def test_a_model_in_ddp_is_refused_in_both_directions(inner):
    wrapped = DistributedDataParallel(mlp())
    model = Named(net=wrapped) if inner else wrapped
    where = "net" if inner else "the model"
    for surgery in (sparsify, densify):
        with pytest.raises(ConversionError, match=f"{where} is wrapped as DistributedDataParallel already"):
            surgery(model)


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_refused():
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(ConversionError, match="the model is wrapped as FSDP"):
        sparsify(fully_shard(mlp(), mesh=mesh))
    model = mlp()
    model[1].weight = nn.Parameter(DTensor.from_local(model[1].weight.detach(), mesh))
    with pytest.raises(ConversionError, match=r"parameter '1.weight' is sharded already \(DTensor\)"):
        sparsify(model)


def test_a_refused_request_leaves_the_model_as_it_was():
    model = mlp(16, 16, 12)
    before = list(model)
    with pytest.raises(ConversionError, match="layer '1' is asked for in include"):
        sparsify(model, SLoPeConfig(include=["0", "1"]))
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_a_layer_whose_weight_is_computed_stays_dense():
    model = mlp()
    nn.utils.prune.l1_unstructured(model[1], "weight", amount=0.5)
    assert set(sparsify(model)) == {"2"}


def test_forward_hooks_survive_the_surgery():
    model, calls = mlp(), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    sparsify(model)
    model(gaussian(2, 16))
    assert calls == [1]


def test_a_linear_model_itself_cannot_be_replaced_but_a_sparse_one_has_a_dense_state():
    layer = SparseLinear(16, 16)
    state = dense_state_dict(layer)
    nn.Linear(16, 16).load_state_dict(state, strict=True)
    assert sparsify(layer) == {"": layer}
    with pytest.raises(ConversionError, match="the model itself is a linear layer"):
        densify(layer)
