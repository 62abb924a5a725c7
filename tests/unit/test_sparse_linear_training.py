"""SparseLinear in training: what a re-setup does, and that a run is dense training with a masked weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slope_pl import SparseLinear
from tests.unit.reference import backward_mask_of, gaussian, mask_of
from tests.unit.sparse_linear_cases import D_IN, D_OUT, RANK, assert_current, awake, input_of, make, oracle, run


def test_accumulated_gradients_are_the_sum_of_the_parts():
    layer = make(dtype=torch.float64)
    x = input_of(layer, 8)
    (whole,) = torch.autograd.grad(layer(x).square().sum(), layer.values)
    for part in x.detach().chunk(4):
        layer(part).square().sum().backward()
    torch.testing.assert_close(layer.values.grad, whole)


@pytest.mark.parametrize("refresh_every", [None, 1, 2])
def test_columns_are_stale_between_refreshes_but_values_are_current(refresh_every):
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for step in range(1, 5):
        layer(input_of(layer, seed=step)).square().sum().backward()
        columns = layer.backward_indices.clone()
        optimizer.step()
        optimizer.zero_grad()
        weight, _, mask = oracle(layer)
        if refresh_every and step % refresh_every == 0:
            layer.refresh_backward_mask()
            assert torch.equal(layer.backward_mask(), backward_mask_of(weight, mask))
        else:
            assert torch.equal(layer.backward_indices, columns)
        assert_current(layer)


def test_churn_is_the_replaced_share_of_the_backward_mask():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :2] = mask[:4, 4:6] = mask[4:, 2:4] = mask[4:, 6:] = True  # columns of four live entries or none
    dense = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        dense.weight.copy_(mask * torch.tensor([4.0, 3.0, 2.0, 1.0]).repeat(2)[:, None])
    layer = SparseLinear.from_linear(dense)
    assert int(layer.backward_mask().sum()) == 16  # two of four in each of the 8 columns
    assert layer.refresh_backward_mask() == 0.0
    with torch.no_grad():
        layer.values[3, 0] = 3.5  # weight (3, 0) overtakes (1, 0): 1 of 16 entries replaced
        layer.values[2:4, 1] = 9.0  # (2, 1) and (3, 1) overtake (0, 1) and (1, 1): 2 more
    churn = layer.refresh_backward_mask()
    assert churn == 3 / 16
    assert churn.dtype == torch.float32
    assert layer.backward_mask()[:4, 0].tolist() == [True, False, False, True]
    assert layer.backward_mask()[:4, 1].tolist() == [False, False, True, True]


def test_a_refresh_replaces_everything_that_depends_on_the_old_choice():
    # The published refresh keeps the old mask with the new indices (slope-method 12.1.3).
    layer = make()
    run(layer)
    before = layer.state_dict()["backward_indices"].clone()
    with torch.no_grad():
        layer.values.copy_(gaussian(*layer.values.shape, seed=9))
    assert layer.refresh_backward_mask() > 0
    weight, twice_pruned, mask = oracle(layer)
    assert not torch.equal(layer.backward_indices, before)
    assert torch.equal(twice_pruned != 0, backward_mask_of(weight, mask))
    assert_current(layer)
    restored = make(seed=7)
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored.backward_indices, layer.backward_indices)


def test_transposable_refresh_has_nothing_to_do():
    layer = make("transposable")
    with torch.no_grad():
        layer.values.copy_(gaussian(*layer.values.shape, seed=9))
    assert layer.refresh_backward_mask() == 0.0


def test_pruned_positions_stay_zero_and_optimizer_state_is_half():
    layer = make()
    mask = mask_of(layer.indices)
    optimizer = torch.optim.AdamW([layer.values], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        layer(input_of(layer)).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.dense_weight() != 0, mask)
    state = optimizer.state[layer.values]
    assert state["exp_avg"].numel() + state["exp_avg_sq"].numel() == D_OUT * D_IN


def test_training_equals_dense_training_with_a_masked_weight():
    layer = make("transposable", torch.float64)  # the input gradient is exact there
    weight = layer.dense_weight().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    mask, x = mask_of(layer.indices), input_of(layer)
    sparse_steps = torch.optim.AdamW(layer.parameters(), lr=0.05)
    dense_steps = torch.optim.AdamW([weight, bias], lr=0.05)
    for _ in range(5):
        for optimizer, y in ((sparse_steps, layer(x)), (dense_steps, F.linear(x, weight * mask, bias))):
            optimizer.zero_grad()
            y.square().sum().backward(inputs=optimizer.param_groups[0]["params"])
            optimizer.step()
    torch.testing.assert_close(layer.dense_weight(), weight.detach() * mask, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bias, bias, rtol=1e-10, atol=1e-10)


def test_the_gradient_norm_is_that_of_the_dense_gradient_with_zeros():
    layer = make(dtype=torch.float64, bias=False)
    x = input_of(layer)
    layer(x).square().sum().backward()
    weight, _, mask = oracle(layer)
    dense_gradient = (2 * x @ weight.t()).t() @ x * mask
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    torch.testing.assert_close(norm, dense_gradient.norm())
    assert float(layer.values.grad.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("mode", ["train", "autocast", "awake"])
def test_a_compiled_layer_is_correct_over_optimizer_steps(mode):
    torch._dynamo.reset()
    layer = awake() if mode == "awake" else make()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    steps = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (layer, twin)]
    for step in range(4):
        for call, optimizer in zip((compiled, twin), steps, strict=True):
            x = input_of(layer, seed=step)
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                y = call(x)
            y.float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:
            layer.refresh_backward_mask()
            twin.refresh_backward_mask()
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    if mode == "train":
        assert_current(layer, compiled)


def test_waking_is_seen_by_a_compiled_layer():
    torch._dynamo.reset()
    layer = make(adapter_rank=RANK)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(input_of(layer))
    layer.wake_adapters()
    with torch.no_grad():
        layer.adapter_up.copy_(gaussian(D_OUT, RANK))
    torch.testing.assert_close(compiled(input_of(layer)), layer(input_of(layer)))
