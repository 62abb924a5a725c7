"""``torch.ops.slope.*`` against an independent dense masked product: W as a matrix, masks applied by multiplication."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from slope_pl import ops
from slope_pl.errors import BackendUnavailableError
from slope_pl.ops import backends
from slope_pl.sparsity import compress, make_mask, pack_indices
from tests.unit.reference import FLOATS, backward_mask_of, gaussian, mask_of, spread, within_twice_dense

LEADING = {"rows": (6,), "none": (), "batch": (2, 3), "4d": (2, 1, 3), "zero": (0,), "zero4d": (2, 0, 3)}


class Case:
    """A weight (d_out, d_in) = (16, 24), what the ops take, and the dense matrices of an oracle."""

    def __init__(self, kind="random", dtype=torch.float64, d_out=16, d_in=24, bias=True):
        weight = gaussian(d_out, d_in, dtype=dtype)
        self.indices = pack_indices(make_mask(kind, weight, seed=1))
        self.values = compress(weight, self.indices).requires_grad_()
        self.bias = gaussian(d_out, seed=1, dtype=dtype).requires_grad_() if bias else None
        self.columns = ops.choose_backward_indices(self.values, self.indices)
        self.mask = mask_of(self.indices)
        self.weight = spread(self.values.detach(), self.indices)
        self.twice_pruned = self.weight * backward_mask_of(self.weight, self.mask)

    def x(self, *leading, seed=2):
        return gaussian(*leading, self.weight.shape[1], seed=seed, dtype=self.values.dtype).requires_grad_()

    def dy(self, *leading):
        return gaussian(*leading, self.weight.shape[0], seed=3, dtype=self.values.dtype)

    def operands(self, values=None):
        values = (self.values if values is None else values).detach()
        dtype = values.dtype
        return (
            ops.forward_operand(values, self.indices, dtype, "reference"),
            ops.backward_operand(values, self.indices, self.columns, dtype, "reference"),
        )

    def args(self, x):
        forward, backward = self.operands()
        return x, self.values, self.indices, self.bias, forward, backward, self.columns, "reference"

    def __call__(self, x, values=None, bias=None):
        values = self.values if values is None else values
        forward, backward = self.operands(values)
        bias = self.bias if bias is None else bias
        return ops.sparse_linear(x, values, self.indices, bias, forward, backward, self.columns, "reference")


def arguments(name, case):
    values, x, dy = case.values.detach(), case.x(5).detach(), case.dy(5)
    forward, backward = case.operands()
    return {
        "dgrad": (dy, backward, case.columns, "reference"),
        "wgrad": (dy, x, case.indices, torch.float32, "reference"),
        "forward_operand": (values, case.indices, torch.bfloat16, "reference"),
        "backward_operand": (values, case.indices, case.columns, torch.bfloat16, "reference"),
        "choose_backward_indices": (values, case.indices),
        "sparse_linear": (x, values, case.indices, None, forward, None, case.columns, "reference"),
    }[name]


NAMES = ("sparse_linear", "dgrad", "wgrad", "forward_operand", "backward_operand", "choose_backward_indices")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_without_gradients(name, dtype):
    torch.library.opcheck(getattr(torch.ops.slope, name).default, arguments(name, Case(dtype=dtype)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_opcheck_of_the_differentiable_product(leading, bias):
    case = Case(dtype=torch.float32, bias=bias)
    torch.library.opcheck(torch.ops.slope.sparse_linear.default, case.args(case.x(*leading)))


@pytest.mark.parametrize("view", ["rows", "columns", "batch"])
def test_opcheck_of_non_contiguous_inputs(view):
    case = Case(dtype=torch.float32)
    x = {
        "rows": gaussian(12, 24)[::2],
        "columns": gaussian(6, 48)[:, ::2],
        "batch": gaussian(3, 2, 24).transpose(0, 1),
    }[view].requires_grad_()
    assert not x.is_contiguous()
    torch.library.opcheck(torch.ops.slope.sparse_linear.default, case.args(x))


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_have_the_shape_and_dtype_of_the_result(name):
    args = arguments(name, Case())
    op = getattr(torch.ops.slope, name)
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("leading", [(5,), (), (2, 3)])
def test_gradcheck_in_values_and_bias(leading):
    case = Case(d_out=8, d_in=8)
    x = case.x(*leading).detach()
    assert torch.autograd.gradcheck(lambda values, bias: case(x, values, bias), (case.values, case.bias))


def test_gradcheck_in_x_where_the_mask_is_transposable():
    case = Case("transposable", d_out=8, d_in=8)
    assert torch.autograd.gradcheck(case, (case.x(5), case.values, case.bias))


def test_input_gradient_is_that_of_the_double_pruned_weight_and_not_the_true_one():
    case = Case()
    x, dy = case.x(5), case.dy(5)
    (dx,) = torch.autograd.grad(case(x), x, dy)
    torch.testing.assert_close(dx, dy @ case.twice_pruned, rtol=1e-12, atol=1e-12)
    assert float((dx - dy @ case.weight).abs().max()) > 0.1
    assert not torch.autograd.gradcheck(case, (x,), raise_exception=False)


def test_weight_gradient_is_taken_at_kept_positions():
    # The published kernel takes the gradients of the *pruned* ones (slope-method 12.1.1).
    case = Case()
    x, dy = case.x(5), case.dy(5)
    (dvalues,) = torch.autograd.grad(case(x), case.values, dy)
    full = dy.t() @ x.detach()
    torch.testing.assert_close(dvalues, full[case.mask].view_as(dvalues), rtol=1e-12, atol=1e-12)
    dropped = case.mask & (case.twice_pruned == 0)  # entries skipped in the input gradient are trained all the same
    assert bool((spread(dvalues, case.indices)[dropped] != 0).all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_product_and_gradients_equal_the_dense_masked_ones(leading, bias):
    case = Case(bias=bias)
    x, dy = case.x(*leading), case.dy(*leading)
    y = case(x)
    torch.testing.assert_close(y, F.linear(x, case.weight, case.bias), rtol=1e-12, atol=1e-12)
    y.backward(dy)
    rows, columns = dy.reshape(-1, 16), x.detach().reshape(-1, 24)
    torch.testing.assert_close(x.grad, dy @ case.twice_pruned, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        spread(case.values.grad, case.indices), (rows.t() @ columns) * case.mask, rtol=1e-12, atol=1e-12
    )
    if bias:
        torch.testing.assert_close(case.bias.grad, rows.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_dense_product(dtype):
    case = Case(dtype=dtype, d_out=128, d_in=256)
    x, dy = case.x(64), case.dy(64)
    y = case(x)
    dx, dvalues, dbias = torch.autograd.grad(y, (x, case.values, case.bias), dy)
    x, bias = x.detach(), case.bias.detach()
    results = {"y": y, "dx": dx, "dw": spread(dvalues, case.indices), "db": dbias}

    def dense(to):
        x_, dy_, w, rc, b = (t.to(to) for t in (x, dy, case.weight, case.twice_pruned, bias))
        return {"y": F.linear(x_, w, b), "dx": dy_ @ rc, "dw": (dy_.t() @ x_) * case.mask, "db": dy_.sum(0)}

    same, exact = dense(dtype), dense(torch.float64)
    for name, got in results.items():
        within_twice_dense(got, same[name], exact[name])


def test_operands_and_gradients_have_the_dtype_asked_for():
    case = Case(dtype=torch.float32)
    x = case.x(3).detach().bfloat16().requires_grad_()
    forward = ops.forward_operand(case.values.detach(), case.indices, torch.bfloat16, "reference")
    backward = ops.backward_operand(case.values.detach(), case.indices, case.columns, torch.bfloat16, "reference")
    y = ops.sparse_linear(x, case.values, case.indices, case.bias, forward, backward, case.columns, "reference")
    y.sum().backward()
    assert (forward.dtype, backward.dtype, y.dtype, x.grad.dtype) == (torch.bfloat16,) * 4
    assert (case.values.grad.dtype, case.bias.grad.dtype) == (torch.float32,) * 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_operand_is_a_copy(dtype):
    case = Case(dtype=dtype)
    operand = ops.forward_operand(case.values.detach(), case.indices, dtype, "reference")
    before = operand.clone()
    with torch.no_grad():
        case.values.zero_()
    assert torch.equal(operand, before)


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_the_gradient_that_is_needed_is_computed(wanted, monkeypatch):
    calls = []

    def counted(name):
        original = getattr(ops.get_backend("reference"), name)
        return lambda *args: calls.append(name) or original(*args)

    counting = replace(ops.get_backend("reference"), dgrad=counted("dgrad"), wgrad=counted("wgrad"))
    monkeypatch.setitem(backends._REGISTRY, "reference", counting)
    case = Case()
    tensors = {"x": case.x(5), "values": case.values, "bias": case.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    case(tensors["x"]).sum().backward()
    assert calls == {"x": ["dgrad"], "values": ["wgrad"], "bias": []}[wanted]
    assert [tensor.grad is not None for tensor in tensors.values()] == [name == wanted for name in tensors]


def test_an_expanded_gradient_is_handled():
    case = Case()
    x = case.x(5)
    case(x).sum().backward()  # sum() hands back a tensor of stride 0
    torch.testing.assert_close(x.grad, torch.ones(5, 16, dtype=torch.float64) @ case.twice_pruned)


def test_a_missing_backward_operand_is_an_error_only_where_x_needs_a_gradient():
    case = Case()
    forward, _ = case.operands()
    rest = (case.values, case.indices, case.bias, forward, None, case.columns, "reference")
    ops.sparse_linear(case.x(5).detach(), *rest).sum().backward()
    assert case.values.grad is not None
    y = ops.sparse_linear(case.x(5), *rest)
    with pytest.raises(RuntimeError, match="x needs a gradient, but no backward_operand was given"):
        y.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "values"])
def test_a_second_derivative_is_refused(wanted):
    case = Case("transposable")
    tensors = {"x": case.x(5), "values": case.values}
    (grad,) = torch.autograd.grad(case(tensors["x"]).square().sum(), tensors[wanted], create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error is needed: a warning is lost in a training log
        with pytest.raises(RuntimeError, match=r"twice|once_differentiable|second"):
            torch.autograd.grad(grad.square().sum(), tensors["x"])


def test_compiled_product_and_gradients_equal_eager():
    case = Case(dtype=torch.float32)

    def step(x, values, bias):
        return case(x, values, bias)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, dy = case.x(2, 3), case.dy(2, 3)
    inputs = (x, case.values, case.bias)
    eager, traced = (f(*inputs) for f in (step, compiled))
    torch.testing.assert_close(traced, eager)
    for a, b in zip(torch.autograd.grad(traced, inputs, dy), torch.autograd.grad(eager, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_a_direct_call_under_autocast_keeps_the_dtype_of_x():
    case = Case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert case(case.x(5)).dtype == torch.float32


def test_auto_resolves_to_a_backend_that_runs_here():
    name = ops.resolve_backend("auto", "cpu")
    assert ops.why_not(name, "cpu") is None
    assert ops.get_backend(name).name == name == "reference"


def test_auto_prefers_the_backend_registered_last_and_skips_what_cannot_run(monkeypatch):
    reference = ops.get_backend("reference")
    monkeypatch.setattr(backends, "_REGISTRY", dict(backends._REGISTRY))
    ops.register_backend(
        replace(reference, name="fast", why_not=lambda device: None if device == "cpu" else "CPU only")
    )
    assert [ops.resolve_backend("auto", device) for device in ("cpu", "cuda")] == ["fast", "reference"]
    with pytest.raises(BackendUnavailableError, match="backend='fast' cannot run on 'cuda': CPU only"):
        ops.resolve_backend("fast", "cuda")


def test_a_gpu_user_of_auto_is_told_that_the_reference_is_slow():
    note = ops.slow_backend_note("auto", "cuda")
    assert "slower than dense" in note
    assert "cusparselt: the compiled extension" in note
    assert ops.slow_backend_note("auto", "cpu") is None
    assert ops.slow_backend_note("reference", "cuda") is None
