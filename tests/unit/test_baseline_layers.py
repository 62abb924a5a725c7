"""The baselines' layer: masks, products, decay, phases and state, against cases worked out by hand or in plain loops."""

import itertools

import pytest
import torch
from torch import nn

from slope_pl import CheckpointError, ConversionError, SLoPeConfig
from slope_pl.baselines import (
    MaskedLinear,
)
from slope_pl.baselines.product import double_pruned_mask
from slope_pl.nn import SparseLinear
from tests.unit.baseline_cases import HAND, HAND_MASK, HAND_TILE, HAND_TWICE, F, T, make

# ---------------------------------------------------------------------------------------------------- masks


def test_magnitude_mask_by_hand():
    layer = make()
    assert torch.equal(layer.mask, HAND_MASK.repeat(2, 2))
    assert layer.backward_mask is None


def test_double_pruned_mask_by_hand():
    assert torch.equal(double_pruned_mask(HAND, HAND_MASK), HAND_TWICE)
    assert torch.equal(make(backward_pruning="weight").backward_mask, HAND_TWICE.repeat(2, 2))


def test_a_kept_zero_goes_before_a_hidden_entry():
    weight = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 0, 0]])
    mask = torch.tensor([[F, F, T, T], [F, F, T, T], [F, F, T, T], [T, T, F, F]])
    want = torch.tensor([[F, F, T, T], [F, F, T, T], [F, F, F, F], [T, T, F, F]])
    assert torch.equal(double_pruned_mask(weight, mask), want)


def test_a_weight_that_is_not_a_number_stays_visible():
    weight = HAND.clone()
    weight[2, 0] = torch.nan
    assert double_pruned_mask(weight, HAND_MASK)[:, 0].tolist() == [T, F, T, F]


def test_transposable_mask_by_hand():
    layer = make(mask="transposable")
    assert torch.equal(layer.mask, HAND_TILE.repeat(2, 2))
    rows = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    tiles = [torch.tensor(t) for t in itertools.product(rows, repeat=4)]
    sums = [(HAND.abs() * t).sum().item() for t in tiles if (t.sum(0) == 2).all()]
    assert max(sums) == (HAND.abs() * HAND_TILE).sum().item() == 45
    assert sums.count(45) == 1


def test_refresh_follows_the_weight_and_counts_flips():
    layer = make(backward_pruning="weight")
    assert layer.refresh_mask() == 0
    with torch.no_grad():
        layer.weight[0, 3] = -100.0  # of the first group: 9, -8, 1, -100
    flips = layer.refresh_mask()
    assert layer.mask[0, :4].tolist() == [T, F, F, T]
    assert flips == pytest.approx(2 / 64)
    # Column 3 has 100 and 6 in the upper tile; column 1 lost its 8, so 6 and 5 stay.
    assert layer.backward_mask[:4, 3].tolist() == [T, F, F, T]
    assert layer.backward_mask[:4, 1].tolist() == [F, T, F, T]


# ---------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("pruning", ["none", "weight", "gradient"])
def test_forward_and_gradients(kind, pruning):
    layer = make(torch.randn(4, 4), kind=kind, backward_pruning=pruning).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, 8, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    stored = layer.weight.t() if kind == "conv" else layer.weight
    w, m, b = stored.detach(), layer.mask, layer.bias.detach()
    torch.testing.assert_close(y, x.detach() @ (m * w).t() + b)
    if pruning == "weight":
        dx = dy @ (layer.backward_mask * w)
        assert layer.backward_mask.sum() < m.sum(), "or the test does not tell it from none"
    elif pruning == "none":
        dx = dy @ (m * w)
    else:
        fours = dy.view(3, 5, 2, 4)
        smaller = fours.abs().argsort(-1)[..., :2]
        dx = fours.scatter(-1, smaller, 0.0).view(3, 5, 8) @ (m * w)
    torch.testing.assert_close(x.grad, dx)
    dw = torch.einsum("abi,abj->ij", dy, x.detach())
    got = layer.weight.grad.t() if kind == "conv" else layer.weight.grad
    torch.testing.assert_close(got, dw)
    assert (got[~m] != 0).all(), "straight through: hidden entries get a gradient as well"
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)))


@pytest.mark.parametrize("mask", ["magnitude", "transposable"])
def test_gradcheck(mask):
    """Numerically: x and bias under a mask, the adapters on top of it."""
    layer = make(torch.randn(4, 4), mask=mask, adapter_rank=2).double()
    layer.wake_adapters()
    nn.init.normal_(layer.adapter_up)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def output(x, bias, down, up):
        values = {"bias": bias, "adapter_down": down, "adapter_up": up}
        return torch.func.functional_call(layer, values, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.bias, layer.adapter_down, layer.adapter_up))


def test_gradcheck_of_kept_weights():
    """The straight-through gradient is the true one where the mask keeps: as a function of the kept weights alone."""
    layer = make(torch.randn(4, 4)).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    kept = layer.weight.detach()[layer.mask].requires_grad_()

    def output(kept):
        weight = torch.zeros_like(layer.weight).masked_scatter(layer.mask, kept)
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(output, kept)


