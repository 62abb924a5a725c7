"""The layer on the compiled backend: numbers, shapes, memory, streams, threads, graphs, compilation."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from slope_pl import BackendUnavailableError, SLoPeConfig, SparseLinear, sparsify
from slope_pl.ops import resolve_backend
from slope_pl.sparsity import MASK_KINDS
from tests.gpu.compiled_cases import DTYPES, assert_within_twice_dense, exact_of, gradients, make, require_extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch 2.11's own compiler
]


@pytest.fixture(autouse=True)
def _extension():
    require_extension()


def inputs(layer, *leading, dtype=None):
    dtype = dtype or layer.values.dtype
    x = torch.randn(*leading, layer.in_features, device="cuda").to(dtype)
    return x, torch.randn(*leading, layer.out_features, device="cuda").to(dtype)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 129, 1024])
def test_error_is_at_most_twice_the_dense_ops(rows, dtype, kind, bias):
    layer = make(dtype=dtype, mask=kind, bias=bias)
    assert_within_twice_dense(layer, *inputs(layer, rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [264, 13])
@pytest.mark.parametrize(
    "shape", [(16, 16), (16, 2048), (2048, 16), (48, 80), (768, 3072), (1040, 1008), (1552, 1568), (2048, 1552)]
)
def test_shapes(shape, rows, dtype):
    layer = make(*shape, dtype=dtype)  # narrow ones by the CUTLASS kernels on Hopper, the others by cuSPARSELt
    assert_within_twice_dense(layer, *inputs(layer, rows))


@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (2, 1, 3), (2, 0, 3)])
def test_leading_dimensions(leading):
    layer = make()
    assert_within_twice_dense(layer, *inputs(layer, *leading))


def test_strided_misaligned_and_expanded_inputs():
    layer = make()
    x, dy = inputs(layer, 40)
    wide = torch.randn(40, 80, device="cuda", dtype=x.dtype)
    for view in (
        wide[:, :64],  # rows with a gap: read in place
        wide[:, 3:67],  # not on a 16-byte boundary
        x.t().contiguous().t(),
        x[::2].repeat_interleave(2, 0)[::1],
        x[:1].expand(40, -1),
        x.view(8, 5, 64).transpose(0, 1),
    ):
        assert_within_twice_dense(layer, view, dy.view(*view.shape[:-1], -1))
    y = layer(x.requires_grad_())
    y.sum().backward()  # a gradient of stride 0


@pytest.mark.parametrize("autocast", DTYPES)
def test_float32_values_under_autocast(autocast):
    layer = make(dtype=torch.float32)
    x, dy = inputs(layer, 33, dtype=torch.float32)
    with torch.autocast("cuda", autocast):
        y = layer(x.requires_grad_())
    assert y.dtype is autocast
    y.backward(dy.to(autocast))
    assert layer.values.grad.dtype is x.grad.dtype is torch.float32

    def call(x):
        with torch.autocast("cuda", autocast):
            return layer(x)

    cast = copy.deepcopy(layer).to(autocast)
    assert torch.equal(call(x), cast(x.to(autocast)))


def test_kept_zeros_do_not_disturb_their_neighbours():
    layer = make(256, 256)
    with torch.no_grad():
        layer.values.view(-1)[::3] = 0.0
        layer.values.view(-1)[1::5] = -0.0
    assert_within_twice_dense(layer, *inputs(layer, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters(dtype):
    layer = make(dtype=dtype, adapter_rank=4)
    layer.wake_adapters()
    with torch.no_grad():
        layer.adapter_up.normal_()
    x, dy = inputs(layer, 24, dtype=torch.bfloat16)

    def call(x):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            return layer(x)

    twin = copy.deepcopy(layer)
    twin.config = SLoPeConfig(adapter_rank=4, backend="reference")
    exact = exact_of(layer)

    def reference(x):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            return twin(x)

    names = ("values", "bias", "adapter_down", "adapter_up")
    ours = gradients(call, x, dy, [getattr(layer, n) for n in names])
    theirs = gradients(reference, x, dy, [getattr(twin, n) for n in names])
    truth = gradients(exact, x.double(), dy.double(), [getattr(exact, n) for n in names])
    for a, b, t in zip(ours, theirs, truth, strict=True):
        error, allowed = ((v.double() - t).norm() for v in (a, b))
        assert error <= 2 * allowed


# ------------------------------------------------------------------------------------------------ operands in time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_step_and_every_choice_of_columns_is_seen(dtype):
    layer = make(256, 128, dtype=dtype)

    def call(x):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            return layer(x)

    for optimizer in (torch.optim.SGD(layer.parameters(), lr=0.5), torch.optim.AdamW(layer.parameters(), fused=True)):
        for step in range(3):
            x, dy = inputs(layer, 64, dtype=torch.bfloat16)
            if dtype is torch.bfloat16:
                assert_within_twice_dense(layer, x, dy)
            else:
                cast = copy.deepcopy(layer).bfloat16()
                for a, b in zip(gradients(call, x, dy, [layer.bias]), gradients(cast, x, dy, [cast.bias]), strict=True):
                    assert torch.equal(a.bfloat16(), b)
            call(x.requires_grad_()).square().mean().backward()
            optimizer.step()
            if step == 1:
                assert float(layer.refresh_backward_mask()) >= 0


def test_the_weight_lives_inside_its_operand():
    layer = make(256, 512)
    x, _ = inputs(layer, 64)
    layer(x.requires_grad_()).sum().backward()
    values, pair = layer.values, layer._operands._pairs[torch.bfloat16, "cusparselt"]
    assert pair.forward.data_ptr() == values.data_ptr()
    assert values.untyped_storage().nbytes() == values.nbytes  # saved and copied, it is itself and nothing more
    per_weight = (layer.operand_bytes() + values.nbytes) * 8 / (256 * 512)
    assert per_weight == 8 + 1 + 8 + 1  # bits: values and metadata, twice
    with torch.no_grad():
        before = layer(x)
        values.mul_(2)
        assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), atol=0.05)


@pytest.mark.parametrize(
    "move",
    [
        lambda layer: layer.cpu().cuda(),
        lambda layer: layer.half(),
        lambda layer: layer.float().bfloat16(),
        copy.deepcopy,
        lambda layer: (layer.load_state_dict(make(seed=5).state_dict()), layer)[1],
        lambda layer: (layer.load_state_dict(make(seed=5).state_dict(), assign=True), layer)[1],
        lambda layer: layer.eval().train(),
    ],
)
def test_a_weight_that_moved_is_found_again(move):
    layer = make()
    layer(inputs(layer, 16)[0].requires_grad_()).sum().backward()
    layer = move(layer)
    assert_within_twice_dense(layer, *inputs(layer, 40))
    assert layer._operands._pairs[layer.values.dtype, "cusparselt"].forward_is_values


def test_a_weight_in_a_shared_buffer_is_left_there():
    layer = make()
    flat = torch.empty(layer.values.numel() + 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        flat[:-64].copy_(layer.values.flatten())
    layer.values.data = flat[:-64].view_as(layer.values)
    layer._settle()
    assert layer.values.data_ptr() == flat.data_ptr()
    assert_within_twice_dense(layer, *inputs(layer, 40))
    flat.mul_(2)
    layer.train()
    assert_within_twice_dense(layer, *inputs(layer, 40))


def test_operands_stay_where_they_are():
    layer = make(128, 128, dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    seen = set()
    for step in range(6):
        with torch.autocast("cuda", torch.bfloat16):
            layer(inputs(layer, 64, dtype=torch.float32)[0].requires_grad_()).sum().backward()
        pair = layer._operands._pairs[torch.bfloat16, "cusparselt"]
        seen.add((pair.forward.data_ptr(), pair.backward.data_ptr(), pair.bias.data_ptr()))
        optimizer.step()
        if step % 2:
            layer.refresh_backward_mask()
            layer.eval().train()
    assert len(seen) == 1


def test_state_dict_round_trip_through_a_file(tmp_path):
    layer = make()
    layer(inputs(layer, 8)[0].requires_grad_()).sum().backward()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert (tmp_path / "layer.pt").stat().st_size < 1.2 * sum(t.nbytes for t in state.values()) + 4096
    twin = make(seed=3)
    twin.load_state_dict(state)
    x, _ = inputs(layer, 24)
    assert torch.equal(layer(x), twin(x))


# ------------------------------------------------------------------------------------------------ streams, threads, graphs


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


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
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
    for net in nets:
        for layer in net:
            if isinstance(layer, SparseLinear):
                layer.refresh_operands(torch.bfloat16)
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


def test_opcheck_of_the_differentiable_product():
    layer = make()
    x, _ = inputs(layer, 16)
    args = (layer.values, layer.indices, layer.backward_indices, layer.bias, True, "cusparselt")
    torch.library.opcheck(torch.ops.slope.sparse_linear.default, (x.requires_grad_(), *args))


# ------------------------------------------------------------------------------------------------ selection, leaks


def test_selection_by_dtype_and_shape():
    assert resolve_backend("auto", "cuda", torch.bfloat16, 64, 64) == "cusparselt"
    assert resolve_backend("auto", "cuda", torch.float32, 64, 64) == "reference"
    assert resolve_backend("auto", "cuda", torch.bfloat16, 72, 64) == "reference"
    with pytest.raises(BackendUnavailableError, match="72x64: both sides must be multiples of 16"):
        make(64, 72)
    layer = make(dtype=torch.float32)
    with pytest.raises(BackendUnavailableError, match="it multiplies bfloat16 and float16, the input is float32"):
        layer(torch.randn(8, 64, device="cuda"))


@pytest.mark.parametrize("width", [64, 1552])  # by the CUTLASS kernels on Hopper, and by cuSPARSELt
def test_no_leak_over_many_calls_and_shapes(width):
    layer = make(width, width)
    with torch.no_grad():
        for n in range(1, 201):
            layer(torch.randn(n, width, device="cuda", dtype=torch.bfloat16))
        x = torch.randn(64, width, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
        for i in range(10_000):
            layer(x[: 1 + i % 64])
        torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert free - torch.cuda.mem_get_info()[0] < 8 << 20
    assert torch.ops.slope_cuda.kept_plans(x) <= 1024


def test_a_step_synchronises_nothing():
    layer = make(256, 256)
    x, dy = inputs(layer, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)

    def step():
        layer(x.requires_grad_()).backward(dy)
        optimizer.step()

    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
