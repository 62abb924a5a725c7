// cuSPARSELt's metadata on Hopper, written directly from the indices: a permutation of their nibbles, 2,000 times faster than a
// marker matrix and the library's compression. The order is nowhere documented; it was read off compressed matrices
// (extensions/cutlass/bench_spmm_sm90.cu, part `layout`), so slope_pl.ops.cusparselt compares products before it is trusted.
#include "../device.cuh"

namespace slope {
namespace {

constexpr int kTileRows = 64, kTileBytes = 4;  // of indices: 64 rows by 8 groups of four

// Tiles lie along the columns first. In a tile, from the fastest: rows r and r + 8 (the two nibbles of a byte), bit 2 of the
// group, bits 0 and 1 of the group, bits 0 to 2 of the row, bits 4 and 5 of the row. A thread writes the 8 bytes of a pair of
// rows.
__global__ void metadata_kernel(const uint8_t* __restrict__ indices, uint2* __restrict__ metadata, int64_t rows,
                                int64_t row_bytes, int64_t tiles_across, int64_t units) {
  for (int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; unit < units;
       unit += int64_t(gridDim.x) * blockDim.x) {
    const int pair = int(unit % 32);
    const int64_t tile = unit / 32;
    const int64_t row = tile / tiles_across * kTileRows + pair % 8 + pair / 8 * 16;
    const int64_t byte0 = tile % tiles_across * kTileBytes;
    uint32_t groups[2] = {0, 0};  // eight nibbles of row r, and of row r + 8
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + 8 * i >= rows) continue;
#pragma unroll
      for (int b = 0; b < kTileBytes; ++b) {
        if (byte0 + b < row_bytes) {
          groups[i] |= uint32_t(indices[(row + 8 * i) * row_bytes + byte0 + b]) << (8 * b);
        }
      }
    }
    uint32_t out[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int group = (j & 1) << 2 | (j >> 1 & 1) | (j >> 2 & 1) << 1;
      const uint32_t byte = (groups[0] >> (4 * group) & 15) | (groups[1] >> (4 * group) & 15) << 4;
      out[j / 4] |= byte << (8 * (j % 4));
    }
    metadata[unit] = make_uint2(out[0], out[1]);
  }
}

}  // namespace

size_t metadata_bytes(int64_t rows, int64_t columns) {
  return size_t((rows + kTileRows - 1) / kTileRows * ((columns / 8 + kTileBytes - 1) / kTileBytes)) * 256;
}

cudaError_t write_metadata(const uint8_t* indices, void* metadata, int64_t rows, int64_t columns, cudaStream_t stream) {
  const int64_t across = (columns / 8 + kTileBytes - 1) / kTileBytes;
  const int64_t units = (rows + kTileRows - 1) / kTileRows * across * 32;
  if (units == 0) return cudaSuccess;
  metadata_kernel<<<blocks_for(units, 256), 256, 0, stream>>>(indices, static_cast<uint2*>(metadata), rows, columns / 8,
                                                              across, units);
  return cudaGetLastError();
}

}  // namespace slope
