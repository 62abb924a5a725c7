"""Forward masks: which two of every four weights live, chosen once at initialisation (paper, section 3.1).

A mask has the shape of the weight, ``(d_out, d_in)``, and is ``True`` where the weight is *kept*. Groups of four run along
``d_in``, the reduction dimension of the forward product, as the sparse tensor cores require.

Of pretrained weights, the magnitude alone is not what a weight contributes: that is its magnitude times the size of what it
is multiplied with. A ``scale``, the norm of every input feature over some data, weighs magnitudes so (Wanda: Sun, Liu, Bair,
Kolter, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, section 3).
"""

import itertools
from typing import Literal, get_args

import torch
from torch import Tensor

MaskKind = Literal["magnitude", "random", "transposable"]
MASK_KINDS: tuple[str, ...] = get_args(MaskKind)

# Scoring a 4x4 tile against all 90 patterns takes 90 float64 per 16 weights: tiles are scored in slices of this many,
# which bounds the scratch memory at 47 MB whatever the layer.
_TILES_AT_ONCE = 1 << 16


def keep_two_of_four(key: Tensor) -> Tensor:
    """Mark the two largest keys of every four along the last dimension.

    Exactly two are marked whatever the keys are: ties go to the lower index, and NaN counts as the largest key, so that a
    weight that became NaN stays visible instead of being pruned away.

    Args:
        key: ``(..., d)`` of any floating dtype, ``d`` a multiple of 4.

    Returns:
        bool ``(..., d)``.

    Raises:
        ValueError: if ``d`` is not a multiple of 4.
    """
    check_groups_of_four(key, "key")
    k = torch.where(torch.isnan(key), torch.inf, key).unflatten(-1, (-1, 4)).unbind(-1)
    losses = [torch.zeros_like(k[0], dtype=torch.int8) for _ in range(4)]
    for i, j in itertools.combinations(range(4), 2):
        i_wins = k[i] >= k[j]
        losses[j] += i_wins
        losses[i] += ~i_wins
    return torch.stack([lost < 2 for lost in losses], dim=-1).flatten(-2)


