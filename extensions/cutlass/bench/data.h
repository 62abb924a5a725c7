// Random data of both dtypes, dense products and errors: what results are held against.
#pragma once

#include "common.h"

namespace {

__device__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

template <typename T>
__global__ void normal_kernel(T* out, int64_t count, uint64_t seed, float scale, bool no_zeros) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const uint64_t bits = mix(seed * 0x100000001b3ull + uint64_t(i));
    const float u = (float(uint32_t(bits) >> 8) + 1.0f) * 0x1p-24f, v = float(uint32_t(bits >> 32) >> 8) * 0x1p-24f;
    const float normal = sqrtf(-2.0f * __logf(u)) * __cosf(6.2831853f * v) * scale;
    const T value = T(normal);
    out[i] = no_zeros && float(value) == 0.0f ? T(scale) : value;
  }
}

__global__ void indices_kernel(uint8_t* out, int64_t count, uint64_t seed) {
  const uint8_t pairs[6] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};  // (0,1) (0,2) (0,3) (1,2) (1,3) (2,3)
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const uint64_t bits = mix(seed * 0x100000001b3ull + uint64_t(i));
    out[i] = uint8_t(pairs[uint32_t(bits) % 6] | pairs[uint32_t(bits >> 32) % 6] << 4);
  }
}

// Where a group's entry lies in its row.
__device__ int64_t column_of(const uint8_t* row_indices, int64_t entry) {
  const int64_t group = entry / 2;
  const int nibble = row_indices[group / 2] >> (group % 2 * 4) & 15;
  return group * 4 + (entry % 2 == 0 ? nibble & 3 : nibble >> 2);
}

template <typename T>
__global__ void expand_kernel(const T* values, const uint8_t* indices, T* dense, int64_t rows, int64_t columns) {
  const int64_t count = rows * columns / 2;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = i / (columns / 2), entry = i % (columns / 2);
    dense[row * columns + column_of(indices + row * (columns / 8), entry)] = values[i];
  }
}

// The product in float64, and what a dense operation of this dtype makes of it: float sums, rounded once.
template <typename T>
__global__ void reference_kernel(const T* x, const T* values, const uint8_t* indices, const T* bias, double* exact,
                                 T* dense, int64_t n, int64_t rows, int64_t columns) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n * rows; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t token = i / rows, row = i % rows;
    double sum = 0;
    float single = 0;
    for (int64_t entry = 0; entry < columns / 2; ++entry) {
      const float w = float(values[row * (columns / 2) + entry]);
      const float input = float(x[token * columns + column_of(indices + row * (columns / 8), entry)]);
      sum += double(w) * double(input);
      single = fmaf(w, input, single);
    }
    if (bias != nullptr) {
      sum += double(float(bias[row]));
      single += float(bias[row]);
    }
    exact[i] = sum;
    dense[i] = T(single);
  }
}

// GELU and its derivative once more, in the textbook's form and not that of gelu.h: Real is double for what is right, and float
// for what a dense operation does.
template <typename Real>
__device__ Real gelu_reference(Real x, bool by_tanh) {
  if (by_tanh) return Real(0.5) * x * (1 + tanh(Real(0.79788456080286536) * (x + Real(0.044715) * x * x * x)));
  return Real(0.5) * x * (1 + erf(x * Real(0.70710678118654752)));
}
template <typename Real>
__device__ Real gelu_gradient_reference(Real x, bool by_tanh) {
  if (by_tanh) {
    const Real t = tanh(Real(0.79788456080286536) * (x + Real(0.044715) * x * x * x));
    const Real rate = Real(0.79788456080286536) * (1 + 3 * Real(0.044715) * x * x);
    return Real(0.5) * (1 + t) + Real(0.5) * x * (1 - t * t) * rate;
  }
  return Real(0.5) * (1 + erf(x * Real(0.70710678118654752))) + x * exp(Real(-0.5) * x * x) * Real(0.39894228040143268);
}

// From a product's reference to that of GELU taken of it; the dense one rounds in between.
template <typename T>
__global__ void activate_kernel(const double* exact, const T* dense, double* y_exact, T* y_dense, int64_t count,
                                bool by_tanh) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    y_exact[i] = gelu_reference<double>(exact[i], by_tanh);
    y_dense[i] = T(gelu_reference<float>(float(dense[i]), by_tanh));
  }
}

template <typename T>
__global__ void times_gradient_kernel(const double* exact, const T* dense, const T* aux, double* y_exact, T* y_dense,
                                      int64_t count, bool by_tanh) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    y_exact[i] = exact[i] * gelu_gradient_reference<double>(double(float(aux[i])), by_tanh);
    y_dense[i] = T(float(dense[i]) * gelu_gradient_reference<float>(float(aux[i]), by_tanh));
  }
}

// Counts y that are not the GELU of the stored aux, to the last bit but for float's own error: shows which of the two
// numbers, rounded or not, GELU was taken of. `half_ulp` is relative.
template <typename T>
__global__ void not_gelu_of_kernel(const T* y, const T* aux, int64_t count, bool by_tanh, double half_ulp,
                                   unsigned long long* wrong) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const double right = gelu_reference<double>(double(float(aux[i])), by_tanh);
    const double error = fabs(double(float(y[i])) - right);
    if (!(error <= 1.01 * half_ulp * fabs(right) + 1e-6)) atomicAdd(wrong, 1ull);  // also for NaN
  }
}

