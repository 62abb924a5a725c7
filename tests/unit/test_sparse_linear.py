"""SparseLinear: state, products, adapters, files."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from slope_pl import SLoPeConfig, SparseLinear
from slope_pl.nn.eligibility import STORABLE_DTYPES
from tests.unit.reference import backward_mask_of, gaussian, mask_of, within_twice_dense
from tests.unit.sparse_linear_cases import ADAPTERS, D_IN, D_OUT, RANK, assert_current, awake, input_of, make, oracle

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
