"""Tensor mathematics of 2:4 sparsity: masks, packing, double pruning. No modules, no Lightning."""

from slope_pl.sparsity.double_pruning import (
    backward_mask,
    backward_values,
    choose_backward_indices,
    expected_extra_zeros,
)
from slope_pl.sparsity.masks import (
    MASK_KINDS,
    MaskKind,
    keep_two_of_four,
    magnitude_mask,
    make_mask,
    random_mask,
    transposable_mask,
    transposable_patterns,
)
from slope_pl.sparsity.packing import (
    check_indices,
    check_two_per_group,
    compress,
    decompress,
    pack_indices,
    positions,
    unpack_mask,
)

__all__ = [
    "MASK_KINDS",
    "MaskKind",
    "backward_mask",
    "backward_values",
    "check_indices",
    "check_two_per_group",
    "choose_backward_indices",
    "compress",
    "decompress",
    "expected_extra_zeros",
    "keep_two_of_four",
    "magnitude_mask",
    "make_mask",
    "pack_indices",
    "positions",
    "random_mask",
    "transposable_mask",
    "transposable_patterns",
    "unpack_mask",
]
