"""GELU inside the products around it (CUTLASS kernels on Hopper): numbers, odd sizes, graphs, compilation, verification."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slope_pl import SLoPeConfig, SparseLinear, sparsify
from slope_pl.nn import sparse_mlp
from slope_pl.ops import algorithms, fuses_gelu
from slope_pl.ops.algorithm_cache import SM90, After, Algorithm, Order
from tests.gpu.compiled_cases import DTYPES, exact_of, make, require_extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch's compiler begins with one
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]
APPROXIMATE = ("none", "tanh")
NARROW, WIDE = 768, 3072


@pytest.fixture(autouse=True)
def _fused():
    require_extension()
    if torch.cuda.get_device_capability() == (9, 0):
        assert fuses_gelu("cusparselt", "cuda", torch.bfloat16, WIDE, NARROW)


def mlp(narrow=NARROW, wide=WIDE, dtype=torch.bfloat16, mask="magnitude"):
    return make(narrow, wide, dtype, mask, seed=1), make(wide, narrow, dtype, mask, seed=2)


def gradients(x, dy, layers, call):
    x = x.detach().requires_grad_()
    parameters = [p for layer in layers for p in (layer.values, layer.bias)]
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), dy)]


def in_turn(layers, approximate):
    """The same out of dense operations in the layers' own dtype, with the pruned backward of the method."""

    def call(x):
        up, down = layers
        parts = [(layer.dense_weight().to(x.dtype), layer.backward_mask(), layer) for layer in (up, down)]
        hidden = F.gelu(_linear(x, *parts[0]), approximate=approximate)
        return _linear(hidden, *parts[1])

    return call