def test_no_bias_and_frozen_weight():
    layer = make(bias=False)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_after_drop_mask_it_is_a_linear_layer():
    layer = make(torch.randn(4, 4), mask="transposable", mvue=True)
    x, dy = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    layer.drop_mask()
    dense = nn.Linear(8, 8)
    dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    layer(x).backward(dy)
    own, x.grad = x.grad, None
    dense(x).backward(dy)
    torch.testing.assert_close(own, x.grad, rtol=0, atol=0)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"backward_pruning": "weight", "adapter_rank": 2}, {"mvue": True}], ids=str)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_autocast_and_half_storage(options, storage):
    layer = make(torch.randn(4, 4), **options).to(storage)
    layer.wake_adapters()
    x = torch.randn(3, 8, dtype=storage, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is layer.weight.grad.dtype is layer.bias.grad.dtype is storage
    torch.testing.assert_close(y.float(), make_like(layer)(x.float()), rtol=0.03, atol=0.05)


def make_like(layer):
    dense = nn.Linear(8, 8)
    dense.load_state_dict({"weight": layer.effective_weight().float(), "bias": layer.bias.float()})
    return dense


@pytest.mark.parametrize(
    "options",
    [
        {"backward_pruning": "weight", "adapter_rank": 2},
        {"backward_pruning": "gradient"},
        {"mask": "transposable", "mvue": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # torch's own tracing does that
def test_compiled_in_one_graph_gives_the_same(options):
    layer = make(torch.randn(4, 4), **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for phase in ("masked", "awake", "dense"):
        if phase == "awake":
            layer.wake_adapters()
        if phase == "dense":
            layer.drop_mask()
        layer.noise_seed.fill_(123)
        results = []
        for forward in (layer, compiled):
            layer.zero_grad()
            x = torch.arange(48.0).sin().view(6, 8).requires_grad_()
            y = forward(x)
            y.backward(torch.arange(48.0).cos().view(6, 8))
            results.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad))
        torch.testing.assert_close(*results)


# ---------------------------------------------------------------------------------------------------- decay, phases


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_decay_pulls_hidden_weights_alone(kind):
    layer = make(kind=kind)
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.add_decay(0.5)
    got = layer.weight.grad.t() if kind == "conv" else layer.weight.grad
    assert torch.equal(got[0, :4], torch.tensor([1.0, 1.0, 1.5, 2.0]))  # 9, -8 kept; 1, 2 hidden
    assert torch.equal(got[1, :4], torch.tensor([1.0, 1.0, -1.5, 1.0]))  # -5 and 0 hidden


def test_no_decay_without_gradient_or_mask():
    layer = make()
    layer.add_decay(0.5)
    assert layer.weight.grad is None
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.drop_mask()
    layer.add_decay(0.5)
    assert not layer.weight.grad.any()


def test_adapters_are_slopes_and_do_not_move_the_output_at_the_wake():
    linear = nn.Linear(16, 8)
    sparse = SparseLinear.from_linear(linear, SLoPeConfig(adapter_rank=4), seed=11)
    layer = MaskedLinear(linear, adapter_rank=4, seed=11)
    assert torch.equal(layer.adapter_down, sparse.adapter_down)
    assert not layer.adapter_up.any()
    assert not layer.adapter_up.requires_grad
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), sparse(x))
    before = layer(x)
    assert layer.wake_adapters()
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.adapter_up.normal_()
        sparse.adapter_up.copy_(layer.adapter_up)
    sparse.wake_adapters()
    torch.testing.assert_close(layer(x), sparse(x))
    torch.testing.assert_close(layer.to_dense()(x), layer(x))


# ---------------------------------------------------------------------------------------------------- state


def test_parameters_stay_the_same_objects():
    linear = nn.Linear(8, 8)
    layer = MaskedLinear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dense_checkpoint_loads_and_sets_the_mask(kind):
    layer = make(torch.randn(4, 4), kind=kind, backward_pruning="weight", adapter_rank=2)
    down = layer.adapter_down.clone()
    hand = HAND.repeat(2, 2)
    state = {"weight": hand.t() if kind == "conv" else hand, "bias": torch.ones(8)}
    layer.load_state_dict(state)
    assert set(state) == {"weight", "bias"}
    assert torch.equal(layer.mask, HAND_MASK.repeat(2, 2))
    assert torch.equal(layer.backward_mask, HAND_TWICE.repeat(2, 2))
    assert torch.equal(layer.adapter_down, down)


def test_own_state_brings_mask_and_phase():
    a = make(torch.randn(4, 4), adapter_rank=2)
    a.wake_adapters()
    with torch.no_grad():
        a.weight.mul_(torch.rand_like(a.weight))  # now the mask is an old one
    b = make(torch.randn(4, 4), adapter_rank=2)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.mask, b.mask)
    assert b.adapters_awake
    assert b.adapter_up.requires_grad
    b.load_state_dict(make(adapter_rank=2).state_dict())
    assert not b.adapters_awake
    assert not b.adapter_up.requires_grad
    dropped = make()
    dropped.drop_mask()
    c = make()
    c.load_state_dict(dropped.state_dict())
    assert not c.masked


def test_slope_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match="SLoPe's 'values'"):
        make().load_state_dict(SparseLinear(8, 8).state_dict())


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_ineligible_shape(shape):
    with pytest.raises(ConversionError, match="multiples of 8"):
        MaskedLinear(nn.Linear(*shape))
