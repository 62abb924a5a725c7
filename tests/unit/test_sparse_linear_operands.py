"""SparseLinear over time: operands are current whatever happens to the weights, and are not made more often than that."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from slope_pl import SLoPeConfig, SparseLinear, ops
from slope_pl.nn import invalidate_operands
from slope_pl.ops import backends, cusparselt
from tests.unit.reference import gaussian
from tests.unit.sparse_linear_cases import D_IN, D_OUT, assert_current, input_of, make, run


@pytest.fixture
def made(monkeypatch):
    """Names of the operands made, in order."""
    calls, reference = [], ops.get_backend("reference")

    def refresh(pair, values, *rest):
        reference.refresh(pair, values, *rest)
        change = rest[-1]
        cast = change.needs_forward and not pair.forward_is_values
        calls.extend(["forward"] * cast + ["backward"] * change.needs_backward)

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


@pytest.mark.parametrize("fused", [False, True])
def test_transient_operands_are_made_for_one_product_each(fused, made):
    """One that the backward pass wants is not made in the forward pass, to be held until then."""
    up, down = make(), SparseLinear.from_linear(nn.Linear(D_OUT, D_IN), SLoPeConfig(), seed=1)
    for layer in (up, down):
        layer._operands.become_transient(True)
    x = input_of(up).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        if fused:
            weights, operands = (up._weight(), down._weight()), (up._operands, down._operands)
            y = ops.sparse_mlp(x.bfloat16(), *weights, "none", "reference", operands)
        else:
            y = down(torch.nn.functional.gelu(up(x)))
    assert made == ["forward"] * 2
    y.sum().backward()
    assert made == ["forward"] * 2 + ["backward"] * 2
    kept = copy.deepcopy(nn.ModuleList([up, down]))
    gradient, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        kept[1](torch.nn.functional.gelu(kept[0](x))).sum().backward()
    assert torch.equal(gradient, x.grad)


@pytest.mark.parametrize("transient", [False, True])
def test_the_copy_of_a_bias_stays_where_it_is_wherever_the_bias_lies(transient, monkeypatch):
    """A plan of cuSPARSELt holds the address of its bias: a gathered one would cost its set-up at each forward."""
    used, reference = [], ops.get_backend("reference")

    def refresh(pair, values, indices, backward_indices, bias, change):
        reference.refresh(pair, values, indices, backward_indices, bias, change)
        if bias is not None:
            cusparselt._refresh_bias(pair, bias)
            used.append(bias.data_ptr() if pair.bias is None else pair.bias.data_ptr())

    monkeypatch.setattr(cusparselt, "_lasting", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    monkeypatch.setitem(backends._REGISTRY, "reference", replace(reference, refresh=refresh))
    layer = make()
    layer._operands.become_transient(transient)
    biases = [torch.full((D_OUT,), float(i)) for i in range(3)]
    x = input_of(layer)
    with torch.no_grad():
        plain = layer(x) - layer.bias
        for bias in biases:
            layer.bias.data = bias
            torch.testing.assert_close(layer(x), plain + bias)
    assert len(used) == (4 if transient else 1), "a kept pair uses the layer's own bias"
    assert len(set(used)) == 1
    assert layer.operand_bytes() == (4 * D_OUT if transient else 0)


def test_a_layer_that_becomes_sharded_lets_go_of_its_whole_values():
    layer = make()
    run(layer)
    whole = StorageWeakRef(layer.values.untyped_storage())
    layer._operands.become_transient(True)
    layer.values.data = layer.values.data.clone()  # as sharding does, with a part of them
    assert whole.expired()
    assert_current(layer)
