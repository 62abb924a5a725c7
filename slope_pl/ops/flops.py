"""FLOP formulas of the sparse products, for ``torch.utils.flop_counter`` and Lightning's throughput monitor.

Counted is what must be multiplied: half of the dense product where the weight is 2:4 (the double-pruned one too, whose
filler slots are multiplied like the others), the whole of it for the weight gradient, which is a dense product.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from slope_pl.ops import library as _library  # defines the operations
from slope_pl.ops import mlp as _mlp

del _library, _mlp

Shape = tuple[int, ...]


def _rows(shape: Shape) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


@register_flop_formula(torch.ops.slope.sparse_linear)
def sparse_linear_flops(x_shape: Shape, values_shape: Shape, *_: Any, **__: Any) -> int:
    """A multiplication and an addition for each row and kept value."""
    return 2 * _rows(x_shape) * values_shape[0] * values_shape[1]


@register_flop_formula(torch.ops.slope.dgrad)
def dgrad_flops(dy_shape: Shape, values_shape: Shape, *_: Any, **__: Any) -> int:
    """Likewise for each row and slot of the transpose, as many as kept values."""
    return 2 * _rows(dy_shape) * values_shape[0] * values_shape[1]


@register_flop_formula(torch.ops.slope.wgrad)
def wgrad_flops(dy_shape: Shape, x_shape: Shape, *_: Any, **__: Any) -> int:
    """A dense ``dy^T x``."""
    return 2 * _rows(dy_shape) * dy_shape[-1] * x_shape[-1]


@register_flop_formula(torch.ops.slope.sparse_mlp)
def sparse_mlp_flops(x_shape: Shape, *rest: Any, **_: Any) -> int:
    """Two sparse products; the activation between them is not counted, as nowhere else."""
    (up_rows, up_kept), (down_rows, down_kept) = rest[0], rest[4]
    return 2 * _rows(x_shape) * (up_rows * up_kept + down_rows * down_kept)


@register_flop_formula(torch.ops.slope.dgrad_gelu)
def dgrad_gelu_flops(dy_shape: Shape, values_shape: Shape, *_: Any, **__: Any) -> int:
    """As without the gradient of the activation."""
    return dgrad_flops(dy_shape, values_shape)
