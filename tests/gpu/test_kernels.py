"""The project's own kernels against the reference implementation, bit for bit."""

import pytest
import torch

from slope_pl.ops.algorithm_cache import Order
from slope_pl.ops.algorithms import candidates, encode
from slope_pl.ops.cusparselt import order_of
from slope_pl.sparsity import (
    MASK_KINDS,
    backward_mask,
    backward_values,
    choose_backward_indices,
    compress,
    decompress,
    make_mask,
    pack_indices,
)
from tests.gpu.compiled_cases import DTYPES, require_extension
from tests.unit.reference import bits

pytestmark = pytest.mark.gpu

FLOATS = (torch.float32, *DTYPES)
SHAPES = [(8, 8), (16, 24), (72, 136), (128, 128), (200, 328), (1024, 768), (2056, 2568)]


@pytest.fixture(autouse=True)
def _extension():
    require_extension()


@pytest.fixture
def ops():
    return torch.ops.slope_cuda


def weight(shape, dtype=torch.float32, mask="magnitude"):
    dense = torch.randn(*shape, device="cuda").to(dtype)
    indices = pack_indices(make_mask(mask, dense, seed=0))
    values = compress(dense, indices)
    values.view(-1)[::7] = 0.0  # kept weights that are zero by now, of either sign
    values.view(-1)[::11] = -0.0
    return values, indices, choose_backward_indices(values, indices)


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_refresh(ops, shape, source, target, kind):
    if kind == "transposable" and shape[0] > 1024:
        kind = "random"
    values, indices, columns = weight(shape, source, kind)
    forward = torch.full((values.numel() + 8,), 7.0, dtype=target, device="cuda")
    backward = torch.full((values.numel() + 8,), 7.0, dtype=target, device="cuda")
    for f, b in ((forward, backward), (forward.clone(), None), (None, backward.clone())):
        ops.refresh(values, indices, columns, f, b)
        if f is not None:
            assert torch.equal(bits(f[:-8].view_as(values)), bits(values.to(target)))
            assert bool((f[-8:] == 7).all())
        if b is not None:
            expected = backward_values(values.to(target), indices, columns)
            assert torch.equal(bits(b[:-8].view_as(expected)), bits(expected))
            assert bool((b[-8:] == 7).all())


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_choice_of_columns_and_churn(ops, shape, dtype, kind):
    if kind == "transposable" and shape[0] > 1024:
        kind = "random"
    values, indices, before = weight(shape, dtype, kind)
    values = values + torch.randn_like(values)
    values.view(-1)[::13] = float("nan")
    values.view(-1)[::17] = float("inf")
    values.view(-1)[::5] = 0.5  # ties
    chosen, counts = ops.choose_columns(values, indices, before)
    expected = choose_backward_indices(values, indices)
    assert torch.equal(chosen, expected)
    old, new = backward_mask(indices, before), backward_mask(indices, expected)
    assert counts.tolist() == [int((new & ~old).sum()), int(old.sum())]
    assert torch.equal(ops.choose_columns(values, indices, None)[0], expected)


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 16)])
def test_select(ops, shape, source, target):
    dense = torch.randn(*shape, device="cuda").to(source)
    indices = pack_indices(make_mask("random", dense, seed=1))
    kept = ops.select(dense, indices, target)
    assert torch.equal(bits(kept), bits(compress(dense, indices).to(target)))


