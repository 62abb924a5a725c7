// Which two of every four rows the transpose keeps in each column, by current magnitude; see README.md here.
#include <cmath>

#include "../device.cuh"

namespace slope {
namespace {

constexpr int kThreads = 256, kTile = 64, kChunks = kTile / 8;

template <typename T>
__device__ __forceinline__ float magnitude(T x) {
  const float size = fabsf(float(x));
  return size != size ? INFINITY : size;  // a weight that became NaN stays visible
}

struct Choice {
  unsigned nibble, mask;  // positions as stored; the same as four bits
};

// The two largest keys; the lower position wins a tie. Pruned entries have key -1 and go last.
__device__ __forceinline__ Choice largest_two(const float (&key)[4]) {
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int losses = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j != i) losses += j < i ? key[j] >= key[i] : key[j] > key[i];
    }
    mask |= unsigned(losses < 2) << i;
  }
  const unsigned first = __ffs(mask) - 1, second = 31 - __clz(mask);
  return {first | second << 2, mask};
}

__device__ __forceinline__ unsigned mask_of(Pair pair) { return 1u << pair.first | 1u << pair.second; }

template <typename T>
__global__ void __launch_bounds__(kThreads) choose_kernel(const T* __restrict__ values,
                                                          const uint8_t* __restrict__ indices,
                                                          const uint8_t* __restrict__ previous,
                                                          uint8_t* __restrict__ chosen,
                                                          unsigned long long* __restrict__ counts, int64_t d_out,
                                                          int64_t d_in) {
  __shared__ float key[kTile][kTile + 1];
  const int64_t row0 = int64_t(blockIdx.y) * kTile, chunk0 = int64_t(blockIdx.x) * kChunks;
  const int64_t chunks = d_in / 8, row_bytes = d_out / 8;
  for (int unit = threadIdx.x; unit < kTile * kChunks; unit += kThreads) {
    const int row = unit / kChunks, chunk = unit % kChunks;
    if (row0 + row >= d_out || chunk0 + chunk >= chunks) continue;
    const int64_t place = (row0 + row) * chunks + chunk0 + chunk;
    const Four<T> kept = reinterpret_cast<const Four<T>*>(values)[place];
    Four<float> sizes;
#pragma unroll
    for (int i = 0; i < 4; ++i) sizes.v[i] = magnitude(kept.v[i]);
    const Eight<float> keys = spread(sizes, indices[place], -1.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) key[row][8 * chunk + i] = keys.v[i];
  }
  __syncthreads();
  int replaced = 0, total = 0;
  for (int unit = threadIdx.x; unit < kTile * kChunks; unit += kThreads) {
    const int column = unit / kChunks, group = unit % kChunks;
    if (row0 + 8 * group >= d_out || chunk0 + column / 8 >= chunks) continue;
    const int64_t place = (8 * chunk0 + column) * row_bytes + row0 / 8 + group;
    unsigned byte = 0;
    const unsigned before = previous == nullptr ? 0 : previous[place];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float four[4];
      unsigned live = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        four[i] = key[8 * group + 4 * half + i][column];
        live |= unsigned(four[i] >= 0.0f) << i;
      }
      const Choice choice = largest_two(four);
      byte |= choice.nibble << 4 * half;
      if (previous != nullptr) {
        const unsigned old = mask_of(half == 0 ? low_group(before) : high_group(before)) & live;
        replaced += __popc(choice.mask & live & ~old);
        total += __popc(old);
      }
    }
    chosen[place] = uint8_t(byte);
  }
  if (previous != nullptr) {
    for (int offset = 16; offset > 0; offset /= 2) {
      replaced += __shfl_down_sync(~0u, replaced, offset);
      total += __shfl_down_sync(~0u, total, offset);
    }
    if (threadIdx.x % 32 == 0) {
      atomicAdd(counts, replaced);
      atomicAdd(counts + 1, total);
    }
  }
}

}  // namespace

cudaError_t choose_columns(const void* values, Dtype dtype, const uint8_t* indices, const uint8_t* previous,
                           uint8_t* chosen, int64_t* counts, int64_t d_out, int64_t d_in, cudaStream_t stream) {
  if (d_out == 0 || d_in == 0) return cudaSuccess;
  return with_float(dtype, [&](auto sample) {
    using T = decltype(sample);
    const dim3 grid(unsigned((d_in + kTile - 1) / kTile), unsigned((d_out + kTile - 1) / kTile));
    choose_kernel<T><<<grid, kThreads, 0, stream>>>(static_cast<const T*>(values), indices, previous, chosen,
                                                    reinterpret_cast<unsigned long long*>(counts), d_out, d_in);
    return cudaGetLastError();
  });
}

}  // namespace slope
