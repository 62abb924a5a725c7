"""The reference backend: plain PyTorch on any device, in any floating dtype. The CPU path and the oracle of every test.

Its operands are value tensors in the compute dtype: the forward one holds the kept values ``(d_out, d_in / 2)``, the
backward one the slots of the double-pruned transpose ``(d_in, d_out / 2)``. A dense matrix exists only inside a product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_pl.ops.backends import Backend, register_backend
from slope_pl.sparsity import backward_values, compress, decompress


def forward(x: Tensor, forward_operand: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``: ``(..., d_in) -> (..., d_out)``."""
    return F.linear(x, decompress(forward_operand, indices), None if bias is None else bias.to(x.dtype))


def dgrad(dy: Tensor, backward_operand: Tensor, backward_indices: Tensor) -> Tensor:
    """``dy W_RC``: ``(..., d_out) -> (..., d_in)``."""
    return F.linear(dy, decompress(backward_operand, backward_indices))


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