def _linear(x, weight, mask, layer):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, values, bias):
            ctx.save_for_backward(x)
            return F.linear(x, weight, bias)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            rows = dy.reshape(-1, dy.shape[-1])
            dense = rows.t() @ x.reshape(-1, x.shape[-1])
            return dy @ (weight * mask), dense[layer.forward_mask()].view_as(layer.values), rows.sum(0)

    return Product.apply(x, layer.values, layer.bias)


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "leading"),
    [
        ((NARROW, WIDE), (1,)),
        ((NARROW, WIDE), (7,)),
        ((NARROW, WIDE), (3, 171)),
        ((1024, 4096), (2048,)),
        ((528, 1040), (129,)),
        ((1536, 6144), (264,)),
        ((NARROW, WIDE), (0,)),
    ],
)
def test_error_is_at_most_twice_the_dense_ops(shape, leading, dtype, approximate):
    layers = mlp(*shape, dtype)
    x = torch.randn(*leading, shape[0], device="cuda").to(dtype)
    dy = torch.randn(*leading, shape[0], device="cuda").to(dtype)
    ours = gradients(x, dy, layers, lambda x: sparse_mlp(x, layers[0], nn.GELU(approximate), layers[1]))
    dense = gradients(x, dy, layers, in_turn(layers, approximate))
    exact_layers = [exact_of(layer) for layer in layers]
    truth = gradients(x.double(), dy.double(), exact_layers, in_turn(exact_layers, approximate))
    for name, a, b, t in zip(("y", "dx", "dw1", "db1", "dw2", "db2"), ours, dense, truth, strict=True):
        assert a.shape == b.shape == t.shape, name
        assert a.dtype == dtype, name
        if a.numel():
            error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
            floor = torch.finfo(dtype).eps * 0.5 * t.abs().max().item()
            assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, dense {allowed:.3g}, floor {floor:.3g}"


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_inputs_of_the_activation(dtype, approximate):
    """Large, tiny, zero and negative: the product is the identity's half, so that pre is what is fed in."""
    layers = mlp(NARROW, NARROW, dtype)
    special = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 0.5, -0.5, 3, -3, 6, -6, 11, -11, 200, -200, 6e4, -6e4])
    with torch.no_grad():
        for layer in layers:
            layer.values.zero_()
        layers[0].bias.copy_(special.repeat(NARROW // 16))
    operand = layers[0]
    x = torch.randn(8, NARROW, device="cuda").to(dtype)
    pair = operand._operands.current(*operand._weight(), dtype, "cusparselt", False)
    from slope_pl.ops import cusparselt

    hidden, pre = cusparselt.forward_gelu(x, pair.forward, operand.indices, operand.bias, approximate, True)
    assert torch.equal(pre, operand.bias.expand(8, -1))
    torch.testing.assert_close(hidden, F.gelu(pre, approximate=approximate))
    assert torch.equal(
        hidden, cusparselt.forward_gelu(x, pair.forward, operand.indices, operand.bias, approximate, False)[0]
    )
    with torch.no_grad():
        layers[1].values.fill_(0.01)
    backward = layers[1]._operands.current(*layers[1]._weight(), dtype, "cusparselt", True).backward
    columns = layers[1].backward_indices
    ours = cusparselt.dgrad_gelu(x, backward, columns, pre, approximate)
    product = cusparselt.dgrad(x, backward, columns)
    exact = torch.ops.aten.gelu_backward(product.double(), pre.double(), approximate=approximate)
    torch.testing.assert_close(ours.double(), exact, rtol=3 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("after", [a for a in After if a])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_is_right_and_wrong_results_are_refused(dtype, after):
    layer = make(NARROW, 1040, dtype)
    operand = layer._operands.current(*layer._weight(), dtype, "cusparselt", False).forward
    x = torch.randn(300, NARROW, device="cuda").to(dtype)
    bias = None if after.is_gradient else layer.bias
    problem = algorithms._random_problem(x, 300, operand, layer.indices, bias, Order.CUTLASS, after)
    found = algorithms.candidates(0, Order.CUTLASS, after)
    assert len(found) == 8
    assert [algorithms.refusal(problem.run, a, problem) for a in found] == [None] * len(found)
    for k in range(len(problem.run(found[0]))):

        def spoilt(algorithm, k=k):
            results = [result.clone() for result in problem.run(algorithm)]
            results[k][299, 1039] += results[k].abs().max()
            return tuple(results)

        reason = algorithms.refusal(spoilt, found[0], problem)
        assert reason is not None
        assert "wrong" in reason
    assert "cannot run" in algorithms.refusal(problem.run, Algorithm(SM90), problem)  # a kernel without the epilogue


def test_arguments_are_checked():
    layer, ops = make(NARROW, 1040), torch.ops.slope_cuda
    operand = layer._operands.current(*layer._weight(), torch.bfloat16, "cusparselt", False).forward
    x = torch.randn(8, NARROW, device="cuda", dtype=torch.bfloat16)
    bias = layer.bias.detach()
    with pytest.raises(RuntimeError, match="bias is"):
        ops.spmm_gelu(x, operand, bias[:512], 1040, 8, False, True)
    with pytest.raises(RuntimeError, match="pre is"):
        ops.spmm_gelu_gradient(x, operand, x, 1040, 8, False)
    with pytest.raises(RuntimeError, match="operand is"):
        ops.spmm_gelu(x.half(), operand, bias, 1040, 8, False, True)
    with pytest.raises(RuntimeError, match="no such epilogue"):
        ops.spmm_gelu(x, operand, bias, 1040, 0, False, True)


def net_of(dtype):
    torch.manual_seed(3)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gelu, self.down = nn.Linear(512, 1024), nn.GELU("tanh"), nn.Linear(1024, 512)

        def forward(self, x):
            return x + sparse_mlp(x, self.up, self.gelu, self.down)

    net = nn.Sequential(Block(), Block()).cuda().to(dtype)
    sparsify(net, SLoPeConfig(keep_first_dense=False, keep_heads_dense=False, backend="cusparselt", adapter_rank=2))
    return net


def steps(net, call, dtype, count=8):
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-3), []
    for i in range(count):
        x = torch.randn(40, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(i)).to(dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            loss = (call(x) - x.sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        for layer in net.modules():
            if isinstance(layer, SparseLinear):
                if i == 3:
                    layer.refresh_backward_mask()
                if i == 5:
                    layer.wake_adapters()
    return torch.tensor(losses)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_compiled_and_unfused_agree(dtype, mode):
    torch._dynamo.reset()
    net = net_of(dtype)
    eager, plain = copy.deepcopy(net), copy.deepcopy(net)
    for layer in plain.modules():
        if isinstance(layer, SparseLinear):
            layer.config = SLoPeConfig(backend="cusparselt", adapter_rank=2, fuse_gelu=False)
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    fused, apart = steps(eager, eager, dtype), steps(plain, plain, dtype)
    torch.testing.assert_close(fused, apart, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(steps(net, compiled, dtype), fused, rtol=2e-2, atol=1e-3)


def test_a_recorded_step_equals_an_eager_one():
    layers = mlp()
    x, dy = (torch.randn(264, NARROW, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def step():
        return gradients(x, dy, layers, lambda x: sparse_mlp(x, layers[0], nn.GELU(), layers[1]))

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(recorded, expected, strict=True):
        assert torch.equal(a, b)
