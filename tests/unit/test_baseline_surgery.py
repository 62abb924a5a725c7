"""Which layers the baselines mask, and back; their settings."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slope_pl import ConfigError, ConversionError, SLoPeConfig, sparsify
from slope_pl.baselines import (
    FSTConfig,
    SRSTEConfig,
    choose_feed_forward,
    mask_layers,
    masked_layers,
    unmask_layers,
)
from slope_pl.models import GPT2, BertConfig, BertForPreTraining, GPT2Config
from slope_pl.nn import layer_seed
from tests.unit.baseline_cases import F, T

# ---------------------------------------------------------------------------------------------------- surgery


def gpt2():
    return GPT2(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2))


def bert():
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForPreTraining(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16))


@pytest.mark.parametrize("make_model", [gpt2, bert])
def test_srste_masks_what_slope_makes_sparse(make_model):
    masked, sparse = make_model(), make_model()
    sparse_names = set(sparsify(sparse, SLoPeConfig(adapter_rank=4)))
    layers = mask_layers(masked, SRSTEConfig(adapter_rank=4))
    assert set(layers) == sparse_names
    assert set(masked_layers(masked)) == sparse_names
    for name, layer in layers.items():
        assert torch.equal(layer.adapter_down, sparse.get_submodule(name).adapter_down), name


def test_gpt2_layers():
    model = gpt2()
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = dense - set(mask_layers(model, SRSTEConfig()))
    assert left == {"h.0.attn.c_attn", "lm_head"}
    assert set(mask_layers(gpt2(), FSTConfig())) == {f"h.{i}.mlp.{x}" for i in (0, 1) for x in ("c_fc", "c_proj")}


def test_bert_layers():
    want = {f"bert.encoder.layer.{i}.{x}.dense" for i in (0, 1) for x in ("intermediate", "output")}
    assert set(mask_layers(bert(), FSTConfig())) == want


def test_feed_forward_by_name():
    names = {
        "model.layers.0.mlp.gate_proj": T,
        "transformer.layer.0.ffn.lin1": T,
        "encoder.block.0.layer.1.DenseReluDense.wi": T,
        "decoder.layers.0.fc1": T,
        "encoder.layer.0.output.dense": T,
        "encoder.layer.0.attention.output.dense": F,
        "pooler.dense": F,
        "attn.c_proj": F,
        "smlp.x": F,
    }
    model = nn.Module()
    for name in names:
        parent = model
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(8, 8))
    got = {c.name: c.reason is None for c in choose_feed_forward(model)}
    assert got == names


def test_targets():
    layers = mask_layers(gpt2(), FSTConfig(targets=["h.*.mlp.c_fc"]))
    assert set(layers) == {"h.0.mlp.c_fc", "h.1.mlp.c_fc"}
    assert all(layer.mask_kind == "transposable" and layer.mvue for layer in layers.values())
    with pytest.raises(ConversionError, match=r"include pattern 'h\.9\.\*' matches no linear layer"):
        mask_layers(gpt2(), FSTConfig(targets=["h.9.*"]))


def test_nothing_to_mask():
    with pytest.raises(ConversionError, match=r"not a feed-forward layer by its name.*targets"):
        mask_layers(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), FSTConfig())
    with pytest.raises(ConversionError, match="none of the 1 linear layers"):
        mask_layers(nn.Sequential(nn.Linear(8, 8)), SRSTEConfig())


def test_second_call_and_other_configs():
    model = gpt2()
    config = SRSTEConfig(adapter_rank=2)
    assert mask_layers(model, config) == mask_layers(model, SRSTEConfig(adapter_rank=2))
    with pytest.raises(ConversionError, match="masked already"):
        mask_layers(model, SRSTEConfig())
    with pytest.raises(ConversionError, match="masked already"):
        mask_layers(model, FSTConfig())
    sparse = gpt2()
    sparsify(sparse)
    with pytest.raises(ConversionError, match="SLoPe's sparse layers"):
        mask_layers(sparse, config)


@pytest.mark.parametrize("config", [SRSTEConfig(adapter_rank=2), FSTConfig()], ids=["srste", "fst"])
def test_unmask_computes_the_same(config):
    model, ids = gpt2().eval(), torch.randint(32, (2, 8))
    layers = mask_layers(model, config)
    for layer in layers.values():
        layer.wake_adapters()
        if layer.adapter_up is not None:
            nn.init.normal_(layer.adapter_up)
    want = model(ids)
    names = set(layers)
    assert set(unmask_layers(model)) == names
    assert not masked_layers(model)
    torch.testing.assert_close(model(ids), want)
    gpt2().load_state_dict(model.state_dict())


def test_conv1d_comes_back_as_conv1d():
    model = nn.Sequential(nn.Linear(8, 8), Conv1D(16, 8))
    mask_layers(model, SRSTEConfig())
    x = torch.randn(2, 8)
    want = model(x)
    unmask_layers(model)
    assert type(model[1]) is Conv1D
    torch.testing.assert_close(model(x), want)


def test_shared_layer_stays_shared():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "a": shared, "b": shared})
    assert set(mask_layers(model, SRSTEConfig())) == {"a"}
    assert model["a"] is model["b"]


def test_seed_of_the_adapters_is_the_layers_own():
    model = gpt2()
    layers = mask_layers(model, SRSTEConfig(adapter_rank=2, seed=3))
    name, layer = next(iter(layers.items()))
    want = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(layer_seed(3, name)))
    assert torch.equal(layer.adapter_down, want)


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make_config", "settings", "message"),
    [
        (SRSTEConfig, {"decay": -1e-6}, r"decay=-1e-06: a number of at least 0"),
        (SRSTEConfig, {"decay": float("nan")}, "decay=nan"),
        (SRSTEConfig, {"decay": "6e-6"}, "decay='6e-6'"),
        (SRSTEConfig, {"mask_refresh_steps": 0}, "mask_refresh_steps=0: an integer of at least 1"),
        (SRSTEConfig, {"backward_pruning": "input"}, "backward_pruning='input' is unknown; choose one of weight, grad"),
        (SRSTEConfig, {"adapter_rank": -1}, "adapter_rank=-1"),
        (SRSTEConfig, {"adapter_rank": 4, "adapter_fraction": 0}, "adapter_fraction=0: a fraction"),
        (SRSTEConfig, {"adapter_rank": 4, "adapter_fraction": 0.1, "adapter_start_step": 3}, "both set"),
        (SRSTEConfig, {"adapter_rank": 4, "adapter_rank_fraction": 0.1}, "both"),
        (SRSTEConfig, {"adapter_start_step": 3}, "no effect without adapters"),
        (SRSTEConfig, {"adapter_fraction": 0.5}, "no effect without adapters"),
        (SRSTEConfig, {"include": "mlp"}, "include='mlp': a list of patterns"),
        (SRSTEConfig, {"seed": -1}, "seed=-1"),
        (FSTConfig, {"targets": "mlp"}, "targets='mlp': a list of patterns"),
        (FSTConfig, {"mvue": "yes"}, "mvue='yes': True or False"),
        (FSTConfig, {"dense_finish_fraction": 1.5}, "dense_finish_fraction=1.5"),
        (FSTConfig, {"dense_finish_fraction": False}, "dense_finish_fraction=False"),
        (FSTConfig, {"dense_finish_fraction": 0.5, "dense_finish_step": 3}, "both set"),
        (FSTConfig, {"dense_finish_step": -3}, "dense_finish_step=-3"),
        (FSTConfig, {"decay": float("inf")}, "decay=inf"),
    ],
)
def test_bad_settings(make_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)


def test_defaults_are_as_published():
    assert (SRSTEConfig().decay, SRSTEConfig().mask_refresh_steps) == (6e-6, 1)
    assert (SRSTEConfig().backward_pruning, SRSTEConfig().adapter_fraction) == ("weight", 0.01)
    assert (FSTConfig().decay, FSTConfig().mask_refresh_steps, FSTConfig().mvue) == (6e-5, 40, True)
    assert FSTConfig().dense_finish_fraction == pytest.approx(50 / 300)


@pytest.mark.parametrize("config", [SRSTEConfig(adapter_rank=4, include=("a",)), FSTConfig(targets=("a", "b"))])
def test_mappings(config):
    assert type(config).coerce(config.to_dict()) == config
    assert type(config).coerce(config) is config
    with pytest.raises(ConfigError, match=r"unknown .*Config setting 'rank'; known are"):
        type(config).coerce({"rank": 4})
    with pytest.raises(ConfigError, match="got int"):
        type(config).coerce(3)
