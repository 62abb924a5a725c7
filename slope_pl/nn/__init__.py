"""The sparse layer and the surgery that puts it into a model."""

from slope_pl.nn.calibration import activation_norms
from slope_pl.nn.eligibility import why_ineligible
from slope_pl.nn.hooks import is_hooked
from slope_pl.nn.mlp import can_fuse, sparse_mlp
from slope_pl.nn.report import SparsityReport, backend_lines, sparsity_report
from slope_pl.nn.selection import choose_layers, is_head, is_linear
from slope_pl.nn.sharding import built_whole, full_shape, gathered
from slope_pl.nn.sparse_linear import SparseLinear
from slope_pl.nn.surgery import (
    check_drawn,
    dense_state_dict,
    densify,
    layer_seed,
    sparse_layers,
    sparsify,
    wake_adapters,
    was_densified,
)
from slope_pl.ops import invalidate_operands

__all__ = [
    "SparseLinear",
    "SparsityReport",
    "activation_norms",
    "backend_lines",
    "built_whole",
    "can_fuse",
    "check_drawn",
    "choose_layers",
    "dense_state_dict",
    "densify",
    "full_shape",
    "gathered",
    "invalidate_operands",
    "is_head",
    "is_hooked",
    "is_linear",
    "layer_seed",
    "sparse_layers",
    "sparse_mlp",
    "sparsify",
    "sparsity_report",
    "wake_adapters",
    "was_densified",
    "why_ineligible",
]
