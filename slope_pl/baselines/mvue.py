"""Unbiased 2:4 pruning of the output gradient (Chmiel et al., arXiv 2203.10991, section 3; used by FST, arXiv 2404.01847).

Of every four entries two are drawn without replacement, each draw with chances proportional to the magnitudes, and divided
by the chance of being among the two: the expectation is the entry itself. Zeros keep the place of the others, the product is
a dense one.
"""

import torch
from torch import Tensor

# Entries that are zero next to larger ones must still be drawable, so that two are drawn of any four.
_EPSILON = 2.0**-23


def mvue_two_of_four(gradient: Tensor, seed: Tensor, stream: int = 0) -> Tensor:
    """Prune to two of every four *rows*, at random, with the input as expectation.

    Rows are tokens: the weight gradient ``dY^T X`` adds them up, so the sparse operand needs its groups along them. Where N
    is no multiple of four, the last group is filled up with zeros.

    Args:
        gradient: dY ``(N, d)``, floating.
        seed: int64 scalar, 0 to 2^32 - 1, on the same device: the same seed draws the same entries, on any device.
        stream: told apart from others under the same seed (ranks), 0 to 2^32 - 1.

    Returns:
        ``(N, d)`` of the same dtype; at most two nonzero entries in each group of four rows.
    """
    rows, width = gradient.shape
    groups = -(-rows // 4)
    x = torch.nn.functional.pad(gradient, (0, 0, 0, 4 * groups - rows)).view(groups, 4, width)
    # Low precision would make chances that do not add up.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Only ratios matter: scaled by the largest, so that _EPSILON is small for gradients of any size.
    largest = x.abs().amax(1, keepdim=True)
    magnitude = x.abs() / torch.where(largest > 0, largest, 1.0) + _EPSILON
    first, second = (u.to(x.dtype) for u in _uniform(groups * width, seed, stream))
    kept = _draw_two(magnitude, first.view(groups, width), second.view(groups, width))
    pruned = torch.where(kept, x / inclusion_chance(magnitude), 0.0)
    return pruned.view(4 * groups, width)[:rows].to(gradient.dtype)


def inclusion_chance(magnitude: Tensor) -> Tensor:
    """The chance of each of four entries to be among two that are drawn without replacement.

    Args:
        magnitude: positive ``(groups, 4, d)``; the four lie along the second dimension.

    Returns:
        the same shape; the four add up to 2.
    """
    a = magnitude.unbind(1)
    total = a[0] + a[1] + a[2] + a[3]
    # Sums of the other three, not total minus one: the difference is rounding where one entry is all there is.
    others = (a[1] + a[2] + a[3], a[0] + a[2] + a[3], a[0] + a[1] + a[3], a[0] + a[1] + a[2])
    # Chance of j first, then of i among the rest: (a_j / total) (a_i / others_j).
    odds = [mine / rest for mine, rest in zip(a, others, strict=True)]
    chances = [mine * (1.0 + sum(odds[j] for j in range(4) if j != i)) / total for i, mine in enumerate(a)]
    return torch.stack(chances, 1)


def _draw_two(magnitude: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Bool ``(groups, 4, d)``: the two entries that uniform numbers ``(groups, d)`` choose."""
    place = torch.arange(4, device=magnitude.device).view(1, 4, 1)
    one = _pick(magnitude, first) == place
    two = _pick(torch.where(one, 0.0, magnitude), second) == place
    return one | two


def _pick(magnitude: Tensor, uniform: Tensor) -> Tensor:
    """Index ``(groups, 1, d)`` by inversion of the cumulated magnitudes."""
    cumulated = magnitude.cumsum(1)
    return (uniform.unsqueeze(1) * cumulated[:, 3:] >= cumulated).sum(1, keepdim=True)


def _uniform(count: int, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Two float32 vectors in [0, 1), a function of position, seed and stream alone.

    Not torch's generator: its draws differ between devices and between eager and compiled code, break the graph when the
    generator is not the global one, and move dropout's numbers when it is. 23 bits, so that no product with a sum reaches
    the sum.
    """
    position = _mix(torch.arange(count, device=seed.device))
    key = _mix(seed ^ stream)
    return tuple((_mix(position ^ _mix(key + draw)) >> 9) * 2.0**-23 for draw in (1, 2))  # type: ignore[return-value]


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64, where no product of it overflows."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x
