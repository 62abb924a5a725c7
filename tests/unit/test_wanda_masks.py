"""Masks by magnitude times the norm of the input feature (Wanda, arXiv 2306.11695)."""

from math import inf, nan

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slope_pl import ConfigError, SLoPeConfig, SparseLinear
from slope_pl.sparsity import magnitude_mask, make_mask, transposable_mask, transposable_patterns
from tests.unit.reference import FLOATS, gaussian, mask_of, two_best

SCALE = torch.tensor([1.0, 1.0, 8.0, 2.0])


def kept(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def test_magnitude_times_norm_by_hand():
    weight = torch.tensor(
        [
            [4.0, 3.0, 2.0, 1.0],  # 4 3 16 2
            [-1.0, 1.0, 0.0, 1.0],  # 1 1 0 2: of the tie, the lower index
            [0.1, -9.0, 0.5, 4.0],  # 0.1 9 4 8
            [1.0, 1.0, -0.125, 0.5],  # 1 1 1 1
        ]
    )
    assert kept(magnitude_mask(weight, SCALE)) == [[0, 2], [0, 3], [1, 3], [0, 1]]
    assert kept(magnitude_mask(weight)) == [[0, 1], [0, 1], [1, 3], [0, 1]]


def test_transposable_times_norm_by_hand():
    weight = torch.tensor([[9.0, 8.0, 1.0, 0.0], [-9.0, 8.0, 0.0, 1.0], [2.0, 3.0, 0.0, 0.0], [2.0, -3.0, 0.0, 0.0]])
    # Scores 9 8 16 0 / 9 8 0 16 / 2 3 0 0 / 2 3 0 0: rows 0 and 1 take their best two, which fills column 0.
    assert kept(transposable_mask(weight, torch.tensor([1.0, 1.0, 16.0, 16.0]))) == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert kept(transposable_mask(weight)) == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_magnitude_equals_sorting_each_group_by_the_product(dtype):
    weight = gaussian(16, 32, dtype=dtype).mul(2).round()  # few distinct values, so that ties are common
    scale = 2.0 ** torch.arange(32).remainder(5)
    scores = (weight.double().abs() * scale.double()).reshape(-1, 4).tolist()
    mask = make_mask("magnitude", weight, scale=scale)
    assert [set(row) for row in kept(mask.reshape(-1, 4))] == [two_best(group) for group in scores]
    assert not torch.equal(mask, magnitude_mask(weight)), "the scale must matter here"


@pytest.mark.parametrize("dtype", FLOATS)
def test_transposable_is_the_best_of_all_patterns_by_the_product(dtype):
    for seed in range(8):
        tile, scale = gaussian(4, 4, seed=seed, dtype=dtype), gaussian(4, seed=100 + seed).exp()
        score = tile.double().abs() * scale.double()
        best = max(float(score[pattern].sum()) for pattern in transposable_patterns())
        assert float(score[transposable_mask(tile, scale)].sum()) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("kind", ["magnitude", "transposable"])
def test_only_ratios_of_the_scale_matter(kind):
    weight, scale = gaussian(16, 32), gaussian(32, seed=1).abs()
    mask = make_mask(kind, weight, scale=scale)
    for factor in (2.0**-100, 2.0**100):
        assert torch.equal(make_mask(kind, weight, scale=scale * factor), mask)
    assert torch.equal(make_mask(kind, weight, scale=torch.full((32,), 3.0)), make_mask(kind, weight))
    assert torch.equal(make_mask(kind, weight * 1e37, scale=scale * 2.0**100), mask), "no overflow"


@pytest.mark.parametrize("kind", ["magnitude", "transposable"])
@pytest.mark.parametrize("special", [nan, inf, -inf])
def test_a_weight_that_is_not_finite_stays_visible_whatever_its_scale(kind, special):
    weight = gaussian(8, 8).abs() + 1
    weight[2, 3] = special
    scale = torch.ones(8)
    scale[3] = 0.0
    assert make_mask(kind, weight, scale=scale)[2, 3]


def test_a_feature_that_is_always_zero_is_pruned_first():
    scale = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert kept(magnitude_mask(torch.tensor([[100.0, 1.0, 2.0, 3.0]]), scale)) == [[2, 3]]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(4), r"shape \(4,\), expected a floating tensor of shape \(8,\)"),
        (torch.ones(8, 1), r"shape \(8, 1\)"),
        (torch.ones(8, dtype=torch.long), "torch.int64"),
        (torch.zeros(8), "not all 0"),
        (torch.full((8,), nan), "finite"),
        (torch.tensor([1.0] * 7 + [-1.0]), "at least 0"),
        (torch.tensor([1.0] * 7 + [inf]), "finite"),
    ],
)
@pytest.mark.parametrize("kind", ["magnitude", "transposable"])
def test_scales_that_make_no_sense(kind, scale, message):
    with pytest.raises(ValueError, match=message):
        make_mask(kind, gaussian(8, 8), scale=scale)


def test_random_masks_take_no_scale():
    with pytest.raises(ValueError, match="'random' looks at no weight"):
        make_mask("random", gaussian(8, 8), scale=torch.ones(8))


@pytest.mark.parametrize("kind", ["magnitude", "transposable"])
@pytest.mark.parametrize("conv1d", [False, True])
def test_a_layer_is_made_with_its_scale(kind, conv1d):
    weight, scale = gaussian(16, 32), gaussian(32, seed=1).exp()
    linear = Conv1D(16, 32) if conv1d else nn.Linear(32, 16)
    linear.weight = nn.Parameter(weight.t().contiguous() if conv1d else weight.clone())
    layer = SparseLinear.from_linear(linear, SLoPeConfig(mask=kind), scale=scale)
    expected = make_mask(kind, weight, scale=scale)
    assert torch.equal(mask_of(layer.indices), expected)
    assert torch.equal(layer.dense_weight(), torch.where(expected, weight, 0.0))


# ---------------------------------------------------------------------------------------------------- the setting


def test_by_magnitude_alone_is_the_default():
    assert SLoPeConfig().mask_calibration_batches == 0
    assert SLoPeConfig.from_dict({"mask": "transposable", "mask_calibration_batches": 4}).mask_calibration_batches == 4


@pytest.mark.parametrize("value", [-1, 1.5, True, "8", None])
def test_a_number_of_batches_is_an_integer(value):
    with pytest.raises(ConfigError, match=r"mask_calibration_batches=.*an integer of at least 0"):
        SLoPeConfig(mask_calibration_batches=value)


def test_calibration_of_random_masks_would_have_no_effect():
    with pytest.raises(ConfigError, match="mask_calibration_batches=8 has no effect with mask='random'"):
        SLoPeConfig(mask="random", mask_calibration_batches=8)
