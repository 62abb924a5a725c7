import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_pl.sparsity import (
    check_indices,
    compress,
    decompress,
    make_mask,
    pack_indices,
    positions,
    random_mask,
    unpack_mask,
)
from tests.unit.reference import FLOATS, bits, gaussian, mask_of, spread

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 5).map(lambda n: 8 * n))
NIBBLES = {(0, 1): 0x4, (0, 2): 0x8, (0, 3): 0xC, (1, 2): 0x9, (1, 3): 0xD, (2, 3): 0xE}
quick = settings(deadline=None, database=None, max_examples=40)


def mask_row(*pairs):
    return [column in pair for pair in pairs for column in range(4)]


def specials(shape, dtype):
    """Gaussian values with -0.0, NaN, infinities and the smallest subnormal strewn in."""
    values = gaussian(*shape, dtype=dtype)
    strewn = torch.tensor([-0.0, float("nan"), float("inf"), float("-inf"), torch.finfo(dtype).smallest_normal / 2])
    values.flatten()[::3] = strewn.to(dtype).repeat(values.numel())[: len(values.flatten()[::3])]
    return values


@pytest.mark.parametrize(("low", "high"), list(itertools.product(NIBBLES, repeat=2)))
def test_bytes_by_hand(low, high):
    mask = torch.tensor([mask_row(low, high)])
    packed = pack_indices(mask)
    assert packed.tolist() == [[NIBBLES[low] | NIBBLES[high] << 4]]
    assert packed.dtype == torch.uint8
    first, second = positions(packed)
    assert (first.tolist(), second.tolist()) == ([[low[0], high[0]]], [[low[1], high[1]]])


def test_values_by_hand():
    dense = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 4.0, 0.0, 0.0]])
    indices = torch.tensor([[0x4D]], dtype=torch.uint8)  # group 0 holds positions 1 and 3, group 1 positions 0 and 1
    assert compress(dense, indices).tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert torch.equal(decompress(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), indices), dense)


@quick
@given(SHAPES, st.integers(0, 2**31))
def test_mask_survives_packing(shape, seed):
    mask = random_mask(shape, seed)
    packed = pack_indices(mask)
    assert torch.equal(unpack_mask(packed), mask)
    assert torch.equal(mask_of(packed), mask)
    check_indices(packed, "indices")


@quick
@given(SHAPES, st.integers(0, 2**31), st.sampled_from((*FLOATS, torch.int32)))
def test_values_survive_decompress_and_compress(shape, seed, dtype):
    indices = pack_indices(random_mask(shape, seed))
    values = (gaussian(shape[0], shape[1] // 2, seed=seed) * 100).to(dtype)
    dense = decompress(values, indices)
    assert torch.equal(dense, spread(values, indices))
    assert torch.equal(compress(dense, indices), values)
    assert dense.dtype == dtype
    assert dense.is_contiguous()
    assert compress(dense.t().contiguous().t(), indices).is_contiguous()


@quick
@given(SHAPES, st.integers(0, 2**31), st.sampled_from(["magnitude", "random"]))
def test_compress_then_decompress_masks_a_dense_matrix(shape, seed, kind):
    dense = gaussian(*shape, seed=seed)
    mask = make_mask(kind, dense, seed)
    indices = pack_indices(mask)
    assert torch.equal(decompress(compress(dense, indices), indices), torch.where(mask, dense, 0.0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_of_a_kept_value_survives(dtype):
    values, indices = specials((4, 16), dtype), pack_indices(random_mask((4, 32), 0))
    dense = decompress(values, indices)
    assert torch.equal(bits(compress(dense, indices)), bits(values))
    assert not bits(dense)[~mask_of(indices)].any()  # +0.0 exactly, whatever the neighbours are


@pytest.mark.parametrize(("count", "row", "group"), [(1, 0, 0), (3, 2, 1), (0, 1, 3), (4, 3, 2)])
def test_a_group_without_exactly_two_is_named(count, row, group):
    mask = random_mask((4, 16), 0)
    mask[row, 4 * group : 4 * group + 4] = torch.arange(4) < count
    message = f"row {row}, columns {4 * group} to {4 * group + 3} keep {count} of four"
    with pytest.raises(ValueError, match=message):
        pack_indices(mask)


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(NIBBLES.values())))
@pytest.mark.parametrize("high", [False, True])
def test_every_damaged_nibble_is_found_and_named(nibble, high):
    indices = torch.full((3, 2), 0x44, dtype=torch.uint8)
    indices[2, 1] = nibble << 4 | 0x4 if high else 0x40 | nibble
    with pytest.raises(ValueError, match=f"buf: row 2, group {3 if high else 2} names positions {nibble & 3} and"):
        check_indices(indices, "buf")
