"""The reference backend: plain PyTorch on any device, in any floating dtype. The CPU path and the oracle of every test.

Its operands are value tensors in the compute dtype: the forward one holds the kept values ``(d_out, d_in / 2)``, the
backward one the slots of the double-pruned transpose ``(d_in, d_out / 2)``. A dense matrix exists only inside a product.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_pl.ops.backends import Backend, register_backend
from slope_pl.ops.operands import Change, Pair
from slope_pl.sparsity import backward_mask, backward_values, choose_backward_indices, compress, decompress

P = ParamSpec("P")


def in_the_given_dtype(product: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Shut autocast out of a product: the layer has chosen the dtype, and the schema promises the input's."""

    @functools.wraps(product)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device_type = args[0].device.type  # type: ignore[attr-defined]
        if not torch.is_autocast_enabled(device_type):
            return product(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return product(*args, **kwargs)

    return wrapped


def refresh(
    pair: Pair, values: Tensor, indices: Tensor, backward_indices: Tensor, bias: Tensor | None, change: Change
) -> None:
    """Cast values forward, slots of the transpose backward."""
    del bias
    pair.forward_is_values = values.dtype == pair.dtype
    if not change.needs_backward:
        pair.backward = None
    pair.forward = None  # the old operands' memory is free before the new ones are made
    cast = values if pair.forward_is_values else values.to(pair.dtype)
    if change.needs_forward:
        pair.forward = cast
    if change.needs_backward:
        pair.backward = None
        pair.backward = backward_values(cast, indices, backward_indices)


@in_the_given_dtype
def forward(x: Tensor, forward_operand: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``: ``(..., d_in) -> (..., d_out)``."""
    return F.linear(x, decompress(forward_operand, indices), None if bias is None else bias.to(x.dtype))


@in_the_given_dtype
def dgrad(dy: Tensor, backward_operand: Tensor, backward_indices: Tensor) -> Tensor:
    """``dy W_RC``: ``(..., d_out) -> (..., d_in)``."""
    return F.linear(dy, decompress(backward_operand, backward_indices))


@in_the_given_dtype
def wgrad(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """``(dy^T x)`` at the kept entries: ``(d_out, d_in / 2)`` of ``dtype``."""
    dense = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return compress(dense, indices).to(dtype)


def forward_gelu(
    x: Tensor, forward_operand: Tensor, indices: Tensor, bias: Tensor | None, approximate: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The product, then GELU of what it was rounded to."""
    pre = forward(x, forward_operand, indices, bias)
    return F.gelu(pre, approximate=approximate), pre if keep else pre.new_empty(0)


def dgrad_gelu(dy: Tensor, backward_operand: Tensor, backward_indices: Tensor, pre: Tensor, approximate: str) -> Tensor:
    """The input gradient of the second product, then that of the GELU before it."""
    dx = dgrad(dy, backward_operand, backward_indices)
    return torch.ops.aten.gelu_backward(dx, pre, approximate=approximate)


def choose_columns(values: Tensor, indices: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The re-setup, and the share of the previous backward mask that it replaced."""
    before = backward_mask(indices, previous)
    chosen = choose_backward_indices(values, indices)
    replaced = backward_mask(indices, chosen) & ~before
    return chosen, replaced.sum(dtype=torch.float32) / before.sum()


register_backend(
    Backend(
        name="reference",
        why_not=lambda place: None,
        refresh=refresh,
        forward=forward,
        dgrad=dgrad,
        wgrad=wgrad,
        choose_columns=choose_columns,
        fuses_gelu=lambda place: False,
        forward_gelu=forward_gelu,
        dgrad_gelu=dgrad_gelu,
        own_values=lambda values, indices: None,
    )
)
