"""An oracle of 2:4 sparsity that shares no code with slope_pl: Python loops over groups, and dense masked products."""

import itertools
import math

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def bits(tensor: Tensor) -> Tensor:
    """The bytes as integers: tells -0.0 from +0.0 and compares NaN."""
    return tensor.detach().contiguous().view(_BITS[tensor.dtype])


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nibble_pairs(indices: Tensor) -> list[list[tuple[int, int]]]:
    """Two positions a group, row by row, read from the bytes with Python integers."""
    return [
        [((byte >> shift) & 3, (byte >> shift + 2) & 3) for byte in row for shift in (0, 4)] for row in indices.tolist()
    ]


def mask_of(indices: Tensor) -> Tensor:
    mask = torch.zeros(indices.shape[0], indices.shape[1] * 8, dtype=torch.bool)
    for row, pairs in enumerate(nibble_pairs(indices)):
        for group, pair in enumerate(pairs):
            for position in pair:
                mask[row, 4 * group + position] = True
    return mask


def spread(values: Tensor, indices: Tensor) -> Tensor:
    """The dense matrix of kept values, zeros in place."""
    dense = torch.zeros(values.shape[0], values.shape[1] * 2, dtype=values.dtype)
    for row, pairs in enumerate(nibble_pairs(indices)):
        for slot, (group, position) in enumerate((g, p) for g, pair in enumerate(pairs) for p in pair):
            dense[row, 4 * group + position] = values[row, slot]
    return dense


def two_best(keys: list[float]) -> set[int]:
    """Positions of the two largest of four; the lower position wins a tie, NaN is largest."""
    ranked = sorted(range(4), key=lambda i: (-(math.inf if math.isnan(keys[i]) else keys[i]), i))
    return set(ranked[:2])


def backward_mask_of(dense: Tensor, mask: Tensor) -> Tensor:
    """Double pruning by sorting each group of four rows; pruned entries never enter."""
    result = torch.zeros_like(mask)
    for start, column in itertools.product(range(0, dense.shape[0], 4), range(dense.shape[1])):
        live = mask[start : start + 4, column].tolist()
        size = dense[start : start + 4, column].abs().tolist()
        for row in two_best([s if alive else -1.0 for s, alive in zip(size, live, strict=True)]):
            result[start + row, column] = live[row]
    return result


def within_twice_dense(got: Tensor, dense: Tensor, exact: Tensor) -> None:
    """The project's tolerance: error against float64 at most twice that of the dense operation of the same dtype.

    The floor is one rounding of the largest result: without it a dense result that happens to be exact would ask for
    an exact one.
    """
    assert got.dtype == dense.dtype
    error, allowed = ((t.double() - exact).abs().max().item() for t in (got, dense))
    floor = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= 2 * allowed + floor, f"error {error:.3g}, dense {allowed:.3g}, floor {floor:.3g}"