// Every 16th becomes zero or far out: where exponentials underflow and powers are large.
template <typename T>
__global__ void far_out_kernel(T* out, int64_t count) {
  const float values[8] = {0.0f, -0.0f, 20.0f, -20.0f, 1000.0f, -1000.0f, 60000.0f, -60000.0f};
  for (int64_t i = 16 * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x); i < count;
       i += 16 * (int64_t(gridDim.x) * blockDim.x)) {
    out[i] = T(values[i / 16 % 8]);
  }
}

// The passes that the fused epilogues save, eight values a thread: y = gelu(x), and y *= gelu'(aux). The first needs no store
// of the aux: that is the product as it lies.
template <typename T>
struct alignas(16) Eight {
  T v[8];
};
template <typename T, typename Gelu>
__global__ void __launch_bounds__(256) gelu_pass_kernel(const Eight<T>* __restrict__ x, Eight<T>* __restrict__ y,
                                                        int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    Eight<T> a = x[i];
#pragma unroll
    for (int j = 0; j < 8; ++j) a.v[j] = T(Gelu::value(float(a.v[j])));
    y[i] = a;
  }
}
template <typename T, typename Gelu>
__global__ void __launch_bounds__(256) gradient_pass_kernel(Eight<T>* __restrict__ y, const Eight<T>* __restrict__ aux,
                                                            int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    Eight<T> a = y[i];
    const Eight<T> b = aux[i];
#pragma unroll
    for (int j = 0; j < 8; ++j) a.v[j] = T(float(a.v[j]) * Gelu::gradient(float(b.v[j])));
    y[i] = a;
  }
}

// errors[0]: largest |y - exact|, errors[1]: that of the dense operation, as the bits of non-negative doubles. NaN: infinity.
template <typename T>
__global__ void error_kernel(const T* y, const T* dense, const double* exact, int64_t count,
                             unsigned long long* errors) {
  double worst = 0, worst_dense = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const double error = fabs(double(float(y[i])) - exact[i]);
    worst = fmax(worst, error < 1e300 ? error : 1e300);  // also for NaN
    worst_dense = fmax(worst_dense, fabs(double(float(dense[i])) - exact[i]));
  }
  atomicMax(errors, (unsigned long long)(__double_as_longlong(worst)));
  atomicMax(errors + 1, (unsigned long long)(__double_as_longlong(worst_dense)));
}

// Counts bytes of a guard that are not 0xff any more.
__global__ void guard_kernel(const uint8_t* guard, int64_t count, unsigned long long* changed) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    if (guard[i] != 0xff) atomicAdd(changed, 1ull);
  }
}

template <typename T>
__global__ void difference_kernel(const T* a, const T* b, int64_t count, unsigned* largest) {
  float mine = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const float difference = fabsf(float(a[i]) - float(b[i]));
    mine = fmaxf(mine, difference < 1e30f ? difference : 1e30f);  // also for NaN
  }
  atomicMax(largest, __float_as_uint(mine));
}

// Nibbles that say one bit of their own number: positions 0 and 1 for 0, positions 2 and 3 for 1.
__global__ void numbered_kernel(uint8_t* indices, int64_t count, int bit) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int low = int((2 * i) >> bit & 1), high = int((2 * i + 1) >> bit & 1);
    indices[i] = uint8_t((low ? 0xe : 0x4) | (high ? 0xe0 : 0x40));
  }
}

unsigned grid(int64_t count) { return unsigned(std::max<int64_t>(1, std::min<int64_t>((count + 255) / 256, 1 << 15))); }

template <typename T>
struct TypeOf;
template <>
struct TypeOf<__nv_bfloat16> {
  static constexpr Dtype dtype = Dtype::bf16;
  static constexpr cudaDataType cuda = CUDA_R_16BF;
  static constexpr const char* name = "bf16";
  static constexpr double half_ulp = 0x1p-8;
};
template <>
struct TypeOf<__half> {
  static constexpr Dtype dtype = Dtype::f16;
  static constexpr cudaDataType cuda = CUDA_R_16F;
  static constexpr const char* name = "fp16";
  static constexpr double half_ulp = 0x1p-11;
};

template <typename T>
void fill_normal(void* out, int64_t count, uint64_t seed, float scale, bool no_zeros = false) {
  normal_kernel<T><<<grid(count), 256>>>(static_cast<T*>(out), count, seed, scale, no_zeros);
  OK(cudaGetLastError());
}

void fill_indices(void* out, int64_t count, uint64_t seed) {
  indices_kernel<<<grid(count), 256>>>(static_cast<uint8_t*>(out), count, seed);
  OK(cudaGetLastError());
}

template <typename T>
void expand(const void* values, const void* indices, void* dense, int64_t rows, int64_t columns) {
  OK(cudaMemset(dense, 0, size_t(rows * columns) * sizeof(T)));
  expand_kernel<T><<<grid(rows * columns / 2), 256>>>(static_cast<const T*>(values),
                                                      static_cast<const uint8_t*>(indices), static_cast<T*>(dense), rows,
                                                      columns);
  OK(cudaGetLastError());
}

}  // namespace
