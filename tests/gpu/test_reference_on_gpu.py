"""The reference backend on a GPU: the oracle that compiled kernels are measured against must itself be right there."""

import copy

import pytest
import torch
from torch import nn

from slope_pl import SLoPeConfig, SparseLinear, sparsify, wake_adapters
from slope_pl.sparsity import MASK_KINDS

pytestmark = pytest.mark.gpu


def dense_twin(layer: SparseLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, device="cuda", dtype=dtype)
    dense.weight.data.copy_(layer.dense_weight())
    dense.bias.data.copy_(layer.bias)
    return dense


def test_the_machine_has_a_gpu():
    assert torch.cuda.is_available(), "make test-gpu was asked for on a machine without a GPU"


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 7, 129])
def test_error_is_at_most_twice_the_dense_ops(kind, dtype, rows):
    layer = SparseLinear(64, 96, config=SLoPeConfig(mask=kind), device="cuda", dtype=dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(rows, 64, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, 96, device="cuda", dtype=dtype)
    x64 = x.detach().double().requires_grad_()
    truth = exact(x64)
    truth.backward(dy.double())
    y = layer(x)
    y.backward(dy)

    dense = dense_twin(layer, dtype)
    xd = x.detach().clone().requires_grad_()
    yd = dense(xd)
    yd.backward(dy)
    backward_weight = dense.weight.detach() * layer.backward_mask()
    mask = layer.forward_mask()
    for ours, theirs, exactly in (
        (y, yd, truth),
        (x.grad, dy @ backward_weight, x64.grad),
        (layer.values.grad, dense.weight.grad[mask].view_as(layer.values), exact.values.grad),
        (layer.bias.grad, dense.bias.grad, exact.bias.grad),
    ):
        if ours.numel():
            error = (ours.double() - exactly).abs().max()
            allowed = 2 * (theirs.double() - exactly).abs().max()
            assert error <= allowed + 1e-30, f"{error} against {allowed}"


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_masks_and_columns_are_those_of_the_cpu(kind):
    dense = nn.Linear(64, 128)
    on_cpu = SparseLinear.from_linear(dense, SLoPeConfig(mask=kind, adapter_rank=4), seed=3)
    on_gpu = SparseLinear.from_linear(copy.deepcopy(dense).cuda(), SLoPeConfig(mask=kind, adapter_rank=4), seed=3)
    for name, tensor in on_cpu.state_dict().items():
        assert torch.equal(tensor, on_gpu.state_dict()[name].cpu()), name


def test_training_on_the_gpu_follows_the_cpu():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16)).double()
    sparsify(net, SLoPeConfig(adapter_rank=4))
    nets = {"cpu": net, "cuda": copy.deepcopy(net).cuda()}
    x, target = torch.randn(40, 16, 32).double(), torch.randn(40, 16, 16).double()
    losses: dict[str, list[float]] = {}
    for device, model in nets.items():
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        losses[device] = []
        for step in range(40):
            if step % 10 == 0:
                for layer in model:
                    if isinstance(layer, SparseLinear):
                        layer.refresh_backward_mask()
            if step == 30:
                assert wake_adapters(model) == 2
            loss = (model(x[step].to(device)) - target[step].to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[device].append(loss.item())
    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_trains_float32_values(autocast):
    layer = SparseLinear(64, 64, device="cuda")
    x = torch.randn(9, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", autocast):
        y = layer(x)
    assert y.dtype is autocast
    y.float().sum().backward()
    assert layer.values.grad.dtype is torch.float32
    assert x.grad.dtype is torch.float32


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_conversion_works_under_a_default_device(kind):
    with torch.device("cuda"):  # Lightning's tensor_init_context does this around configure_model
        layer = SparseLinear(64, 128, config=SLoPeConfig(mask=kind, adapter_rank=4))
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cuda"}


def test_importing_creates_no_cuda_context():
    import subprocess
    import sys

    code = "import slope_pl, torch; assert not torch.cuda.is_initialized()"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0
