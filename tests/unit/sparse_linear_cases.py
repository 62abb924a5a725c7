"""Sparse layers to test, and what they are held against."""

import torch
import torch.nn.functional as F
from torch import nn

from slope_pl import SLoPeConfig, SparseLinear
from tests.unit.reference import gaussian, mask_of, spread

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
