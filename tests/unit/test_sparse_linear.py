"""The layer against a dense masked oracle, and its operands against time: they must never be stale."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from slope_pl import SLoPeConfig, SparseLinear, ops
from slope_pl.nn import invalidate_operands
from slope_pl.nn.sparse_linear import STORABLE_DTYPES
from tests.unit.reference import backward_mask_of, gaussian, mask_of, spread, within_twice_dense

D_OUT, D_IN, RANK = 16, 24, 4
ADAPTERS = SLoPeConfig(adapter_rank=RANK)


def make(mask="random", dtype=torch.float32, bias=True, seed=0, **settings):
    """A layer with Gaussian weights, the same at each call."""
    dense = nn.Linear(D_IN, D_OUT, bias, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(gaussian(D_OUT, D_IN, seed=seed))
        if bias:
            dense.bias.copy_(gaussian(D_OUT, seed=seed + 1))
    return SparseLinear.from_linear(dense, SLoPeConfig(mask=mask, **settings), seed=seed)


def awake(**settings):
    """A layer whose adapters are awake and not zero."""
    layer = make(adapter_rank=RANK, **settings)
    layer.wake_adapters()
    with torch.no_grad():
        layer.adapter_up.copy_(gaussian(D_OUT, RANK, seed=5))
    return layer


def oracle(layer):
    """Dense W, its double-pruned form under the layer's present columns, and the forward mask, read from the buffers."""
    weight = spread(layer.values.detach(), layer.indices)
    mask = mask_of(layer.indices)
    return weight, weight * (mask_of(layer.backward_indices).t() & mask), mask


def input_of(layer, *leading, seed=2):
    return gaussian(*(leading or (5,)), D_IN, seed=seed, dtype=layer.values.dtype).requires_grad_()


def run(layer, x=None, call=None):
    """Output and gradients of a forward and backward pass: y, dx, dvalues."""
    x = input_of(layer) if x is None else x
    y = (layer if call is None else call)(x)
    dx, dvalues = torch.autograd.grad(y, (x, layer.values), gaussian(*y.shape, seed=3, dtype=y.dtype))
    return y.detach(), dx, dvalues


def assert_current(layer, call=None, **tolerance):
    """The layer multiplies by its present values in both directions."""
    weight, twice_pruned, mask = oracle(layer)
    x = input_of(layer)
    y, dx, dvalues = run(layer, x, call)
    dy = gaussian(*y.shape, seed=3, dtype=y.dtype)
    bias = None if layer.bias is None else layer.bias.detach()
    torch.testing.assert_close(y, F.linear(x.detach(), weight, bias), **tolerance)
    torch.testing.assert_close(dx, dy @ twice_pruned, **tolerance)
    torch.testing.assert_close(spread(dvalues, layer.indices), (dy.t() @ x.detach()) * mask, **tolerance)


@pytest.fixture
def made(monkeypatch):
    """Names of the operands made, in order."""
    calls = []
    for name in ("forward_operand", "backward_operand"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, f=original, n=name: calls.append(n) or f(*args))
    return calls


# ------------------------------------------------------------------------------------------------ construction


