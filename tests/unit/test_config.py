import dataclasses
import json

import pytest

from slope_pl.config import SLoPeConfig, as_config

CUSTOM = SLoPeConfig(
    mask="transposable",
    layer_masks={"*.mlp.*": "magnitude"},
    seed=3,
    backward_refresh_steps=None,
    adapter_rank_fraction=0.0625,
    adapter_start_step=7,
    include=("encoder.*",),
    exclude=["encoder.0"],
    keep_first_dense=False,
    backend="reference",
)


def test_defaults_are_the_papers():
    config = SLoPeConfig()
    assert (config.mask, config.backward_refresh_steps, config.adapter_rank) == ("magnitude", 100, 0)
    assert config.adapter_start == 0.99
    assert (config.keep_first_dense, config.keep_heads_dense) == (True, True)
    assert not config.has_adapters


@pytest.mark.parametrize("config", [SLoPeConfig(), CUSTOM], ids=["default", "custom"])
def test_a_config_survives_json_and_compares_equal(config):
    settings = json.loads(json.dumps(config.to_dict()))
    assert SLoPeConfig.from_dict(settings) == config
    assert hash(as_config(settings)) == hash(config)
    assert set(settings) == {field.name for field in dataclasses.fields(config)}


def test_the_first_pattern_that_matches_says_how_a_layer_is_masked():
    masks = {"*.mlp.up": "random", "*.mlp.*": "transposable"}
    config = SLoPeConfig(layer_masks=masks, adapter_rank=4)
    kinds = {name: config.for_layer(name) for name in ("h.0.mlp.up", "h.0.mlp.down", "h.0.attn.q")}
    assert [own.mask for own in kinds.values()] == ["random", "transposable", "magnitude"]
    assert all(own.layer_masks == {} and own.adapter_rank == 4 for own in kinds.values())
    assert SLoPeConfig().for_layer("h") == SLoPeConfig()
    masks.clear()
    assert config.mask_kinds == ("magnitude", "random", "transposable"), "a copy"


def test_lists_of_patterns_become_tuples():
    assert SLoPeConfig(include=["a", "b"]).include == ("a", "b")
    assert CUSTOM.exclude == ("encoder.0",)


def test_a_config_is_immutable_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CUSTOM.seed = 4
    with pytest.raises(TypeError, match="positional"):
        SLoPeConfig("random")


@pytest.mark.parametrize(
    ("settings", "shape", "rank"),
    [
        ({}, (64, 64), 0),
        ({"adapter_rank": 4}, (8, 4096), 4),
        ({"adapter_rank_fraction": 0.0625}, (1024, 4096), 64),
        ({"adapter_rank_fraction": 0.0625}, (4096, 1024), 64),
        ({"adapter_rank_fraction": 0.0625}, (768, 768), 48),
        ({"adapter_rank_fraction": 0.001}, (64, 64), 1),
        ({"adapter_rank_fraction": 1}, (16, 8), 8),
    ],
)
def test_rank_of_a_layer(settings, shape, rank):
    config = SLoPeConfig(**settings)
    assert config.rank_for(*shape) == rank
    assert config.has_adapters == (rank > 0)


@pytest.mark.parametrize("start", [{"adapter_start": 0.5}, {"adapter_start": 1}, {"adapter_start_step": 0}])
def test_a_start_is_accepted_with_adapters(start):
    (name,) = start
    assert getattr(SLoPeConfig(adapter_rank=2, **start), name) == start[name]


def test_as_config_passes_configs_and_none_through():
    assert as_config(CUSTOM) is CUSTOM
    assert as_config(None) is None
    assert as_config({"seed": 5}) == SLoPeConfig(seed=5)
