"""``torch.ops.slope.*``: one schema an operation, its fake, its autograd, and the dispatch to a backend.

``sparse_linear`` is differentiable in ``x``, ``values`` and ``bias``. The gradient of ``x`` goes through the double-pruned
weight, by definition of the method (paper, section 3.2): it equals the true derivative only where the mask is transposable.
The operations are not differentiable twice.

Every operation is a function of plain tensors; compressed operands are kept behind it (:mod:`slope_pl.ops.operands`), so a
compiled graph holds none of them and still refreshes them once an optimizer step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slope_pl.errors import InputError
from slope_pl.ops.backends import get_backend
from slope_pl.ops.operands import Operands, Pair, operands_of

_LIB = torch.library.Library("slope", "DEF")
_LIB.define(
    "sparse_linear(Tensor x, Tensor values, Tensor indices, Tensor backward_indices, Tensor? bias, bool needs_dx, "
    "str backend) -> Tensor"
)
_LIB.define("dgrad(Tensor dy, Tensor values, Tensor indices, Tensor backward_indices, str backend) -> Tensor")
_LIB.define("wgrad(Tensor dy, Tensor x, Tensor indices, ScalarType dtype, str backend) -> Tensor")
_LIB.define(
    "choose_columns(Tensor values, Tensor indices, Tensor backward_indices, str backend) -> (Tensor, Tensor churn)"
)


@torch.library.impl(_LIB, "sparse_linear", "CompositeExplicitAutograd")
def _sparse_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    backward_indices: Tensor,
    bias: Tensor | None,
    needs_dx: bool,
    backend: str,
) -> Tensor:
    pair = operands_of(indices).current(values, indices, backward_indices, bias, x.dtype, backend, needs_dx)
    return _multiply(x, pair, indices, bias, backend)


def _multiply(x: Tensor, pair: Pair, indices: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    assert pair.forward is not None
    if bias is not None and pair.bias is not None:
        bias = pair.bias
    return get_backend(backend).forward(x, pair.forward, indices, bias)


@torch.library.register_fake("slope::sparse_linear", lib=_LIB)
def _sparse_linear_fake(x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


@torch.library.impl(_LIB, "dgrad", "CompositeExplicitAutograd")
def _dgrad(dy: Tensor, values: Tensor, indices: Tensor, backward_indices: Tensor, backend: str) -> Tensor:
    pair = operands_of(indices).backward_of_now(values, indices, backward_indices, dy.dtype, backend)
    assert pair.backward is not None
    return get_backend(backend).dgrad(dy, pair.backward, backward_indices)


@torch.library.register_fake("slope::dgrad", lib=_LIB)
def _dgrad_fake(dy: Tensor, values: Tensor, indices: Tensor, backward_indices: Tensor, backend: str) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], backward_indices.shape[0]))


@torch.library.impl(_LIB, "wgrad", "CompositeExplicitAutograd")
def _wgrad(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return get_backend(backend).wgrad(dy, x, indices, dtype)


@torch.library.register_fake("slope::wgrad", lib=_LIB)
def _wgrad_fake(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return dy.new_empty((indices.shape[0], indices.shape[1] * 4), dtype=dtype)


@torch.library.impl(_LIB, "choose_columns", "CompositeExplicitAutograd")
def _choose_columns(values: Tensor, indices: Tensor, backward_indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return get_backend(backend).choose_columns(values, indices, backward_indices)


@torch.library.register_fake("slope::choose_columns", lib=_LIB)
def _choose_columns_fake(
    values: Tensor, indices: Tensor, backward_indices: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(backward_indices), values.new_empty((), dtype=torch.float32)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of ``dy`` ``(..., d_out)`` over its rows, in ``dtype``."""
    return dy.flatten(0, -2).sum(0).to(dtype) if dy.dim() > 1 else dy.to(dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, backward_indices, bias, _, backend = inputs
    ctx.save_for_backward(x if values.requires_grad else None, values, indices, backward_indices)
    ctx.backend = backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices, backward_indices = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.slope.dgrad(dy, values, indices, backward_indices, ctx.backend)
    if ctx.needs_input_grad[1]:
        dvalues = torch.ops.slope.wgrad(dy, x, indices, values.dtype, ctx.backend)
    if ctx.needs_input_grad[4]:
        dbias = bias_gradient(dy, ctx.bias_dtype)
    return dx, dvalues, None, None, dbias, None, None


def refuse_second_derivative(ctx: Any, *_: Tensor) -> None:
    """A formula for what has none."""
    raise RuntimeError("slope_pl: a sparse product cannot be differentiated twice (create_graph=True)")


torch.library.register_autograd("slope::sparse_linear", _backward, setup_context=_save, lib=_LIB)
for _name in ("dgrad", "wgrad"):
    # Without a formula autograd would go on with a warning and a wrong number.
    torch.library.register_autograd(f"slope::{_name}", refuse_second_derivative, lib=_LIB)


class _EagerSparseLinear(torch.autograd.Function):
    """``slope::sparse_linear`` without the dispatcher's Python layers, which cost more host time than the product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        backward_indices: Tensor,
        bias: Tensor | None,
        operands: Operands,
        needs_dx: bool,
        backend: str,
    ) -> Tensor:
        pair = operands.current(values, indices, backward_indices, bias, x.dtype, backend, needs_dx)
        ctx.save_for_backward(x if values.requires_grad else None, values, indices, backward_indices)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        ctx.backward_operand, ctx.operands = pair.backward if needs_dx else None, operands
        return _multiply(x, pair, indices, bias, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and dy.requires_grad:
            refuse_second_derivative(ctx)
        x, values, indices, backward_indices = ctx.saved_tensors
        backend = get_backend(ctx.backend)
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            operand = ctx.backward_operand
            if operand is None:  # transient
                pair = ctx.operands.backward_of_now(values, indices, backward_indices, dy.dtype, ctx.backend)
                operand = pair.backward
            dx = backend.dgrad(dy, operand, backward_indices)
        if ctx.needs_input_grad[1]:
            dvalues = backend.wgrad(dy, x, indices, values.dtype)
        if ctx.needs_input_grad[4]:
            dbias = bias_gradient(dy, ctx.bias_dtype)
        return dx, dvalues, None, None, dbias, None, None, None


# Function.apply without its Python half, which serves torch.func transforms: those take the operation (is_watched).
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _EagerSparseLinear).apply


def sparse_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    backward_indices: Tensor,
    bias: Tensor | None,
    backend: str,
    operands: Operands | None = None,
) -> Tensor:
    """``y = x W^T + b`` with a 2:4 W; the backward pass gives ``dx = dy W_RC`` and the gradient of the kept values.

    Args:
        x: ``(..., d_in)``, floating; any leading shape, none and zero rows included.
        values: ``(d_out, d_in / 2)``, the trainable kept values.
        indices: uint8 ``(d_out, d_in / 8)``.
        backward_indices: uint8 ``(d_in, d_out / 8)``.
        bias: ``(d_out,)`` or None.
        backend: a resolved name, never ``"auto"``.
        operands: the layer's own, which spares looking them up; found by ``indices`` without.

    Returns:
        ``(..., d_out)`` of the dtype of ``x``.

    Raises:
        InputError: without ``operands``, if shapes or dtypes do not belong together.
    """
    if operands is None:  # a layer has checked its input and is right by construction
        _check_arguments(x, values, indices, backward_indices, bias)
    grad = torch.is_grad_enabled()
    needs_dx = grad and x.requires_grad
    if torch.compiler.is_compiling() or operands is None or is_watched():
        return torch.ops.slope.sparse_linear(x, values, indices, backward_indices, bias, needs_dx, backend)
    if grad:
        return _apply(x, values, indices, backward_indices, bias, operands, needs_dx, backend)
    pair = operands.current(values, indices, backward_indices, bias, x.dtype, backend, False)
    return _multiply(x, pair, indices, bias, backend)


def _check_arguments(x: Tensor, values: Tensor, indices: Tensor, backward_indices: Tensor, bias: Tensor | None) -> None:
    if indices.dtype is not torch.uint8 or indices.dim() != 2:
        raise InputError(
            f"indices: {indices.dtype} of shape {tuple(indices.shape)}, expected torch.uint8 (d_out, d_in / 8)"
        )
    d_out, d_in = indices.shape[0], indices.shape[1] * 8
    for name, tensor, shape in (
        ("values", values, (d_out, d_in // 2)),
        ("backward_indices", backward_indices, (d_in, d_out // 8)),
        ("bias", bias, (d_out,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} of shape {tuple(tensor.shape)}: indices {tuple(indices.shape)} of a {d_out}x{d_in} weight ask for "
                f"{shape}"
            )
    if backward_indices.dtype is not torch.uint8:
        raise InputError(f"backward_indices: {backward_indices.dtype}, expected torch.uint8")
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise InputError(f"x of shape {tuple(x.shape)} does not end in d_in = {d_in}, the columns of W")
    for name, tensor in (("x", x), ("values", values)):
        if not tensor.is_floating_point():
            raise InputError(f"{name}: {tensor.dtype}, expected a floating-point dtype")


def is_watched() -> bool:
    """Whether a mode looks at operations (FLOP counters, fake tensors): it is shown ``slope::`` ones."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def choose_columns(values: Tensor, indices: Tensor, backward_indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The re-setup: columns of the double-pruned transpose by current magnitude.

    Args:
        values: ``(d_out, d_in / 2)``.
        indices: uint8 ``(d_out, d_in / 8)``.
        backward_indices: uint8 ``(d_in, d_out / 8)``, the choice so far.
        backend: a resolved name.

    Returns:
        the new choice, uint8 ``(d_in, d_out / 8)``, and the share of the old backward mask that it replaces.
    """
    return torch.ops.slope.choose_columns(values.detach(), indices, backward_indices, backend)