def orders(ops):
    return [order for order in Order if order is not Order.CUTLASS or ops.sm90_configs() > 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_metadata_depends_on_the_mask_alone(ops, dtype):
    values, indices, _ = weight((64, 96), dtype)
    for order in orders(ops):
        size = ops.operand_bytes(values, 64, 96, dtype, order) // 2
        assert 64 * 96 * 9 // 16 <= size <= 64 * 128 * 9 // 16  # metadata are padded to tiles
        metadata = []
        for fill in (0.0, -0.0, float("nan"), 1.0):
            operand = torch.full((size,), fill, dtype=dtype, device="cuda")
            ops.write_metadata(indices, operand, order)
            head, tail = operand[: values.numel()], operand[values.numel() :]
            assert torch.equal(bits(head), bits(torch.full_like(head, fill)))
            metadata.append(bits(tail))
        assert all(torch.equal(metadata[0], other) for other in metadata)


def test_hopper_is_known():
    """On this chip and library our own kernel writes what the library would; elsewhere the library does it itself."""
    if torch.cuda.get_device_capability() == (9, 0):
        assert order_of(4096, 4096, torch.device("cuda", 0)) is Order.DIRECT
        assert torch.ops.slope_cuda.sm90_configs() > 0, "the extension was built without the CUTLASS kernels"


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16), (80, 272), (208, 336), (256, 512), (1024, 768)])
def test_products_by_every_order_of_metadata(ops, shape, dtype, kind):
    values, indices, _ = weight(shape, dtype, kind)
    x = torch.randn(136, shape[1], device="cuda", dtype=dtype)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    exact = torch.nn.functional.linear(x.double(), decompress(values, indices).double(), bias.double())
    dense = torch.nn.functional.linear(x, decompress(values, indices), bias)
    for order in orders(ops):
        operand = torch.empty(ops.operand_bytes(values, *shape, dtype, order) // 2, dtype=dtype, device="cuda")
        ops.refresh(values, indices, None, operand, None)
        ops.write_metadata(indices, operand, order)
        for algorithm in candidates(2, order):
            y = ops.spmm(x, operand, bias, shape[0], encode(algorithm), encode(algorithm))
            error, allowed = ((t.double() - exact).abs().max() for t in (y, dense))
            assert error <= 2 * allowed, f"{order!r} {algorithm}: {error} against {allowed}"


@pytest.mark.parametrize("name", ["spmm", "select", "choose_columns", "refresh", "write_metadata"])
def test_opcheck(ops, name):
    values, indices, columns = weight((32, 64), torch.bfloat16)
    size = ops.operand_bytes(values, 32, 64, torch.bfloat16, 0) // 2
    operand = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    ops.write_metadata(indices, operand, 0)
    x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    arguments = {
        "spmm": (x, operand, None, 32, 0, 0),
        "select": (torch.randn(32, 64, device="cuda"), indices, torch.bfloat16),
        "choose_columns": (values, indices, columns),
        "refresh": (values, indices, columns, operand, torch.zeros_like(operand)),
        "write_metadata": (indices, operand, 1),
    }[name]
    torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, v, i, c: o.refresh(v, i[:, :-1], c, v.flatten(), None), r"indices: Byte of shape \(32, 7\)"),
        (lambda o, v, i, c: o.refresh(v, i, c.int(), None, v.flatten()), "backward_indices: Int of shape"),
        (lambda o, v, i, c: o.refresh(v, i, c, v.flatten()[:5], None), "operand is BFloat16 with 5 elements"),
        (lambda o, v, i, c: o.refresh(v.double(), i, c, v.flatten(), None), "values: dtype Double"),
        (lambda o, v, i, c: o.refresh(v, i, None, None, v.flatten()), "needs backward_indices"),
        (lambda o, v, i, c: o.refresh(v, i, None, None, None), "no operand"),
        (lambda o, v, i, c: o.select(v[:, :12], i, torch.float32), "columns a multiple of 8"),
        (lambda o, v, i, c: o.spmm(v, v.flatten()[:512], None, 32, 0, 0), "operand has 512 elements, expected"),
        (lambda o, v, i, c: o.spmm(v.float(), v.flatten(), None, 8, 0, 0), "x: dtype Float"),
        (lambda o, v, i, c: o.spmm(v, v.flatten(), v[0, :3].clone(), 8, 0, 0), "bias is BFloat16 with 3"),
    ],
)
def test_bad_arguments_are_named(ops, call, message):
    values, indices, columns = weight((32, 64), torch.bfloat16)
    with pytest.raises(RuntimeError, match=message):
        call(ops, values, indices, columns)
