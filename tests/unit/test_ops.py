"""``torch.ops.slope.*`` against an independent dense masked product: W as a matrix, masks applied by multiplication."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from slope_pl import ops
from slope_pl.errors import BackendUnavailableError
from slope_pl.ops import backends
from slope_pl.sparsity import choose_backward_indices, compress, make_mask, pack_indices
from tests.unit.reference import backward_mask_of, gaussian, mask_of, spread, within_twice_dense

LEADING = {"rows": (6,), "none": (), "batch": (2, 3), "4d": (2, 1, 3), "zero": (0,), "zero4d": (2, 0, 3)}


class Case:
    """A weight (d_out, d_in) = (16, 24), what the ops take, and the dense matrices of an oracle."""

    def __init__(self, kind="random", dtype=torch.float64, d_out=16, d_in=24, bias=True):
        weight = gaussian(d_out, d_in, dtype=dtype)
        self.indices = pack_indices(make_mask(kind, weight, seed=1))
        self.values = compress(weight, self.indices).requires_grad_()
        self.bias = gaussian(d_out, seed=1, dtype=dtype).requires_grad_() if bias else None
        self.columns = choose_backward_indices(self.values, self.indices)
        self.mask = mask_of(self.indices)
        self.weight = spread(self.values.detach(), self.indices)
        self.twice_pruned = self.weight * backward_mask_of(self.weight, self.mask)

    def x(self, *leading, seed=2):
        return gaussian(*leading, self.weight.shape[1], seed=seed, dtype=self.values.dtype).requires_grad_()

    def dy(self, *leading):
        return gaussian(*leading, self.weight.shape[0], seed=3, dtype=self.values.dtype)

    def args(self, x):
        return x, self.values, self.indices, self.columns, self.bias, x.requires_grad, "reference"

    def __call__(self, x, values=None, bias=None, operands=None):
        values = self.values if values is None else values
        bias = self.bias if bias is None else bias
        return ops.sparse_linear(x, values, self.indices, self.columns, bias, "reference", operands)


def arguments(name, case):
    values, x, dy = case.values.detach(), case.x(5).detach(), case.dy(5)
    return {
        "dgrad": (dy, values, case.indices, case.columns, "reference"),
        "wgrad": (dy, x, case.indices, torch.float32, "reference"),
        "choose_columns": (values, case.indices, case.columns, "reference"),
        "sparse_linear": (x, values, case.indices, case.columns, None, False, "reference"),
    }[name]


NAMES = ("sparse_linear", "dgrad", "wgrad", "choose_columns")


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
    for f, r in zip(*((t if isinstance(t, tuple) else (t,)) for t in (fake, real)), strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


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


@pytest.mark.parametrize("operands", [None, ops.Operands()])
def test_results_and_gradients_have_the_dtypes_of_what_they_belong_to(operands):
    case = Case(dtype=torch.float32)
    x = case.x(3).detach().bfloat16().requires_grad_()
    y = case(x, operands=operands)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16,) * 2
    assert (case.values.grad.dtype, case.bias.grad.dtype) == (torch.float32,) * 2


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_the_eager_path_equals_the_operation(leading, bias, needs):
    results = []
    for operands in (None, ops.Operands()):
        case = Case(bias=bias)
        x = case.x(*leading).requires_grad_(needs[0])
        case.values.requires_grad_(needs[1])
        case(x, operands=operands).backward(case.dy(*leading))
        results.append([t.grad for t in (x, case.values, case.bias) if t is not None])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_a_weight_changed_between_forward_and_backward_is_refused_as_torch_does():
    for operands in (None, ops.Operands()):
        case = Case()
        y = case(case.x(5), operands=operands)
        with torch.no_grad():
            case.values.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_flops_are_half_of_dense_but_for_the_weight_gradient():
    case = Case(d_out=16, d_in=24)
    for operands in (None, ops.Operands()):
        with FlopCounterMode(display=False) as counter:
            case(case.x(2, 5), operands=operands).sum().backward()
        dense = 2 * 10 * 16 * 24
        assert counter.get_total_flops() == dense // 2 + dense // 2 + dense


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
@pytest.mark.parametrize("operands", [None, ops.Operands()])
def test_only_the_gradient_that_is_needed_is_computed(wanted, operands, monkeypatch):
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
    case(tensors["x"], operands=operands).sum().backward()
    assert calls == {"x": ["dgrad"], "values": ["wgrad"], "bias": []}[wanted]
    assert [tensor.grad is not None for tensor in tensors.values()] == [name == wanted for name in tensors]


def test_an_expanded_gradient_is_handled():
    case = Case()
    x = case.x(5)
    case(x).sum().backward()  # sum() hands back a tensor of stride 0
    torch.testing.assert_close(x.grad, torch.ones(5, 16, dtype=torch.float64) @ case.twice_pruned)


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
    assert ops.why_not(name, ops.Place("cpu")) is None
    assert ops.get_backend(name).name == name == "reference"


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(backends, "_REGISTRY", dict(backends._REGISTRY))
    monkeypatch.setattr(backends, "_RESOLVED", {})


def test_auto_prefers_the_backend_registered_last_and_skips_what_cannot_run(registry):
    def why_not(place):
        if place.device_type != "cpu":
            return "CPU only"
        return "no float64" if place.dtype == torch.float64 else None

    ops.register_backend(replace(ops.get_backend("reference"), name="fast", why_not=why_not))
    assert ops.resolve_backend("auto", "cpu") == "fast"
    assert ops.resolve_backend("auto", "cpu", torch.float64) == "reference"
    assert ops.resolve_backend("auto", "meta") == "reference"
    with pytest.raises(BackendUnavailableError, match="backend='fast' cannot run on 'meta': CPU only"):
        ops.resolve_backend("fast", "meta")
    assert "fast: no float64" in ops.reasons_against(ops.Place("cpu", torch.float64))
    assert ops.reasons_against(ops.Place("cpu")) == ""


def test_the_compiled_backend_says_what_it_does_not_take():
    assert ops.why_not("cusparselt", ops.Place("cpu")) == "it runs on CUDA GPUs only"
    with pytest.raises(BackendUnavailableError, match="backend='cusparselt' cannot run on 'cpu'"):
        ops.resolve_backend("cusparselt", "cpu")
