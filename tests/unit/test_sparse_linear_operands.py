"""SparseLinear over time: operands are current whatever happens to the weights, and training is dense masked training."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from slope_pl import SparseLinear, ops
from slope_pl.nn import invalidate_operands
from slope_pl.ops import backends
from tests.unit.reference import backward_mask_of, gaussian, mask_of
from tests.unit.sparse_linear_cases import D_IN, D_OUT, RANK, assert_current, awake, input_of, make, oracle, run

# ------------------------------------------------------------------------------------------------ operands in time


@pytest.fixture
def made(monkeypatch):
    """Names of the operands made, in order."""
    calls, reference = [], ops.get_backend("reference")

    def refresh(pair, values, *rest):
        reference.refresh(pair, values, *rest)
        calls.extend(["forward"] * (not pair.forward_is_values) + ["backward"] * rest[-1].needs_backward)

    monkeypatch.setitem(backends._REGISTRY, "reference", replace(reference, refresh=refresh))
    return calls


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
    assert made == ["backward"] * 3  # in the parameters' dtype the forward operand is the values themselves


def test_under_autocast_both_operands_are_made_once_a_step(made):
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                layer(input_of(layer)).sum().backward()
        optimizer.step()
    assert made == ["forward", "backward"] * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of Inductor itself
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_too_makes_them_once_a_step(made, backend):
    """They are no part of the graph: the operations look them up when they run."""
    torch._dynamo.reset()
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                y = compiled(input_of(layer))
            y.sum().backward()
        optimizer.step()
    assert made == ["forward", "backward"] * 2


@pytest.mark.parametrize(
    "change",
    [lambda layer: layer.load_state_dict(make(seed=7).state_dict()), lambda layer: layer.to("cpu"), nn.Module.eval],
)
def test_a_weight_that_did_not_move_keeps_its_operands_place(change):
    """CUDA graphs hold addresses: what is written in place must not bring new buffers."""
    layer = make()
    run(layer)
    pair = layer._operands._pairs[torch.float32, "reference"]
    change(layer)
    assert layer._operands._pairs[torch.float32, "reference"] is pair
    assert_current(layer)


def test_a_bias_that_changed_is_seen_where_the_backend_keeps_a_copy(monkeypatch):
    reference = ops.get_backend("reference")

    def refresh(pair, values, indices, backward_indices, bias, change):
        reference.refresh(pair, values, indices, backward_indices, bias, change)
        pair.bias = None if bias is None else bias.detach().to(pair.dtype)

    monkeypatch.setitem(backends._REGISTRY, "reference", replace(reference, refresh=refresh))
    layer, x = make(), gaussian(5, D_IN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        layer.bias.add_(2)
        torch.testing.assert_close(layer(x), before + 2, rtol=0.02, atol=0.02)


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


@pytest.mark.parametrize("changed", [False, True])
def test_a_layer_that_becomes_sharded_gives_its_operands_back_at_once(changed, made):
    """Not only at its next forward: kept ones are the whole weight again, and of it as it was."""
    layer = make()
    run(layer)
    assert layer.operand_bytes() > 0
    operands = layer._operands
    assert operands.become_transient(True)
    assert layer.operand_bytes() == 0
    made.clear()
    for _ in range(2):
        if changed:
            with torch.no_grad():
                layer.values.mul_(2)
        assert_current(layer)
    assert layer.operand_bytes() == 0
    assert len(made) >= 2, "made for each forward"
    assert not operands.become_transient(False)
    assert_current(layer)
    assert layer.operand_bytes() > 0