def magnitude_mask(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Keep the two largest of every four by absolute value: the paper's choice; with a scale, Wanda's.

    Args:
        weight: ``(d_out, d_in)``, floating, ``d_in`` a multiple of 4.
        scale: ``(d_in,)``, how much a weight of each input feature counts; see :func:`make_mask`.

    Returns:
        bool ``(d_out, d_in)``, exactly two ``True`` in each group of four.
    """
    return keep_two_of_four(_importance(weight, scale))


def random_mask(shape: tuple[int, int] | torch.Size, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Keep two of every four uniformly at random: each of the six patterns with the same chance.

    Drawn on the CPU whatever the device, so that every rank and every machine gets the same mask from the same seed.

    Args:
        shape: ``(d_out, d_in)``, ``d_in`` a multiple of 4.
        seed: of a generator of its own; the global random state is neither read nor moved.
        device: where the result lies.

    Returns:
        bool ``(d_out, d_in)``, exactly two ``True`` in each group of four.
    """
    if len(shape) != 2:
        raise ValueError(f"random_mask: shape {tuple(shape)}, expected (d_out, d_in)")
    rows, columns = shape
    if columns % 4:
        raise ValueError(f"random_mask: d_in = {columns} is not a multiple of 4; 2:4 sparsity needs groups of four")
    # The device is named everywhere: Lightning builds models under a default device, the GPU.
    patterns = torch.zeros(6, 4, dtype=torch.bool, device="cpu")
    for row, pair in enumerate(itertools.combinations(range(4), 2)):
        patterns[row, list(pair)] = True
    generator = torch.Generator("cpu").manual_seed(seed)
    choice = torch.randint(6, (rows, columns // 4), generator=generator, device="cpu")
    return patterns[choice].flatten(1).to(device)


def transposable_patterns() -> Tensor:
    """All 4x4 binary matrices with exactly two ones in each row and each column.

    Returns:
        bool ``(90, 4, 4)``, in lexicographic order of the rows' patterns.
    """
    rows = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    tiles = [
        tile
        for tile in itertools.product(rows, repeat=4)
        if all(sum(column) == 2 for column in zip(*tile, strict=True))
    ]
    return torch.tensor(tiles, dtype=torch.bool, device="cpu")


def transposable_mask(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Keep, in every 4x4 tile, the pattern of largest summed magnitude that is 2:4 along rows *and* columns.

    The transpose of such a mask is itself a 2:4 mask: the backward mask equals the forward mask, the input gradient is
    exact, and re-choosing the backward columns changes nothing. The search is exact: every one of the 90 patterns is
    scored, in float64; ties go to the first in lexicographic order.

    Args:
        weight: ``(d_out, d_in)``, floating, both multiples of 4.
        scale: ``(d_in,)``, how much a weight of each input feature counts; see :func:`make_mask`.

    Returns:
        bool ``(d_out, d_in)``.

    Raises:
        ValueError: if a dimension is not a multiple of 4.
    """
    rows, columns = weight.shape
    if rows % 4 or columns % 4:
        raise ValueError(f"transposable_mask: shape {rows}x{columns} does not divide into 4x4 tiles")
    patterns = transposable_patterns().to(weight.device)
    scoring = patterns.flatten(1).to(torch.float64).t().contiguous()
    tiles = _importance(weight, scale).unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).reshape(-1, 16)
    best = torch.cat([(_finite_magnitude(part) @ scoring).argmax(1) for part in tiles.split(_TILES_AT_ONCE)])
    chosen = patterns[best].unflatten(0, (rows // 4, columns // 4))
    return chosen.transpose(1, 2).reshape(rows, columns)


def make_mask(kind: str, weight: Tensor, seed: int = 0, scale: Tensor | None = None) -> Tensor:
    """Choose the forward mask of a weight.

    Args:
        kind: one of :data:`MASK_KINDS`.
        weight: ``(d_out, d_in)``, floating.
        seed: used by ``"random"`` alone.
        scale: ``(d_in,)``, floating, on the weight's device: the Euclidean norm of every input feature over some data. Weights
            are then ranked by magnitude times scale (Wanda's score) instead of magnitude. Only its ratios matter.

    Returns:
        bool ``(d_out, d_in)``, exactly two ``True`` in each group of four along ``d_in``.

    Raises:
        ValueError: for an unknown kind, a shape that does not divide into groups, a scale that has another shape, is not
            finite, negative or zero everywhere, or one beside ``"random"``, which looks at no weight.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: {weight.dtype} of shape {tuple(weight.shape)}, expected a floating matrix (d_out, d_in)"
        )
    if kind == "magnitude":
        return magnitude_mask(weight, scale)
    if kind == "random":
        if scale is not None:
            raise ValueError("mask kind 'random' looks at no weight: a scale has no effect; leave it out")
        return random_mask(weight.shape, seed, weight.device)
    if kind == "transposable":
        return transposable_mask(weight, scale)
    raise ValueError(f"mask kind {kind!r} is unknown; choose one of {', '.join(MASK_KINDS)}")


def check_groups_of_four(tensor: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless the last dimension divides into groups of four."""
    if tensor.dim() == 0 or tensor.shape[-1] % 4:
        raise ValueError(f"{name}: last dimension of shape {tuple(tensor.shape)} is not a multiple of 4")


def _importance(weight: Tensor, scale: Tensor | None) -> Tensor:
    """What weights are ranked by: magnitudes, or Wanda's ``|W| * scale``, in float32 at least."""
    magnitude = weight.detach().abs()
    if scale is None:
        return magnitude
    if scale.shape != weight.shape[-1:] or not scale.is_floating_point():
        raise ValueError(
            f"scale: {scale.dtype} of shape {tuple(scale.shape)}, expected a floating tensor of shape "
            f"{tuple(weight.shape[-1:])}, one number an input feature of the weight {tuple(weight.shape)}"
        )
    largest = scale.detach().amax()
    if not bool(torch.isfinite(scale).all() & (scale >= 0).all() & (largest > 0)):
        raise ValueError("scale: norms of input features are finite, at least 0 and not all 0; these are not")
    # At most 1, so that no product of large weights and large activations overflows.
    scale = (scale.detach() / largest).to(torch.promote_types(weight.dtype, torch.float32))
    return magnitude.to(scale.dtype) * scale


def _finite_magnitude(part: Tensor) -> Tensor:
    """Magnitudes in float64, scaled to at most 1 a tile; infinities and NaN outweigh every finite sum."""
    magnitude = part.abs().to(torch.float64)
    finite = torch.where(torch.isfinite(magnitude), magnitude, 0.0)
    scale = finite.amax(1, keepdim=True)
    finite = finite / torch.where(scale > 0, scale, 1.0)
    return torch.where(torch.isfinite(magnitude), finite, 32.0)
