// What the kernels share: reading two-bit positions, loads and stores of four values, dispatch over dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace slope {

struct Pair {  // one group of four: its two positions
  int first, second;
};

__device__ __forceinline__ Pair low_group(unsigned byte) { return {int(byte & 3), int(byte >> 2 & 3)}; }
__device__ __forceinline__ Pair high_group(unsigned byte) { return {int(byte >> 4 & 3), int(byte >> 6 & 3)}; }

// Four values as one access: 8 bytes for 16-bit types, 16 for float.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

template <typename T>
struct alignas(16) Eight {
  T v[8];
};

template <typename To, typename From>
__device__ __forceinline__ To cast(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else {
    return To(float(x));
  }
}

template <typename T>
__device__ __forceinline__ T zero() {
  return T(0.0f);
}

// The eight entries of a byte of indices: kept values in place, `empty` elsewhere. Selects, no indexed registers.
template <typename T>
__device__ __forceinline__ Eight<T> spread(const Four<T>& kept, unsigned byte, T empty) {
  const Pair a = low_group(byte), b = high_group(byte);
  Eight<T> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.v[i] = i == a.first ? kept.v[0] : i == a.second ? kept.v[1] : empty;
    out.v[4 + i] = i == b.first ? kept.v[2] : i == b.second ? kept.v[3] : empty;
  }
  return out;
}

template <typename T>
__device__ __forceinline__ T pick(const T* four, int position) {
  return position == 0 ? four[0] : position == 1 ? four[1] : position == 2 ? four[2] : four[3];
}

template <typename F>
cudaError_t with_16_bit(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::bf16: return f(__nv_bfloat16{});
    case Dtype::f16: return f(__half{});
    default: return cudaErrorInvalidValue;
  }
}

template <typename F>
cudaError_t with_float(Dtype dtype, F&& f) {
  return dtype == Dtype::f32 ? f(float{}) : with_16_bit(dtype, f);
}

// Blocks of a grid-stride loop: enough to fill the chip several times over, never more than there is work.
inline unsigned blocks_for(int64_t units, int threads) {
  return unsigned(std::max<int64_t>(1, std::min<int64_t>((units + threads - 1) / threads, 1 << 16)));
}

}  // namespace slope
