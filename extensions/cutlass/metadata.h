// Where a byte of `indices` goes in the metadata. Both hold two groups of four a byte in the same order, so that the
// metadata is a permutation of the bytes; instance.cu checks this against CUTLASS's own layout when it is compiled.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SLOPE_HOST_DEVICE __host__ __device__
#else
#define SLOPE_HOST_DEVICE
#endif

namespace slope::sm90 {

constexpr int kAtomRows = 64;

SLOPE_HOST_DEVICE constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// The matrix is cut in atoms of 64 rows and `depth` columns (8 * depth bytes), stored along the rows first. In an atom, from
// the fastest: the two bytes of 16 columns, rows r and r + 8, blocks of 32 columns, r, halves of such a block, blocks of
// 16 rows.
SLOPE_HOST_DEVICE constexpr int64_t metadata_offset(int depth, int64_t rows, int64_t row, int64_t column_byte) {
  const int blocks = depth / 32;
  const int64_t atom = row / kAtomRows + column_byte / (depth / 8) * (round_up(rows, kAtomRows) / kAtomRows);
  const int r = int(row % kAtomRows), c = int(column_byte % (depth / 8));
  return atom * (8 * depth) + c % 2 + r / 8 % 2 * 2 + c / 4 * 4 + r % 8 * (4 * blocks) + c / 2 % 2 * (32 * blocks) +
         r / 16 * (64 * blocks);
}

}  // namespace slope::sm90
