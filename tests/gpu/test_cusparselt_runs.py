"""The layer on the compiled backend: streams, threads, graphs, compilation, checkpointing."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from slope_pl import SLoPeConfig, SparseLinear, sparsify
from tests.gpu.compiled_cases import gradients, make, require_extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch's compiler begins with one
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch 2.11's own compiler
]


@pytest.fixture(autouse=True)
def _extension():
    require_extension()


def inputs(layer, *leading, dtype=None):
    dtype = dtype or layer.values.dtype
    x = torch.randn(*leading, layer.in_features, device="cuda").to(dtype)
    return x, torch.randn(*leading, layer.out_features, device="cuda").to(dtype)


def test_two_streams():
    layer = make(512, 512)
    x, _ = inputs(layer, 2048)
    with torch.no_grad():
        expected = layer(x)
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in range(2)], []
        for _ in range(10):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(layer(x))
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands_made_on_one_stream_are_waited_for_on_another(dtype):
    """The first product after a step makes them, behind whatever its stream is busy with; the second must not run ahead."""
    layer = make(1024, 1024, dtype=dtype)
    x, dy = inputs(layer, 256, dtype=torch.bfloat16)

    def train(x):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            return gradients(layer, x, dy, [layer.values])

    train(x)
    with torch.no_grad():
        layer.values.mul_(2)
    expected = [part.clone() for part in train(x)]
    with torch.no_grad():
        layer.values.mul_(0.5)
    train(x)
    with torch.no_grad():
        layer.values.mul_(2)
    torch.cuda.synchronize()
    busy, free = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(50_000_000)
        train(x)
    with torch.cuda.stream(free):
        results = train(x)
    torch.cuda.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_two_threads():
    layers = [make(256, 256, seed=s) for s in range(2)]
    data = [inputs(layer, 128) for layer in layers]
    expected = [gradients(layer, *d, [layer.values]) for layer, d in zip(layers, data, strict=True)]
    wrong: list[str] = []

    def work(i):
        try:
            for _ in range(50):
                for a, b in zip(gradients(layers[i], *data[i], [layers[i].values]), expected[i], strict=True):
                    if not torch.equal(a, b):
                        wrong.append(f"thread {i}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def small_net(dtype):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64))
    net = net.cuda().to(dtype)
    sparsify(net, SLoPeConfig(keep_first_dense=False, keep_heads_dense=False, backend="cusparselt"))
    return net


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_recorded_training_step_equals_an_eager_one(dtype):
    nets = [small_net(dtype) for _ in range(2)]
    batches = [torch.randn(32, 64, device="cuda").to(dtype) for _ in range(8)]

    def step(net, optimizer, x):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            loss = (net(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss

    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2, capturable=True) for net in nets]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in batches[:3]:
            for net, optimizer in zip(nets, optimizers, strict=True):
                step(net, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    static, graph = batches[0].clone(), torch.cuda.CUDAGraph()
    before = [p.detach().clone() for p in nets[0].parameters()]
    with torch.cuda.graph(graph):
        step(nets[0], optimizers[0], static)
    for p, b in zip(nets[0].parameters(), before, strict=True):
        assert torch.equal(p, b)  # recording runs nothing
    for i, x in enumerate(batches[3:]):
        static.copy_(x)
        graph.replay()
        step(nets[1], optimizers[1], x)
        if i == 2:  # the re-setup happens between replays and reaches the recorded buffers
            for net in nets:
                for layer in net:
                    if isinstance(layer, SparseLinear):
                        layer.refresh_backward_mask()
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(a, b)
    x = batches[0]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
        assert torch.equal(nets[0](x), nets[1](x))  # eager again, after replays that no version counter saw


def test_recording_before_any_forward_is_refused_clearly():
    layer = make(dtype=torch.float32)
    x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    with (
        pytest.raises(RuntimeError, match="cannot be allocated while a CUDA graph is recorded"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        torch.autocast("cuda", torch.bfloat16),
    ):
        layer(x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_training_equals_eager(dtype, mode):
    torch._dynamo.reset()
    nets = [small_net(dtype) for _ in range(2)]
    compiled = torch.compile(nets[0], fullgraph=True, mode=None if mode == "default" else mode)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in nets]
    losses = [[], []]
    for i in range(12):
        x = torch.randn(32, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(i)).to(dtype)
        for k, (call, optimizer) in enumerate(zip((compiled, nets[1]), optimizers, strict=True)):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
                loss = (call(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[k].append(loss.item())
        if i == 7:
            for net in nets:
                for layer in net:
                    if isinstance(layer, SparseLinear):
                        layer.refresh_backward_mask()
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-2, atol=1e-3)


def test_compiled_operands_are_refreshed_once_a_step(monkeypatch):
    from dataclasses import replace

    from slope_pl.ops import backends

    calls, original = [], backends.get_backend("cusparselt")
    counting = replace(original, refresh=lambda *a: calls.append(1) or original.refresh(*a))
    torch._dynamo.reset()
    net = small_net(torch.bfloat16)
    compiled = torch.compile(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    compiled(torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
    monkeypatch.setitem(backends._REGISTRY, "cusparselt", counting)
    optimizer.step()
    for _ in range(4):
        compiled(torch.randn(16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert len(calls) <= 2 * 3  # the first layer's operand for an input gradient comes with its first request


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    layer = make()
    x, dy = inputs(layer, 40)
    plain = gradients(layer, x, dy, [layer.values, layer.bias])
    x = x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(dy)
    for a, b in zip((y, x.grad, layer.values.grad, layer.bias.grad), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(512, 256), (2048, 4096)])
def test_transient_operands_give_the_bits_of_kept_ones(size, dtype, compiled):
    """Of a weight that is gathered for its products alone: made for each of them, and held by nobody."""
    layer = make(*size, dtype=dtype)
    x, dy = inputs(layer, 256, dtype=torch.bfloat16)

    def train(function):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            return gradients(function, x, dy, [layer.values])

    expected = train(layer)
    layer._operands.become_transient(True)
    assert layer.operand_bytes() == 0
    for _ in range(2):
        for a, b in zip(train(torch.compile(layer) if compiled else layer), expected, strict=True):
            assert torch.equal(a, b)
    assert layer.operand_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gathered_bias_costs_one_plan_wherever_it_comes_to_lie(dtype):
    layer = make(2048, 4096, dtype=dtype)
    x, _ = inputs(layer, 256, dtype=torch.bfloat16)
    layer._operands.become_transient(True)
    biases, results, plans = [], [], set()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
        for _ in range(6):
            biases.append(layer.bias.detach().clone())  # kept, so that none lies where one before it did
            layer.bias.data = biases[-1]
            results.append(layer(x))
            plans.add(torch.ops.slope_cuda.kept_plans(x))
        layer.bias.data = torch.zeros_like(layer.bias)
        assert torch.allclose((results[0] - layer(x)).float(), biases[0].float().expand(256, -1), atol=0.1)
    assert len({bias.data_ptr() for bias in biases}) == 6
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(plans) == 1


def test_opcheck_of_the_differentiable_product():
    layer = make()
    x, _ = inputs(layer, 16)
    args = (layer.values, layer.indices, layer.backward_indices, layer.bias, True, "cusparselt")
    torch.library.opcheck(torch.ops.slope.sparse_linear.default, (x.requires_grad_(), *args))
