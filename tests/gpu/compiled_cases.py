"""Layers on the compiled backend, and what they are held against: float64, and the dense operation of the same dtype."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slope_pl import SLoPeConfig, SparseLinear
from slope_pl.ops.extension import extension

DTYPES = (torch.bfloat16, torch.float16)


def require_extension():
    """On a GPU a missing extension is a failure, not a reason to leave tests out."""
    if torch.cuda.is_available():
        assert extension().problem is None, extension().problem


def make(
    d_in=64, d_out=96, dtype=torch.bfloat16, mask="magnitude", bias=True, backend="cusparselt", seed=0, **settings
):
    torch.manual_seed(seed)
    dense = nn.Linear(d_in, d_out, bias, device="cuda", dtype=dtype)
    return SparseLinear.from_linear(dense, SLoPeConfig(mask=mask, backend=backend, **settings), seed=seed)


def exact_of(layer):
    """The same layer in float64, on the reference backend."""
    exact = copy.deepcopy(layer)
    exact.config = SLoPeConfig(mask=layer.config.mask, backend="reference", adapter_rank=layer.config.adapter_rank)
    return exact.double()


def gradients(call, x, dy, parameters):
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), dy)]


def assert_within_twice_dense(layer, x, dy, call=None):
    """y, dx, dvalues and dbias: error against float64 at most twice that of the dense operations in the same dtype."""
    weights = [p for p in (layer.values, layer.bias) if p is not None]
    ours = gradients(call or layer, x, dy, weights)
    exact_layer = exact_of(layer)
    exact = gradients(
        exact_layer, x.double(), dy.double(), [p for p in (exact_layer.values, exact_layer.bias) if p is not None]
    )
    dtype = x.dtype
    weight, bias = layer.dense_weight().to(dtype), None if layer.bias is None else layer.bias.detach().to(dtype)
    rows, columns = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dense = [F.linear(x, weight, bias), dy @ (weight * layer.backward_mask())]
    dense.append((rows.t() @ columns)[layer.forward_mask()].view_as(layer.values).to(layer.values.dtype))
    if bias is not None:
        dense.append(rows.sum(0).to(layer.bias.dtype))
    for name, a, b, truth in zip(("y", "dx", "dvalues", "dbias"), ours, dense, exact, strict=False):
        assert a.shape == truth.shape, name
        assert a.dtype == b.dtype, name
        if a.numel():
            error, allowed = ((t.double() - truth).abs().max().item() for t in (a, b))
            floor = torch.finfo(dtype).eps * 0.5 * truth.abs().max().item()
            assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, dense {allowed:.3g}, floor {floor:.3g}"


@pytest.fixture(scope="session", autouse=True)
def algorithms_of_their_own(tmp_path_factory):
    """Tests neither read nor write the user's cache of algorithms."""
    import os

    os.environ["SLOPE_CACHE_DIR"] = str(tmp_path_factory.mktemp("algorithms"))
    yield
    del os.environ["SLOPE_CACHE_DIR"]
