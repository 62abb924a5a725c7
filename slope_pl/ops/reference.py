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
from slope_pl.sparsity import backward_values, compress, decompress

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


def make_forward_operand(values: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the kept values in the compute dtype."""
    del indices
    return values.to(dtype, copy=True)


def make_backward_operand(values: Tensor, indices: Tensor, backward_indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The slots of the double-pruned transpose in the compute dtype."""
    return backward_values(values.to(dtype), indices, backward_indices)


register_backend(
    Backend(
        name="reference",
        why_not=lambda device_type: None,
        forward=forward,
        dgrad=dgrad,
        wgrad=wgrad,
        make_forward_operand=make_forward_operand,
        make_backward_operand=make_backward_operand,
        forward_operand_is_values=True,
    )
)
