"""A sparse layer made on the meta device, and drawn once it has a place."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slope_pl import ConversionError, SLoPeConfig, SparseLinear, sparsify
from slope_pl.lightning.checks import check_ranks
from slope_pl.nn.initial import draw_dense, fill

RANK = SLoPeConfig(adapter_rank=4)


def on_meta(kind=nn.Linear, bias=True, config=RANK, seed=3):
    with torch.device("meta"):
        linear = Conv1D(24, 16) if kind is Conv1D else kind(16, 24, bias)
    return SparseLinear.from_linear(linear, config, seed)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("mask", ["magnitude", "random", "transposable"])
def test_it_begins_as_a_dense_layer_of_its_kind_does(kind, mask):
    config = SLoPeConfig(mask=mask, adapter_rank=4)
    layer = on_meta(kind, config=config)
    assert (layer.is_drawn, layer.values.is_meta, layer.indices.shape) == (False, True, (24, 2))
    layer.to_empty(device="cpu")
    before = torch.get_rng_state()
    layer.reset_parameters()
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.is_drawn
    kept = layer.forward_mask()
    assert (kept.view(24, 4, 4).sum(-1) == 2).all()
    if mask == "transposable":
        assert (kept.t().reshape(16, 6, 4).sum(-1) == 2).all()
        assert torch.equal(layer.backward_mask(), kept)
    weight = layer.dense_weight()
    if kind is Conv1D:
        assert 0.015 < weight[kept].std() < 0.05
        assert not layer.bias.any()
    else:
        assert 0.2 < weight.abs().max() <= 0.25, "uniform, to one over the root of 16"
        assert 0 < layer.bias.abs().max() <= 0.25
    assert not layer.adapter_up.any()
    assert not layer.adapters_awake
    whole = SparseLinear(16, 24, config=config, seed=3)
    assert torch.equal(layer.adapter_down, whole.adapter_down)
    assert layer(torch.randn(5, 16)).isfinite().all()


def test_weights_are_drawn_from_numbers_that_neither_masks_nor_adapters_are_drawn_from():
    drawn = draw_dense(nn.Linear, 24, 16, True, torch.empty(0), 3)
    torch.manual_seed(3)
    assert not torch.equal(nn.Linear(16, 24).weight, drawn.weight)


def test_the_same_seed_is_the_same_layer_and_drawing_again_starts_over():
    first, second, other = (on_meta(seed=seed).to_empty(device="cpu") for seed in (3, 3, 4))
    for layer in (first, second, other):
        layer.reset_parameters()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.values, other.values)
    expected = copy.deepcopy(first.state_dict())
    first(torch.randn(2, 16)).sum().backward()
    with torch.no_grad():
        first.values.mul_(2)
    first.wake_adapters()
    first.reset_parameters()
    assert not first.adapters_awake
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), expected.values(), strict=True))
    x = torch.randn(2, 16)
    torch.testing.assert_close(first(x), x @ first.dense_weight().t() + first.bias)


def test_what_was_never_drawn_does_not_train():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 16))
    layers = sparsify(model, SLoPeConfig())
    assert list(layers) == ["1", "2"]
    model.to_empty(device="cpu")
    with pytest.raises(
        ConversionError, match=r"2 sparse layers \(1, ...\) were made on the meta device .*reset_parameters"
    ):
        check_ranks(layers)
    layers["1"].reset_parameters()
    layers["2"].load_state_dict(SparseLinear(24, 16).state_dict())
    check_ranks(layers)


def test_zero_3_has_a_way_of_its_own():
    part = torch.zeros(0)
    part.ds_id = 1
    with pytest.raises(ConversionError, match=r"build it within deepspeed.zero.Init"):
        fill(part, torch.zeros(4))
