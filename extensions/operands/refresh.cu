// Both operands' values in one pass over `values`; see README.md here.
#include "../device.cuh"

namespace slope {
namespace {

constexpr int kThreads = 256;

// A block turns a Tile x Tile piece of W: spread into shared memory along d_in, read back along d_out. Chunks of eight
// columns are stored at chunk ^ (row / 8): threads that read the same column in different groups of rows would otherwise
// all meet in one bank.
template <typename From, typename To, int Tile, bool Forward, bool Backward>
__global__ void __launch_bounds__(kThreads) refresh_kernel(const From* __restrict__ values,
                                                           const uint8_t* __restrict__ indices,
                                                           const uint8_t* __restrict__ backward_indices,
                                                           To* __restrict__ forward_values,
                                                           To* __restrict__ backward_values, int64_t d_out,
                                                           int64_t d_in) {
  constexpr int kChunks = Tile / 8, kUnits = Tile * kChunks / kThreads, kBatch = kUnits < 4 ? kUnits : 4;
  __shared__ Eight<To> tile[Backward ? Tile : 1][Backward ? kChunks : 1];
  const int64_t row0 = int64_t(blockIdx.y) * Tile, chunk0 = int64_t(blockIdx.x) * kChunks;
  const int64_t chunks = d_in / 8, row_bytes = d_out / 8;

  // Loads first, several at a time. Small tiles load the second half's too: a small matrix is one wave of blocks, and what it
  // waits for is the latency of loads that follow each other.
  constexpr bool kAhead = Backward && kUnits <= 2;
  uint8_t columns[kAhead ? kUnits : 1];
  if constexpr (kAhead) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = threadIdx.x + i * kThreads, column = unit / kChunks, group = unit % kChunks;
      if (row0 + 8 * group >= d_out || chunk0 + column / 8 >= chunks) continue;
      columns[i] = backward_indices[(8 * chunk0 + column) * row_bytes + row0 / 8 + group];
    }
  }
#pragma unroll 1
  for (int first = threadIdx.x; first < Tile * kChunks; first += kBatch * kThreads) {
    Four<From> kept[kBatch];
    uint8_t pattern[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = first + i * kThreads, row = unit / kChunks, chunk = unit % kChunks;
      if (row0 + row >= d_out || chunk0 + chunk >= chunks) continue;
      const int64_t place = (row0 + row) * chunks + chunk0 + chunk;
      kept[i] = reinterpret_cast<const Four<From>*>(values)[place];
      if constexpr (Backward) pattern[i] = indices[place];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = first + i * kThreads, row = unit / kChunks, chunk = unit % kChunks;
      if (row0 + row >= d_out || chunk0 + chunk >= chunks) continue;
      Four<To> converted;
#pragma unroll
      for (int j = 0; j < 4; ++j) converted.v[j] = cast<To>(kept[i].v[j]);
      if constexpr (Forward) {
        reinterpret_cast<Four<To>*>(forward_values)[(row0 + row) * chunks + chunk0 + chunk] = converted;
      }
      if constexpr (Backward) tile[row][chunk ^ (row / 8)] = spread(converted, pattern[i], zero<To>());
    }
  }
  if constexpr (Backward) {
    __syncthreads();
    // Neighbouring threads take neighbouring groups of rows of one column: their slots lie side by side in the transpose.
#pragma unroll 4
    for (int i = 0; i < kUnits; ++i) {
      const int unit = threadIdx.x + i * kThreads, column = unit / kChunks, group = unit % kChunks;
      if (row0 + 8 * group >= d_out || chunk0 + column / 8 >= chunks) continue;
      const int64_t place = (8 * chunk0 + column) * row_bytes + row0 / 8 + group;
      const unsigned byte = kAhead ? columns[kAhead ? i : 0] : backward_indices[place];
      const Pair a = low_group(byte), b = high_group(byte);
      const int chunk = (column / 8) ^ group, entry = column % 8;
      Four<To> slots;
      slots.v[0] = tile[8 * group + a.first][chunk].v[entry];
      slots.v[1] = tile[8 * group + a.second][chunk].v[entry];
      slots.v[2] = tile[8 * group + 4 + b.first][chunk].v[entry];
      slots.v[3] = tile[8 * group + 4 + b.second][chunk].v[entry];
      reinterpret_cast<Four<To>*>(backward_values)[place] = slots;
    }
  }
}

template <typename From, typename To, int Tile>
cudaError_t launch(const void* values, const uint8_t* indices, const uint8_t* backward_indices, void* forward_values,
                   void* backward_values, int64_t d_out, int64_t d_in, cudaStream_t stream) {
  const dim3 grid(unsigned((d_in + Tile - 1) / Tile), unsigned((d_out + Tile - 1) / Tile));
  const auto* from = static_cast<const From*>(values);
  auto *forward = static_cast<To*>(forward_values), *backward = static_cast<To*>(backward_values);
  if (forward != nullptr && backward != nullptr) {
    refresh_kernel<From, To, Tile, true, true>
        <<<grid, kThreads, 0, stream>>>(from, indices, backward_indices, forward, backward, d_out, d_in);
  } else if (backward != nullptr) {
    refresh_kernel<From, To, Tile, false, true>
        <<<grid, kThreads, 0, stream>>>(from, indices, backward_indices, forward, backward, d_out, d_in);
  } else if (forward != nullptr) {
    refresh_kernel<From, To, Tile, true, false>
        <<<grid, kThreads, 0, stream>>>(from, indices, backward_indices, forward, backward, d_out, d_in);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t refresh(const void* values, Dtype from, const uint8_t* indices, const uint8_t* backward_indices,
                    void* forward_values, void* backward_values, Dtype to, int64_t d_out, int64_t d_in,
                    cudaStream_t stream) {
  if (d_out == 0 || d_in == 0) return cudaSuccess;
  return with_float(from, [&](auto source) {
    return with_16_bit(to, [&](auto target) {
      using From = decltype(source);
      using To = decltype(target);
      // Large tiles write whole 128-byte lines; small matrices have too few of them to fill the chip.
      const bool large = d_out * d_in >= int64_t(128) * 128 * 264;
      return large ? launch<From, To, 128>(values, indices, backward_indices, forward_values, backward_values, d_out,
                                           d_in, stream)
                   : launch<From, To, 64>(values, indices, backward_indices, forward_values, backward_values, d_out,
                                          d_in, stream);
    });
  });
}

}  // namespace slope
