"""``torch.ops.slope.*``: one schema an operation, its fake, its autograd, and the dispatch to a backend.

``sparse_linear`` is differentiable in ``x``, ``values`` and ``bias``. The gradient of ``x`` goes through the double-pruned
weight, by definition of the method (paper, section 3.2): it equals the true derivative only where the mask is transposable.
The operations are not differentiable twice.
"""

from typing import Any

import torch
from torch import Tensor

from slope_pl.ops import reference as _reference  # noqa: F401 (registers the backend)
from slope_pl.ops.backends import get_backend
from slope_pl.sparsity import choose_backward_indices as _choose_backward_indices

_LIB = torch.library.Library("slope", "DEF")
_LIB.define(
    "sparse_linear(Tensor x, Tensor values, Tensor indices, Tensor? bias, Tensor forward_operand, "
    "Tensor? backward_operand, Tensor backward_indices, str backend) -> Tensor"
)
_LIB.define("dgrad(Tensor dy, Tensor backward_operand, Tensor backward_indices, str backend) -> Tensor")
_LIB.define("wgrad(Tensor dy, Tensor x, Tensor indices, ScalarType dtype, str backend) -> Tensor")
_LIB.define("forward_operand(Tensor values, Tensor indices, ScalarType dtype, str backend) -> Tensor")
_LIB.define(
    "backward_operand(Tensor values, Tensor indices, Tensor backward_indices, ScalarType dtype, str backend) -> Tensor"
)
_LIB.define("choose_backward_indices(Tensor values, Tensor indices) -> Tensor")


@torch.library.impl(_LIB, "sparse_linear", "CompositeExplicitAutograd")
def _sparse_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    forward_operand: Tensor,
    backward_operand: Tensor | None,
    backward_indices: Tensor,
    backend: str,
) -> Tensor:
    return get_backend(backend).forward(x, forward_operand, indices, bias)


@torch.library.register_fake("slope::sparse_linear", lib=_LIB)
def _sparse_linear_fake(x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


@torch.library.impl(_LIB, "dgrad", "CompositeExplicitAutograd")
def _dgrad(dy: Tensor, backward_operand: Tensor, backward_indices: Tensor, backend: str) -> Tensor:
    return get_backend(backend).dgrad(dy, backward_operand, backward_indices)


@torch.library.register_fake("slope::dgrad", lib=_LIB)
def _dgrad_fake(dy: Tensor, backward_operand: Tensor, backward_indices: Tensor, backend: str) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], backward_indices.shape[0]))


@torch.library.impl(_LIB, "wgrad", "CompositeExplicitAutograd")
def _wgrad(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return get_backend(backend).wgrad(dy, x, indices, dtype)


@torch.library.register_fake("slope::wgrad", lib=_LIB)
def _wgrad_fake(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return dy.new_empty((indices.shape[0], indices.shape[1] * 4), dtype=dtype)


@torch.library.impl(_LIB, "forward_operand", "CompositeExplicitAutograd")
def _forward_operand(values: Tensor, indices: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return get_backend(backend).make_forward_operand(values, indices, dtype)


@torch.library.register_fake("slope::forward_operand", lib=_LIB)
def _forward_operand_fake(values: Tensor, indices: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


@torch.library.impl(_LIB, "backward_operand", "CompositeExplicitAutograd")
def _backward_operand(
    values: Tensor, indices: Tensor, backward_indices: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return get_backend(backend).make_backward_operand(values, indices, backward_indices, dtype)


@torch.library.register_fake("slope::backward_operand", lib=_LIB)
def _backward_operand_fake(
    values: Tensor, indices: Tensor, backward_indices: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return values.new_empty((backward_indices.shape[0], backward_indices.shape[1] * 4), dtype=dtype)


@torch.library.impl(_LIB, "choose_backward_indices", "CompositeExplicitAutograd")
def _choose(values: Tensor, indices: Tensor) -> Tensor:
    return _choose_backward_indices(values, indices)


@torch.library.register_fake("slope::choose_backward_indices", lib=_LIB)
def _choose_fake(values: Tensor, indices: Tensor) -> Tensor:
    return indices.new_empty((values.shape[1] * 2, values.shape[0] // 8))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, bias, _, backward_operand, backward_indices, backend = inputs
    ctx.save_for_backward(x, indices, backward_operand, backward_indices)
    ctx.values_dtype, ctx.backend = values.dtype, backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, indices, backward_operand, backward_indices = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        if backward_operand is None:
            raise RuntimeError("slope::sparse_linear: x needs a gradient, but no backward_operand was given")
        dx = torch.ops.slope.dgrad(dy, backward_operand, backward_indices, ctx.backend)
    if ctx.needs_input_grad[1]:
        dvalues = torch.ops.slope.wgrad(dy, x, indices, ctx.values_dtype, ctx.backend)
    if ctx.needs_input_grad[3]:
        dbias = dy.flatten(0, -2).sum(0).to(ctx.bias_dtype) if dy.dim() > 1 else dy.to(ctx.bias_dtype)
    return dx, dvalues, None, dbias, None, None, None, None


def _refuse_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("slope::sparse_linear cannot be differentiated twice (create_graph=True)")


torch.library.register_autograd("slope::sparse_linear", _backward, setup_context=_save, lib=_LIB)
for _name in ("dgrad", "wgrad"):
    # Without a formula autograd would go on with a warning and a wrong number.
    torch.library.register_autograd(f"slope::{_name}", _refuse_second_derivative, lib=_LIB)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    forward_operand: Tensor,
    backward_operand: Tensor | None,
    backward_indices: Tensor,
    backend: str,
) -> Tensor:
    """``y = x W^T + b`` with a 2:4 W; the backward pass gives ``dx = dy W_RC`` and the gradient of the kept values.

    Args:
        x: ``(..., d_in)``, floating; any leading shape, none and zero rows included.
        values: ``(d_out, d_in / 2)``, the trainable kept values; the product reads ``forward_operand``, made from them.
        indices: uint8 ``(d_out, d_in / 8)``.
        bias: ``(d_out,)`` or None.
        forward_operand: from :func:`forward_operand`, in the dtype of ``x``.
        backward_operand: from :func:`backward_operand`; None where ``x`` needs no gradient.
        backward_indices: uint8 ``(d_in, d_out / 8)``.
        backend: a resolved name, never ``"auto"``.

    Returns:
        ``(..., d_out)`` of the dtype of ``x``.
    """
    return torch.ops.slope.sparse_linear(
        x, values, indices, bias, forward_operand, backward_operand, backward_indices, backend
    )


def forward_operand(values: Tensor, indices: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """What ``backend`` multiplies in the forward pass, made from current values; shape and layout are the backend's."""
    return torch.ops.slope.forward_operand(values.detach(), indices, dtype, backend)


def backward_operand(
    values: Tensor, indices: Tensor, backward_indices: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    """What ``backend`` multiplies in the input gradient: current values under the given choice of columns."""
    return torch.ops.slope.backward_operand(values.detach(), indices, backward_indices, dtype, backend)


def choose_backward_indices(values: Tensor, indices: Tensor) -> Tensor:
    """The re-setup: columns of the double-pruned transpose by current magnitude.

    Args:
        values: ``(d_out, d_in / 2)``.
        indices: uint8 ``(d_out, d_in / 8)``.

    Returns:
        uint8 ``(d_in, d_out / 8)``.
    """
    return torch.ops.slope.choose_backward_indices(values, indices)
