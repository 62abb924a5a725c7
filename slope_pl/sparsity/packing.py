"""The stored form of a 2:4 matrix: kept values and two-bit positions.

For a matrix ``(rows, columns)`` with groups of four along the columns:

* ``values`` ``(rows, columns / 2)``: the two kept entries of each group, in column order;
* ``indices`` ``(rows, columns / 8)`` uint8: a nibble a group, ``first | second << 2`` with ``first < second`` the positions
  of the two entries in their group; the even group of a pair in the low nibble, the odd one in the high nibble.

uint8 because every strategy moves it: int16 buffers fail under gloo, NCCL, ZeRO-3 and FSDP2.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from slope_pl.sparsity.masks import check_groups_of_four


def pack_indices(mask: Tensor) -> Tensor:
    """Pack a 2:4 mask into two-bit positions.

    Args:
        mask: bool ``(rows, columns)``, exactly two ``True`` in each group of four; ``columns`` a multiple of 8.

    Returns:
        uint8 ``(rows, columns / 8)``.

    Raises:
        ValueError: if ``columns`` is not a multiple of 8, or a group does not hold exactly two.
    """
    if mask.dtype is not torch.bool:
        raise ValueError(f"mask: dtype {mask.dtype}, expected torch.bool, True for kept entries")
    check_groups_of_four(mask, "mask")
    if mask.dim() != 2:
        raise ValueError(f"mask: shape {tuple(mask.shape)}, a matrix (rows, columns) is expected")
    if mask.shape[-1] % 8:
        raise ValueError(
            f"mask: {mask.shape[-1]} columns are not a multiple of 8; one byte of indices covers two groups"
        )
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    pattern = (mask.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.int32)
    packed = _tables(mask.device).packed[pattern]
    if bool((packed == _INVALID).any()):
        check_two_per_group(mask)
    return packed


def check_two_per_group(mask: Tensor) -> None:
    """Raise ``ValueError`` that names the first group of four which does not hold exactly two ``True``."""
    kept = mask.unflatten(-1, (-1, 4)).sum(-1)
    if bool((kept == 2).all()):
        return
    row, group = (kept != 2).nonzero()[0].tolist()
    raise ValueError(
        f"mask: row {row}, columns {4 * group} to {4 * group + 3} keep {int(kept[row, group])} of four; 2:4 needs exactly 2"
    )


def positions(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the first and second kept entry of each group.

    Args:
        indices: uint8 ``(rows, columns / 8)``.

    Returns:
        two uint8 tensors ``(rows, columns / 4)`` with entries 0 to 3, the first always below the second.
    """
    nibbles = torch.stack((indices & 15, indices >> 4), dim=-1).flatten(-2)
    return nibbles & 3, nibbles >> 2


def unpack_mask(indices: Tensor) -> Tensor:
    """The mask that :func:`pack_indices` packed: bool ``(rows, columns)`` of uint8 ``(rows, columns / 8)``."""
    # Eight bools are one int64 of the table, so that a byte costs one look-up and not eight.
    return _tables(indices.device).mask[indices.int()].view(torch.bool)


def check_indices(indices: Tensor, name: str) -> None:
    """Raise ``ValueError`` where a nibble does not name two positions in rising order (a damaged or foreign buffer)."""
    if indices.dtype != torch.uint8:
        raise ValueError(f"{name}: dtype {indices.dtype}, expected torch.uint8 (two groups of 2:4 positions a byte)")
    first, second = positions(indices)
    bad = first >= second
    if bool(bad.any()):
        row, group = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: row {row}, group {group} names positions {int(first[row, group])} and {int(second[row, group])}; "
            "two different positions in rising order are expected: the buffer is damaged or not from slope_pl"
        )


def compress(dense: Tensor, indices: Tensor) -> Tensor:
    """Gather the kept entries of a dense matrix.

    Args:
        dense: ``(rows, columns)``, any dtype.
        indices: uint8 ``(rows, columns / 8)``.

    Returns:
        ``(rows, columns / 2)`` of the dtype of ``dense``, contiguous.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    _check_pair(dense.shape, indices, 1, "dense")
    return dense.reshape(-1, 8).gather(1, _places(indices)).view(indices.shape[0], indices.shape[1] * 4)


def decompress(values: Tensor, indices: Tensor) -> Tensor:
    """Spread kept values into a dense matrix with zeros in place.

    Args:
        values: ``(rows, columns / 2)``, any dtype.
        indices: uint8 ``(rows, columns / 8)``.

    Returns:
        ``(rows, columns)`` of the dtype of ``values``, contiguous.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    _check_pair(values.shape, indices, 2, "values")
    dense = values.new_zeros(indices.numel(), 8)
    return dense.scatter_(1, _places(indices), values.reshape(-1, 4)).view(indices.shape[0], indices.shape[1] * 8)


def _places(indices: Tensor) -> Tensor:
    """Where the four entries of each byte stand among its eight columns: int64 ``(rows * columns / 8, 4)``."""
    return _tables(indices.device).places[indices.reshape(-1).int()]


class _Tables(NamedTuple):
    """Look-up tables over all bytes; bytes that are no valid index give nonsense, which check_indices finds first.

    Attributes:
        places: int64 ``(256, 4)``, byte -> the places of its four entries among eight columns.
        mask: int64 ``(256,)``, byte -> eight bools.
        packed: uint8 ``(256,)``, eight bools as bits, lowest first -> byte, or _INVALID.
    """

    places: Tensor
    mask: Tensor
    packed: Tensor


_INVALID = 0  # as an index it would name position 0 twice, which no packed mask does


@cache
def _tables(device: torch.device) -> _Tables:
    byte = torch.arange(256, device=device)
    nibbles = torch.stack((byte & 15, byte >> 4), dim=1)
    places = torch.stack((nibbles & 3, nibbles >> 2), dim=2) + torch.tensor([[0], [4]], device=device)
    places = places.flatten(1)
    mask = torch.zeros(256, 8, dtype=torch.bool, device=device).scatter_(1, places, True)
    valid = ((nibbles & 3) < (nibbles >> 2)).all(1)
    bits = (mask * 2 ** torch.arange(8, device=device)).sum(1)
    packed = torch.full((256,), _INVALID, dtype=torch.uint8, device=device)
    packed[bits[valid]] = byte[valid].to(torch.uint8)
    return _Tables(places, mask.view(torch.int64).view(-1), packed)


def _check_pair(shape: torch.Size, indices: Tensor, values_per_two: int, name: str) -> None:
    if indices.dtype is not torch.uint8 or indices.dim() != 2:
        raise ValueError(
            f"indices: {indices.dtype} of shape {tuple(indices.shape)}, expected torch.uint8 (rows, columns / 8)"
        )
    rows, columns = indices.shape[0], indices.shape[1] * 8 // values_per_two
    if tuple(shape) != (rows, columns):
        raise ValueError(
            f"{name} of shape {tuple(shape)} does not belong to indices of shape {tuple(indices.shape)}, "
            f"which cover {(rows, columns)}"
        )
