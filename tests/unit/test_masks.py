import itertools
from math import inf, nan

import pytest
import torch

from slope_pl.sparsity import (
    keep_two_of_four,
    magnitude_mask,
    make_mask,
    masks,
    random_mask,
    transposable_mask,
    transposable_patterns,
)
from tests.unit.reference import FLOATS, gaussian, two_best

PAIRS = list(itertools.combinations(range(4), 2))
ROWS = [[column in pair for column in range(4)] for pair in PAIRS]


def kept(mask):
    """Kept positions of each row, for masks that a human reads."""
    return [row.nonzero().flatten().tolist() for row in mask]


def tile_score(tile, pattern):
    return sum(abs(float(tile[i, j])) for i in range(4) for j in range(4) if pattern[i][j])


def test_magnitude_keeps_the_two_largest_and_the_lower_index_of_a_tie():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [2.0, -5.0, 5.0, 5.0], [-1.0, 1.0, -2.0, 0.5]])
    assert kept(magnitude_mask(weight)) == [[1, 2], [0, 1], [1, 2], [0, 2]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([nan, 1.0, inf, 2.0], [0, 2]),
        ([1.0, inf, nan, nan], [1, 2]),
        ([nan, nan, nan, nan], [0, 1]),
        ([-inf, 0.0, 1.0, 2.0], [0, 3]),
        ([-0.0, 0.0, -0.0, 0.0], [0, 1]),
        ([0.0, -0.0, 0.0, 6e-8], [0, 3]),
        ([3.0, 3.0, 3.0, 3.0], [0, 1]),
        ([-3.0, 2.0, 3.0, 3.0], [0, 2]),
    ],
)
def test_special_values_leave_exactly_two_of_four(group, expected, dtype):
    assert kept(magnitude_mask(torch.tensor([group], dtype=dtype))) == [expected]


def test_keep_two_of_four_is_by_value_not_magnitude():
    assert kept(keep_two_of_four(torch.tensor([[-9.0, 1.0, 0.0, -1.0]]))) == [[1, 2]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_magnitude_equals_sorting_each_group(dtype):
    weight = gaussian(16, 32, dtype=dtype).mul(2).round()  # few distinct values, so that ties are common
    expected = [two_best(group) for group in weight.abs().reshape(-1, 4).tolist()]
    assert [set(row) for row in kept(magnitude_mask(weight).reshape(-1, 4))] == expected


def test_magnitude_of_a_transposed_view_equals_that_of_its_copy():
    weight = gaussian(8, 12)
    assert torch.equal(magnitude_mask(weight.t()[:, :8]), magnitude_mask(weight.t()[:, :8].contiguous()))


def test_magnitude_keeps_87_percent_of_a_gaussians_squared_norm_and_random_half():
    weight = gaussian(512, 2048)
    share = [
        float((weight * mask).square().sum() / weight.square().sum())
        for mask in (magnitude_mask(weight), random_mask(weight.shape, 0))
    ]
    assert share == pytest.approx([0.87, 0.5], abs=0.005)


def test_there_are_exactly_90_distinct_transposable_patterns():
    patterns = transposable_patterns()
    assert patterns.shape == (90, 4, 4)
    assert len({tuple(p.flatten().tolist()) for p in patterns}) == 90
    assert bool((patterns.sum(1) == 2).all() & (patterns.sum(2) == 2).all())


def test_transposable_by_hand_gives_the_full_columns_to_the_heavy_rows():
    # Rows 0 and 1 fill columns 0 and 1 (9 + 8 + 9 + 8); row-wise magnitude would take those columns everywhere.
    weight = torch.tensor([[9.0, 8.0, 1.0, 0.0], [-9.0, 8.0, 0.0, 1.0], [2.0, 1.0, 0.0, 0.0], [2.0, -1.0, 0.0, 0.0]])
    assert kept(transposable_mask(weight)) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert kept(magnitude_mask(weight))[2:] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("fill", [0.0, -0.0, 1.0, nan, inf, -inf])
def test_transposable_tie_goes_to_the_first_pattern(fill):
    assert kept(transposable_mask(torch.full((4, 4), fill))) == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_transposable_is_the_best_of_all_patterns(dtype):
    valid = [t for t in itertools.product(ROWS, repeat=4) if all(sum(c) == 2 for c in zip(*t, strict=True))]
    for seed in range(12):
        tile = gaussian(4, 4, seed=seed, dtype=dtype)
        best = max(tile_score(tile, pattern) for pattern in valid)
        assert tile_score(tile, transposable_mask(tile)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_transposable_does_not_depend_on_the_scale(scale):
    weight = gaussian(8, 8).clamp(-1, 1)
    assert torch.equal(transposable_mask(weight.double() * scale), transposable_mask(weight.double()))


@pytest.mark.parametrize("special", [nan, inf, -inf])
def test_transposable_keeps_a_non_finite_weight_before_any_finite_sum(special):
    weight = gaussian(4, 4).abs() + 100
    weight[2, 3] = special
    assert transposable_mask(weight)[2, 3]


def test_transposable_places_each_tile_where_it_was_found(monkeypatch):
    monkeypatch.setattr(masks, "_TILES_AT_ONCE", 4)  # 15 tiles in slices of 4, the last one short
    planted = transposable_patterns()[torch.arange(15) * 6].unflatten(0, (3, 5))
    weight = 0.1 * gaussian(12, 20)
    for i, j in itertools.product(range(3), range(5)):
        weight[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] += 10.0 * planted[i, j]
    mask = transposable_mask(weight)
    for i, j in itertools.product(range(3), range(5)):
        assert torch.equal(mask[4 * i : 4 * i + 4, 4 * j : 4 * j + 4], planted[i, j]), (i, j)


def test_transposable_of_a_transposed_view_equals_that_of_its_copy():
    weight = gaussian(8, 16)
    assert torch.equal(transposable_mask(weight.t()), transposable_mask(weight.t().contiguous()))
    assert torch.equal(transposable_mask(weight.t()), transposable_mask(weight).t())


@pytest.mark.parametrize("kind", ["magnitude", "random", "transposable"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_kind_keeps_two_of_four_whatever_the_dtype(kind, dtype):
    # The published code took 1:2 for float32 and 2:4 for the rest (slope-method 12.1.7).
    mask = make_mask(kind, gaussian(8, 16, dtype=dtype), seed=1)
    assert mask.dtype == torch.bool
    assert bool((mask.reshape(8, 4, 4).sum(2) == 2).all())
    if kind == "transposable":
        assert bool((mask.reshape(2, 4, 16).sum(1) == 2).all())


def test_random_is_seeded_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first = random_mask((64, 64), 7)
    torch.rand(3)
    assert torch.equal(first, random_mask((64, 64), 7))
    assert not torch.equal(first, random_mask((64, 64), 8))
    torch.set_rng_state(state)
    random_mask((64, 64), 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_draws_the_six_patterns_equally_often():
    groups = random_mask((300, 800), 3).reshape(-1, 4)
    counts = [int((groups == torch.tensor(row)).all(1).sum()) for row in ROWS]
    expected = len(groups) / 6
    assert sum(counts) == len(groups)
    assert sum((n - expected) ** 2 / expected for n in counts) < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


def test_random_rows_and_neighbouring_groups_are_independent():
    mask = random_mask((2000, 128), 5).double()
    assert float((mask[:-1] * mask[1:]).mean()) == pytest.approx(0.25, abs=0.005)
    assert float((mask[:, :-4] * mask[:, 4:]).mean()) == pytest.approx(0.25, abs=0.005)
