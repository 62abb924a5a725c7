"""Unbiased random 2:4 pruning of the output gradient."""

import itertools
import math

import pytest
import torch

from slope_pl.baselines import (
    mvue_two_of_four,
)
from slope_pl.baselines.mvue import _uniform, inclusion_chance
from tests.unit.baseline_cases import make


def draw(gradient, seed=1, stream=0):
    return mvue_two_of_four(gradient, torch.tensor(seed), stream)


def test_inclusion_chance_by_enumeration():
    a = torch.tensor([0.1, 1.0, 2.5, 7.0], dtype=torch.float64)
    want = [0.0] * 4
    for i, j in itertools.permutations(range(4), 2):
        chance = a[i] / a.sum() * a[j] / (a.sum() - a[i])
        want[i] += chance
        want[j] += chance
    got = inclusion_chance(a.view(1, 4, 1)).flatten()
    torch.testing.assert_close(got, torch.stack(want))
    assert got.sum().item() == pytest.approx(2)


def test_random_pruning_is_unbiased():
    """The mean over independent groups lies within 5 standard errors of the entry, for each of 4; and none is exact."""
    x = torch.tensor([0.05, -1.0, 2.0, -0.6])
    count = 200_000
    pruned = draw(x.view(4, 1).expand(4, count).contiguous())
    error = pruned.mean(1) - x
    assert (error.abs() <= 5 * pruned.std(1) / count**0.5).all()
    assert (pruned.std(1) > 0).all()
    chance = (pruned != 0).float().mean(1)
    torch.testing.assert_close(chance, inclusion_chance(x.abs().view(1, 4, 1)).flatten(), rtol=0.02, atol=0.002)


def test_random_pruning_is_unbiased_over_seeds():
    x = torch.randn(8, 3)
    total = sum(draw(x, seed) for seed in range(4000)) / 4000
    assert (total - x).abs().max() < 0.15
    assert (draw(x) - x).abs().max() > 0.3


def test_two_of_four_tokens_stay():
    pruned = draw(torch.randn(40, 6))
    assert ((pruned != 0).view(10, 4, 6).sum(1) == 2).all()


def test_kept_entries_are_scaled_by_their_chance():
    x = torch.randn(40, 6)
    pruned = draw(x)
    ratio = (x / pruned)[pruned != 0]
    want = inclusion_chance(x.abs().view(10, 4, 6)).view(40, 6)[pruned != 0]
    torch.testing.assert_close(ratio, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_does_not_matter(scale):
    x = torch.randn(8, 4, dtype=torch.float64)
    torch.testing.assert_close(draw(x * scale) / scale, draw(x))


def test_groups_with_zeros():
    x = torch.zeros(8, 1)
    x[5] = 3.0
    torch.testing.assert_close(draw(x), x, rtol=1e-5, atol=0)
    two = torch.tensor([[1.0], [0.0], [-2.0], [0.0]])
    torch.testing.assert_close(draw(two), two, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
def test_rows_that_do_not_fill_a_group(rows):
    x = torch.randn(rows, 5)
    pruned = draw(x)
    assert pruned.shape == x.shape
    last = rows % 4
    if last <= 2:
        torch.testing.assert_close(pruned[-last:], x[-last:], rtol=1e-4, atol=1e-5)
    total = sum(draw(x, seed) for seed in range(3000)) / 3000
    assert (total - x).abs().max() < 0.2


def test_draws_are_a_function_of_seed_and_stream():
    x = torch.randn(64, 8)
    before = torch.get_rng_state()
    assert torch.equal(draw(x, 5, 1), draw(x, 5, 1))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    kept = {(seed, stream): draw(x, seed, stream) != 0 for seed in (5, 6) for stream in (0, 1)}
    for a, b in itertools.combinations(kept, 2):
        assert 0.3 < (kept[a] == kept[b]).float().mean() < 0.75, (a, b)


def test_uniform_numbers_are_uniform_and_independent():
    first, second = _uniform(1 << 18, torch.tensor(7), 0)
    for u in (first, second):
        assert 0 <= u.min() < 1e-4
        assert 1 - 1e-4 < u.max() < 1
        counts = torch.histc(u, 64, 0, 1)
        chi2 = ((counts - 4096) ** 2 / 4096).sum().item()
        assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)
    pairs = torch.stack([first, second, first.roll(1), first.roll(8)])
    off = torch.corrcoef(pairs) - torch.eye(4)
    assert off.abs().max() < 5 / (1 << 9)


def test_bfloat16_and_not_a_number():
    x = torch.randn(8, 4).bfloat16()
    assert draw(x).dtype is torch.bfloat16
    x[3, 2] = torch.nan
    assert draw(x)[:, 2].isnan().any(), "a gradient that became NaN stays visible"


def test_random_pruning_touches_the_weight_gradient_alone():
    exact, pruned = make(mask="transposable"), make(mask="transposable", mvue=True)
    pruned.load_state_dict(exact.state_dict())
    grads = []
    for layer in (exact, pruned):
        torch.manual_seed(1)
        x = torch.randn(8, 8, requires_grad=True)
        y = layer(x)
        layer.noise_seed.fill_(99)  # DDP and the next micro-batch move it before a late backward
        y.backward(torch.randn(8, 8))
        grads.append((y.detach(), x.grad, layer.bias.grad, layer.weight.grad))
    for a, b in zip(grads[0][:3], grads[1][:3], strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(1)
    x, dy = torch.randn(8, 8), torch.randn(8, 8)
    torch.testing.assert_close(grads[1][3], draw(dy, 0).t() @ x)
