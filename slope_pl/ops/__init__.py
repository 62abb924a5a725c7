"""Sparse products as ``torch.ops.slope.*``.

Every operation has a plain-PyTorch implementation (:mod:`slope_pl.ops.reference`) that runs anywhere. A compiled backend is
a :class:`Backend` registered from a module of its own; the schemas, fakes and gradients in :mod:`slope_pl.ops.library` serve
all of them.
"""

from slope_pl.ops.backends import (
    BACKEND_NAMES,
    Backend,
    BackendName,
    get_backend,
    register_backend,
    resolve_backend,
    slow_backend_note,
    why_not,
)
from slope_pl.ops.library import backward_operand, choose_backward_indices, forward_operand, sparse_linear

__all__ = [
    "BACKEND_NAMES",
    "Backend",
    "BackendName",
    "backward_operand",
    "choose_backward_indices",
    "forward_operand",
    "get_backend",
    "register_backend",
    "resolve_backend",
    "slow_backend_note",
    "sparse_linear",
    "why_not",
]
