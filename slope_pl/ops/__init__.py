"""Sparse products as ``torch.ops.slope.*``.

Every operation has a plain-PyTorch implementation (:mod:`slope_pl.ops.reference`) that runs anywhere. A compiled backend is
a :class:`Backend` registered from a module of its own; the schemas, fakes and gradients in :mod:`slope_pl.ops.library` serve
all of them.
"""

from slope_pl.ops import reference as _reference  # registers the backend

# isort: split
from slope_pl.ops import cusparselt as _cusparselt  # the fastest comes last
from slope_pl.ops import flops as _flops
from slope_pl.ops.backends import (
    BACKEND_NAMES,
    Backend,
    BackendName,
    Place,
    fuses_gelu,
    get_backend,
    reasons_against,
    register_backend,
    resolve_backend,
    why_not,
)
from slope_pl.ops.freshness import invalidate_operands
from slope_pl.ops.library import choose_columns, is_watched, sparse_linear
from slope_pl.ops.mlp import Weight, sparse_mlp
from slope_pl.ops.operands import Operands, operands_of

del _reference, _cusparselt, _flops

__all__ = [
    "BACKEND_NAMES",
    "Backend",
    "BackendName",
    "Operands",
    "Place",
    "Weight",
    "choose_columns",
    "fuses_gelu",
    "get_backend",
    "invalidate_operands",
    "is_watched",
    "operands_of",
    "reasons_against",
    "register_backend",
    "resolve_backend",
    "sparse_linear",
    "sparse_mlp",
    "why_not",
]
