"""``torch.ops.slope.sparse_mlp``: ``down(gelu(up(x)))`` with both products 2:4 sparse, as one operation.

The activation and its gradient go into the epilogues of the two products around them, where a backend can do that: then
the intermediate, the widest tensor of a block, is neither read nor written for GELU alone. Numbers are those of the three
operations one after the other: GELU is taken of the rounded product, in the forward pass as in the backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slope_pl.ops.backends import get_backend
from slope_pl.ops.library import _LIB, bias_gradient, is_watched, refuse_second_derivative
from slope_pl.ops.operands import Operands, Pair, operands_of

_WEIGHT = "Tensor {0}_values, Tensor {0}_indices, Tensor {0}_columns, Tensor? {0}_bias"
_LIB.define(
    f"sparse_mlp(Tensor x, {_WEIGHT.format('up')}, {_WEIGHT.format('down')}, str approximate, bool keep, bool needs_dx, "
    "str backend) -> (Tensor y, Tensor hidden, Tensor pre)"
)
_LIB.define(
    "dgrad_gelu(Tensor dy, Tensor values, Tensor indices, Tensor backward_indices, Tensor pre, str approximate, "
    "str backend) -> Tensor"
)


class Weight(NamedTuple):
    """One of the two matrices.

    Attributes:
        values: ``(d_out, d_in / 2)``.
        indices: uint8 ``(d_out, d_in / 8)``.
        columns: uint8 ``(d_in, d_out / 8)``, the double-pruned transpose's choice.
        bias: ``(d_out,)`` or None.
    """

    values: Tensor
    indices: Tensor
    columns: Tensor
    bias: Tensor | None


def _pair(weight: Weight, operands: Operands, dtype: torch.dtype, backend: str, needs_dx: bool) -> Pair:
    return operands.current(weight.values, weight.indices, weight.columns, weight.bias, dtype, backend, needs_dx)


def _bias(weight: Weight, pair: Pair) -> Tensor | None:
    return pair.bias if weight.bias is not None and pair.bias is not None else weight.bias


def _forward(
    x: Tensor, up: Weight, down: Weight, pairs: tuple[Pair, Pair], approximate: str, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    assert pairs[0].forward is not None
    assert pairs[1].forward is not None
    by = get_backend(backend)
    hidden, pre = by.forward_gelu(x, pairs[0].forward, up.indices, _bias(up, pairs[0]), approximate, keep)
    y = by.forward(hidden, pairs[1].forward, down.indices, _bias(down, pairs[1]))
    return y, hidden if keep else hidden.new_empty(0), pre


@torch.library.impl(_LIB, "sparse_mlp", "CompositeExplicitAutograd")
def _sparse_mlp(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    up, down, (approximate, keep, needs_dx, backend) = Weight(*rest[:4]), Weight(*rest[4:8]), rest[8:]
    pairs = (
        _pair(up, operands_of(up.indices), x.dtype, backend, needs_dx),
        _pair(down, operands_of(down.indices), x.dtype, backend, keep),
    )
    return _forward(x, up, down, pairs, approximate, keep, backend)


@torch.library.register_fake("slope::sparse_mlp", lib=_LIB)
def _sparse_mlp_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = (*x.shape[:-1], rest[0].shape[0]) if rest[9] else (0,)
    return x.new_empty((*x.shape[:-1], rest[4].shape[0])), x.new_empty(wide), x.new_empty(wide)


@torch.library.impl(_LIB, "dgrad_gelu", "CompositeExplicitAutograd")
def _dgrad_gelu(
    dy: Tensor, values: Tensor, indices: Tensor, columns: Tensor, pre: Tensor, approximate: str, backend: str
) -> Tensor:
    pair = operands_of(indices).backward_of_now(values, indices, columns, dy.dtype, backend)
    assert pair.backward is not None
    return get_backend(backend).dgrad_gelu(dy, pair.backward, columns, pre, approximate)


@torch.library.register_fake("slope::dgrad_gelu", lib=_LIB)
def _dgrad_gelu_fake(dy: Tensor, values: Tensor, indices: Tensor, columns: Tensor, pre: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(pre)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *rest = inputs
    up, down = Weight(*rest[:4]), Weight(*rest[4:8])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if up.values.requires_grad else None, output[1], output[2], *up[:3], *down[:3])
    ctx.approximate, ctx.backend = rest[8], rest[11]
    ctx.bias_dtypes = [None if weight.bias is None else weight.bias.dtype for weight in (up, down)]


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """In the order of the schema's arguments; the other two results are for this function alone and have no gradient."""
    gradients: list[Tensor | None] = [None] * 13
    if dy is None:
        return tuple(gradients)
    x, hidden, pre, up_values, up_indices, up_columns, *down = ctx.saved_tensors
    slope, needed, backend = torch.ops.slope, ctx.needs_input_grad, ctx.backend
    if any(needed[:5]):
        dpre = slope.dgrad_gelu(dy, *down, pre, ctx.approximate, backend)
        if needed[0]:
            gradients[0] = slope.dgrad(dpre, up_values, up_indices, up_columns, backend)
        if needed[1]:
            gradients[1] = slope.wgrad(dpre, x, up_indices, up_values.dtype, backend)
        if needed[4]:
            gradients[4] = bias_gradient(dpre, ctx.bias_dtypes[0])
    if needed[5]:
        gradients[5] = slope.wgrad(dy, hidden, down[1], down[0].dtype, backend)
    if needed[8]:
        gradients[8] = bias_gradient(dy, ctx.bias_dtypes[1])
    return tuple(gradients)


