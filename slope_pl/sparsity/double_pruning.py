"""Double pruning: the transpose of a 2:4 weight, pruned a second time along the other dimension (paper, section 3.2).

The input gradient ``dX = dY W`` reduces over ``d_out``, so its sparse operand needs groups of four along ``d_out``, that is
along the rows of ``W^T`` ``(d_in, d_out)``. In each such group the two kept weights of largest magnitude stay; a group with
fewer than two kept weights is filled up with *filler slots*, which hold the value 0.
"""

from math import comb

import torch
from torch import Tensor

from slope_pl.sparsity.masks import keep_two_of_four
from slope_pl.sparsity.packing import compress, decompress, pack_indices, unpack_mask


def choose_backward_indices(values: Tensor, indices: Tensor) -> Tensor:
    """Choose the columns of the double-pruned transpose by current magnitude.

    A kept weight, even one that is exactly 0.0 by now, always goes before a pruned one; ties go to the lower index and NaN
    counts as largest, so that every rank chooses alike.

    Args:
        values: kept values of W, ``(d_out, d_in / 2)``, floating; ``d_out`` a multiple of 8.
        indices: of W, uint8 ``(d_out, d_in / 8)``.

    Returns:
        uint8 ``(d_in, d_out / 8)``: positions along ``d_out``, exactly two slots a group.

    Raises:
        ValueError: if ``d_out`` is not a multiple of 8 or the shapes do not belong together.
    """
    magnitude = torch.where(torch.isnan(values), torch.inf, values.detach().abs())
    # Shifting the kept magnitudes by a sentinel would round small ones together; a pruned entry gets key -1 instead.
    key = torch.where(unpack_mask(indices), decompress(magnitude, indices), -1.0)
    return pack_indices(keep_two_of_four(key.t()))


def backward_mask(indices: Tensor, backward_indices: Tensor) -> Tensor:
    """Entries of W that the backward product multiplies with: chosen slots that the forward mask keeps.

    Args:
        indices: of W, uint8 ``(d_out, d_in / 8)``.
        backward_indices: of the transpose, uint8 ``(d_in, d_out / 8)``.

    Returns:
        bool ``(d_out, d_in)``, a subset of the forward mask; at most two ``True`` in each group of four rows.
    """
    return unpack_mask(backward_indices).t() & unpack_mask(indices)


def backward_values(values: Tensor, indices: Tensor, backward_indices: Tensor) -> Tensor:
    """Values of the double-pruned transpose under a given choice of columns.

    Args:
        values: kept values of W, ``(d_out, d_in / 2)``.
        indices: of W, uint8 ``(d_out, d_in / 8)``.
        backward_indices: uint8 ``(d_in, d_out / 8)``.

    Returns:
        ``(d_in, d_out / 2)`` of the dtype of ``values``: bit-equal copies of the kept values, +0.0 in filler slots.
    """
    return compress(decompress(values, indices).t(), backward_indices)


def expected_extra_zeros(n: int, m: int) -> float:
    """Density that the second pruning costs a random n:m matrix (paper, lemma on double pruning).

    Args:
        n: kept entries in a group.
        m: size of a group.

    Returns:
        the expected fraction of *all* entries that the forward mask keeps and the backward mask drops:
        0.09375 for 2:4, which leaves a density of 0.40625.
    """
    s = n / m
    return sum(comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))