@pytest.mark.parametrize("dtype", STORABLE_DTYPES)
@pytest.mark.parametrize(("rank", "bias"), [(0, True), (RANK, False)])
def test_state_dict_is_the_documented_one(dtype, rank, bias):
    layer = SparseLinear(D_IN, D_OUT, bias, config=SLoPeConfig(adapter_rank=rank), dtype=dtype)
    expected = {
        "values": ((D_OUT, D_IN // 2), dtype),
        "indices": ((D_OUT, D_IN // 8), torch.uint8),
        "backward_indices": ((D_IN, D_OUT // 8), torch.uint8),
        "adapter_active": ((), torch.uint8),
    }
    if bias:
        expected["bias"] = ((D_OUT,), dtype)
    if rank:
        expected |= {"adapter_down": ((rank, D_IN), dtype), "adapter_up": ((D_OUT, rank), dtype)}
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()} == expected
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"values", "bias"} & set(expected)


@pytest.mark.parametrize("mask", ["magnitude", "random", "transposable"])
def test_from_linear_keeps_the_kept_weights_and_the_bias_itself(mask):
    dense = nn.Linear(D_IN, D_OUT).eval()
    before = dense.weight.detach().clone()
    layer = SparseLinear.from_linear(dense, SLoPeConfig(mask=mask))
    weight, twice_pruned, kept = oracle(layer)
    assert torch.equal(weight, torch.where(kept, before, 0.0))
    assert torch.equal(twice_pruned != 0, backward_mask_of(weight, kept))
    assert torch.equal(dense.weight, before)
    assert layer.bias is dense.bias
    assert not layer.training


def test_from_conv1d_takes_the_transpose_and_gives_it_back():
    torch.manual_seed(0)
    dense = Conv1D(D_OUT, D_IN)
    nn.init.normal_(dense.bias)
    layer = SparseLinear.from_linear(dense, SLoPeConfig(mask="transposable"))
    kept = mask_of(layer.indices)
    with torch.no_grad():
        dense.weight.mul_(kept.t())
    x = gaussian(2, 3, D_IN)
    torch.testing.assert_close(layer(x), dense(x))
    back = layer.to_dense()
    assert type(back) is Conv1D
    assert torch.equal(back.weight, dense.weight)
    assert back.bias is dense.bias
    assert layer.values.is_contiguous()


def test_views_of_the_weight_agree_with_the_buffers():
    layer = awake()
    weight, twice_pruned, mask = oracle(layer)
    assert torch.equal(layer.dense_weight(), weight)
    assert torch.equal(layer.forward_mask(), mask)
    assert torch.equal(layer.backward_mask(), twice_pruned != 0)
    product = layer.adapter_up.detach() @ layer.adapter_down.detach() / RANK
    torch.testing.assert_close(layer.weight, weight + product)
    torch.testing.assert_close(layer.adapter_product(), product)


def test_repr_names_shape_mask_and_adapter_phase():
    text = repr(make(adapter_rank=RANK))
    assert f"in_features={D_IN}, out_features={D_OUT}" in text
    assert "mask=random 2:4" in text
    assert f"adapter_rank={RANK} (asleep)" in text
    assert "(awake)" in repr(awake())


# ------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("mask", ["magnitude", "random", "transposable"])
@pytest.mark.parametrize("bias", [True, False])
def test_float64_products_equal_the_dense_masked_ones(mask, bias):
    layer = make(mask, torch.float64, bias)
    assert_current(layer, rtol=1e-12, atol=1e-12)
    _, twice_pruned, kept = oracle(layer)
    assert bool(((twice_pruned != 0) == kept).all()) == (mask == "transposable")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_the_dense_one(dtype):
    layer = make(dtype=dtype)
    x = input_of(layer, 2, 8).detach()
    weight, bias = layer.dense_weight(), layer.bias.detach()
    exact = F.linear(x.double(), weight.double(), bias.double())
    within_twice_dense(layer(x), F.linear(x, weight, bias), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [False, True])
def test_autocast_computes_in_its_dtype_and_returns_parameter_dtype_gradients(dtype, adapters):
    layer = awake() if adapters else make()
    x = input_of(layer, 2, 3)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        dense = F.linear(x, layer.weight, layer.bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y, dense, rtol=0.02, atol=0.1)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_autocast_leaves_a_float64_layer_alone():
    layer = make(dtype=torch.float64)
    x = input_of(layer)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("frozen", ["values", "bias"])
def test_a_frozen_parameter_gets_no_gradient_and_the_rest_does(frozen):
    layer = make()
    getattr(layer, frozen).requires_grad_(False)
    x = input_of(layer)
    layer(x).sum().backward()
    assert x.grad is not None
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"values", "bias"} - {frozen}


def test_a_layer_made_from_a_frozen_one_stays_frozen_adapters_included():
    dense = nn.Linear(D_IN, D_OUT).requires_grad_(False)
    layer = SparseLinear.from_linear(dense, ADAPTERS)
    layer.wake_adapters()
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.to_dense().weight.requires_grad


# ------------------------------------------------------------------------------------------------ operands in time


def optimizers(parameters):
    parameters = list(parameters)
    yield torch.optim.SGD(parameters, lr=0.1)
    yield torch.optim.AdamW(parameters, lr=0.1, foreach=True)
    yield torch.optim.AdamW(parameters, lr=0.1, fused=True)


class WritesData(torch.optim.Optimizer):
    """Writes through ``.data``, as some published optimizers do: torch's version counter does not see it."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.1)


def test_operands_are_made_once_an_optimizer_step_not_once_a_forward(made):
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        for _ in range(4):  # gradient accumulation
            layer(input_of(layer)).sum().backward()
        optimizer.step()
    assert made == ["backward_operand"] * 3  # in the parameters' dtype the forward operand is the values themselves


def test_under_autocast_both_operands_are_made_once_a_step(made):
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                layer(input_of(layer)).sum().backward()
        optimizer.step()
    assert made == ["forward_operand", "backward_operand"] * 2


def test_evaluation_makes_no_backward_operand(made):
    layer = make().eval()
    with torch.no_grad():
        layer(input_of(layer))
    layer(input_of(layer).detach())
    assert made == []


@pytest.mark.parametrize("which", range(3))
def test_every_step_of_an_optimizer_is_seen_in_both_directions(which):
    # The published code never updates W^T (slope-method 12.1.2).
    layer = make()
    optimizer = list(optimizers(layer.parameters()))[which]
    for _ in range(3):
        assert_current(layer)
        before = layer.values.detach().clone()
        layer(input_of(layer)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(layer.values, before)
        assert_current(layer)


def test_an_optimizer_that_writes_data_is_seen():
    layer = make()
    run(layer)
    layer(input_of(layer)).sum().backward()
    WritesData(layer.parameters()).step()
    assert_current(layer)


def reload(layer):
    layer.load_state_dict(make(seed=7).state_dict())
    return layer


def reassign(layer):
    layer.load_state_dict(make(seed=7).state_dict(), assign=True)
    return layer


def in_place(layer):
    with torch.no_grad():
        layer.values.mul_(-2)
    return layer


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.values.mul_(-2)
    return layer


def by_data(layer):
    layer.values.data.mul_(-2)
    invalidate_operands()
    return layer


def swapped_for_evaluation(layer):
    layer.eval()
    layer.values.data.mul_(-2)  # as weight averaging does
    return layer.train()


def replaced(layer):
    layer.values = nn.Parameter(layer.values.detach() * -2)
    return layer


def rechosen(layer):
    by_data(layer).refresh_backward_mask()
    return layer


def other_choice(layer):
    with torch.no_grad():
        layer.backward_indices.copy_(make("random", seed=7).backward_indices)
    return layer


@pytest.mark.parametrize(
    "change",
    [
        reload,
        reassign,
        in_place,
        in_inference_mode,
        by_data,
        swapped_for_evaluation,
        replaced,
        rechosen,
        other_choice,
        copy.deepcopy,
        lambda layer: in_place(copy.deepcopy(layer)),
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.to(torch.bfloat16).to(torch.float32),
        lambda layer: layer.train().eval(),
    ],
)
def test_no_change_leaves_a_stale_operand(change):
    layer = make()
    run(layer)
    changed = change(layer)
    assert_current(changed)
    with torch.autocast("cpu", torch.bfloat16):
        run(changed, input_of(changed).detach().float().requires_grad_())
    assert_current(changed)


def test_a_deepcopy_is_independent():
    layer = make()
    y, dx, _ = run(layer)
    in_place(copy.deepcopy(layer))
    again = run(layer)
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], dx)


@pytest.mark.parametrize("autocast", [False, True])
def test_functional_call_with_fresh_values_is_never_stale(autocast):
    layer = SparseLinear(64, 64, bias=False)
    x = gaussian(4, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first = layer(x)
        for _ in range(20):  # whether the allocator hands out the freed address is its own affair: mostly it does
            values = layer.values.detach().clone()
            functional_call(layer, {"values": values}, (x,))
            address = values.data_ptr()
            del values
            tried = []
            while not tried or (tried[-1].data_ptr() != address and len(tried) < 50):
                tried.append(layer.values.detach() * 2)
            assert torch.equal(functional_call(layer, {"values": tried[-1]}, (x,)), first * 2)


def test_loading_into_a_layer_made_in_inference_mode_is_seen():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        layer, other, x = make(), make(seed=7), gaussian(5, D_IN)
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_training_works_after_inference_mode(autocast):
    layer = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.inference_mode():
            layer(gaussian(5, D_IN))
        y = layer(input_of(layer))
    y.sum().backward()
    assert bool(layer.values.grad.abs().sum() > 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    layer = make()
    plain = run(layer)
    checkpointed = run_checkpointed(layer, reentrant)
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def run_checkpointed(layer, reentrant):
    x = input_of(layer)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(gaussian(*y.shape, seed=3))
    gradient, layer.values.grad = layer.values.grad, None
    return y.detach(), x.grad, gradient


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


# ------------------------------------------------------------------------------------------------ adapters


def test_sleeping_adapters_have_no_effect_no_gradient_and_do_not_decay():
    layer, plain = make(adapter_rank=RANK), make()
    with torch.no_grad():
        layer.adapter_up.fill_(1e6)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    assert torch.equal(layer(input_of(layer)), plain(input_of(plain)))
    layer(input_of(layer)).sum().backward()
    optimizer.step()
    moved = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"values", "bias"}
    assert layer.adapter_down.grad is layer.adapter_up.grad is None


def test_the_output_does_not_move_at_the_wake():
    layer = make(adapter_rank=RANK)
    x = input_of(layer)
    before = layer(x)
    assert layer.wake_adapters()
    assert not layer.wake_adapters()
    assert layer.adapters_awake
    assert torch.equal(layer(x), before)
    down = layer.adapter_down.detach()
    assert float(down.abs().min()) > 0
    assert float(down.std()) == pytest.approx(1, abs=0.2)


def test_a_layer_without_adapters_does_not_wake():
    layer = make()
    assert not layer.wake_adapters()
    assert layer.adapter_product() is None
    assert not layer.adapters_awake


def test_awake_adapters_follow_the_formula_with_one_over_the_rank():
    # Merged and unmerged paths of the published code differ by 1/r (slope-method 12.1.8).
    layer = awake(dtype=torch.float64)
    x, (weight, twice_pruned, _) = input_of(layer), oracle(layer)
    y = layer(x)
    low_rank = x @ layer.adapter_down.t() @ layer.adapter_up.t() / RANK
    torch.testing.assert_close(y, F.linear(x, weight, layer.bias) + low_rank, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, layer.to_dense()(x), rtol=1e-12, atol=1e-12)
    dy = gaussian(*y.shape, seed=3, dtype=torch.float64)
    dx, down, up = torch.autograd.grad(y, (x, layer.adapter_down, layer.adapter_up), dy)
    product = layer.adapter_up.detach() @ layer.adapter_down.detach() / RANK
    torch.testing.assert_close(dx, dy @ (twice_pruned + product), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(down, layer.adapter_up.t() @ dy.t() @ x / RANK, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(up, dy.t() @ x @ layer.adapter_down.t() / RANK, rtol=1e-12, atol=1e-12)


def test_loading_follows_the_phase_of_the_state_forth_and_back():
    layer, woken = make(adapter_rank=RANK, seed=7), awake()
    asleep = copy.deepcopy(layer.state_dict())
    x = input_of(layer)
    y = layer(x)
    layer.load_state_dict(woken.state_dict())
    assert layer.adapters_awake
    assert layer.adapter_up.requires_grad
    assert torch.equal(layer(x), woken(x))
    layer.load_state_dict(asleep)
    assert not layer.adapters_awake
    assert not layer.adapter_up.requires_grad
    assert layer.adapter_active == 0
    assert torch.equal(layer(x), y)


def test_adapters_and_masks_depend_on_the_seed_and_not_on_the_global_generator():
    states = []
    dense = nn.Linear(64, 64)
    for global_seed, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        states.append(SparseLinear.from_linear(dense, SLoPeConfig(mask="random", adapter_rank=RANK), seed).state_dict())
        assert torch.equal(torch.get_rng_state(), state)
    for name in ("indices", "adapter_down"):
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])


# ------------------------------------------------------------------------------------------------ training


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


# ------------------------------------------------------------------------------------------------ files


def through_safetensors(state, folder):
    save_file(state, folder / "layer.safetensors")
    return load_file(folder / "layer.safetensors")


def through_torch(state, folder):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("through", [through_safetensors, through_torch])
@pytest.mark.parametrize("dtype", STORABLE_DTYPES)
def test_state_survives_a_file(through, dtype, tmp_path):
    saved = awake(dtype=dtype)
    loaded = make(adapter_rank=RANK, seed=7, dtype=dtype)
    loaded.load_state_dict(through(saved.state_dict(), tmp_path))
    for (name, a), b in zip(saved.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    x = input_of(saved)
    assert torch.equal(loaded(x), saved(x))