torch.library.register_autograd("slope::sparse_mlp", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("slope::dgrad_gelu", refuse_second_derivative, lib=_LIB)


class _EagerSparseMLP(torch.autograd.Function):
    """``slope::sparse_mlp`` without the dispatcher's Python layers, like ``_EagerSparseLinear``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        up, down = Weight(*rest[:4]), Weight(*rest[4:8])
        operands_up, operands_down, approximate, needs_dx, backend = rest[8:]
        pairs = (
            _pair(up, operands_up, x.dtype, backend, needs_dx),
            _pair(down, operands_down, x.dtype, backend, True),
        )
        y, hidden, pre = _forward(x, up, down, pairs, approximate, True, backend)
        ctx.save_for_backward(x if up.values.requires_grad else None, hidden, pre, *up[:3], *down[:3])
        ctx.backward_operands = pairs[0].backward if needs_dx else None, pairs[1].backward
        ctx.operands = operands_up, operands_down
        ctx.approximate, ctx.backend = approximate, backend
        ctx.bias_dtypes = [None if weight.bias is None else weight.bias.dtype for weight in (up, down)]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and dy.requires_grad:
            refuse_second_derivative(ctx)
        x, hidden, pre, up_values, up_indices, up_columns, down_values, down_indices, down_columns = ctx.saved_tensors
        by, needed = get_backend(ctx.backend), ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * 14
        if any(needed[:5]):
            operand = _backward_operand(ctx, 1, down_values, down_indices, down_columns, dy.dtype)
            dpre = by.dgrad_gelu(dy, operand, down_columns, pre, ctx.approximate)
            if needed[0]:
                operand = _backward_operand(ctx, 0, up_values, up_indices, up_columns, dy.dtype)
                gradients[0] = by.dgrad(dpre, operand, up_columns)
            if needed[1]:
                gradients[1] = by.wgrad(dpre, x, up_indices, up_values.dtype)
            if needed[4]:
                gradients[4] = bias_gradient(dpre, ctx.bias_dtypes[0])
        if needed[5]:
            gradients[5] = by.wgrad(dy, hidden, down_indices, down_values.dtype)
        if needed[8]:
            gradients[8] = bias_gradient(dy, ctx.bias_dtypes[1])
        return tuple(gradients)


def _backward_operand(
    ctx: Any, which: int, values: Tensor, indices: Tensor, columns: Tensor, dtype: torch.dtype
) -> Tensor:
    operand = ctx.backward_operands[which]
    if operand is None:  # transient
        operand = ctx.operands[which].backward_of_now(values, indices, columns, dtype, ctx.backend).backward
    return operand


_apply: Callable[..., Tensor] = super(torch.autograd.Function, _EagerSparseMLP).apply


def sparse_mlp(
    x: Tensor,
    up: Weight,
    down: Weight,
    approximate: str,
    backend: str,
    operands: tuple[Operands, Operands] | None = None,
) -> Tensor:
    """``y = gelu(x W_1^T + b_1) W_2^T + b_2`` with 2:4 weights; gradients as those of :func:`sparse_linear`.

    Args:
        x: ``(..., d_in)``, floating.
        up: W_1 ``(d_hidden, d_in)`` and its bias.
        down: W_2 ``(d_out, d_hidden)`` and its bias.
        approximate: ``"none"`` or ``"tanh"``, as of ``torch.nn.functional.gelu``.
        backend: a resolved name, never ``"auto"``.
        operands: the layers' own, which spares looking them up.

    Returns:
        ``(..., d_out)`` of the dtype of ``x``.

    Both ``gelu(...)`` and what it was taken of, ``(..., d_hidden)`` each, are kept for the backward pass.
    """
    needs_dx = x.requires_grad
    trains = needs_dx or any(t is not None and t.requires_grad for t in (up.values, up.bias, down.values, down.bias))
    keep = torch.is_grad_enabled() and trains
    needs_dx = keep and needs_dx
    if torch.compiler.is_compiling() or operands is None or is_watched():
        return torch.ops.slope.sparse_mlp(x, *up, *down, approximate, keep, needs_dx, backend)[0]
    if keep:
        return _apply(x, *up, *down, *operands, approximate, needs_dx, backend)
    pairs = _pair(up, operands[0], x.dtype, backend, False), _pair(down, operands[1], x.dtype, backend, False)
    return _forward(x, up, down, pairs, approximate, False, backend)[0]
