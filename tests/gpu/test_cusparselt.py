"""The layer on the compiled backend: numbers, shapes, operands in time, memory."""

import copy
import warnings

import pytest
import torch

from slope_pl import BackendUnavailableError, SLoPeConfig
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
