// Checks and measures the kernels of spmm_sm90.h, cuSPARSELt beside them where the library is found.
//
//   bench [check] [layout] [bench] [bench-small] [fused] [--seconds S] [--cusparselt PATH] [--without KERNEL]...
//
// Without a name: all of them but `fused`, each in a process of its own, so that a lost device ends one part alone. After
// S seconds (80) no further shape is measured.
//
// check: every configuration against float64 and against a dense operation of the same dtype, the fused epilogues last.
// layout: cuSPARSELt's compressed form beside ours. bench, bench-small: times by replayed CUDA graphs; with OUT set, all of
// them in $OUT/sm90.csv as well. fused: times of the epilogues with GELU, beside a product with a pass after it.
// The exit code is the largest number of failures in a part (at most 99).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cusparseLt.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "gelu.h"
#include "metadata.h"
#include "spmm_sm90.h"

#if !defined(SLOPE_SM90_ALL)
#error "the bench is built with SLOPE_SM90_ALL"
#endif

namespace {

namespace sm90 = slope::sm90;
using sm90::Dtype;
using sm90::Epilogue;
using sm90::Metadata;

int failures = 0;
std::vector<int> left_out;  // kernels, by number

bool is_left_out(int kernel) { return std::find(left_out.begin(), left_out.end(), kernel) != left_out.end(); }

std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

void fail(const std::string& what) {
  constexpr int kShown = 60;
  ++failures;
  if (failures <= kShown) printf("FAIL %s%s\n", what.c_str(), failures == kShown ? " (no more of them are shown)" : "");
}

void ok(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
void ok(const char* error, const char* what) {
  if (error != nullptr) throw std::runtime_error(std::string(what) + ": " + error);
}
#define OK(call) ok((call), #call)

// Clears an error that an attempt has left; ends the program if the device cannot be used any more.
void recover() {
  cudaGetLastError();
  const cudaError_t status = cudaDeviceSynchronize();
  if (status == cudaSuccess) return;
  cudaGetLastError();
  if (cudaFree(nullptr) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess) return;
  printf("FAIL the device is lost: %s\n", cudaGetErrorString(status));
  fflush(stdout);
  _Exit(99);
}

// Runs one case; what goes wrong in it is printed and does not end the others.
template <typename F>
bool attempt(const std::string& what, F&& f) {
  try {
    f();
    return true;
  } catch (const std::exception& error) {
    fail(what + ": " + error.what());
    recover();
    return false;
  }
}

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    if (bytes > 0) OK(cudaMalloc(&pointer_, bytes));
  }
  ~Buffer() { cudaFree(pointer_); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  void* get() const { return pointer_; }
  uint8_t* bytes() const { return static_cast<uint8_t*>(pointer_); }
  size_t size() const { return bytes_; }
  void need(size_t bytes) {
    if (bytes_ < bytes) {
      Buffer fresh(bytes);
      swap(fresh);
    }
  }

 private:
  void swap(Buffer& other) {
    std::swap(pointer_, other.pointer_);
    std::swap(bytes_, other.bytes_);
  }
  void* pointer_ = nullptr;
  size_t bytes_ = 0;
};

std::vector<uint8_t> to_host(const void* pointer, size_t bytes) {
  std::vector<uint8_t> host(bytes);
  OK(cudaMemcpy(host.data(), pointer, bytes, cudaMemcpyDeviceToHost));
  return host;
}

// ---------------------------------------------------------------------------------------------------------------- data

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

// ----------------------------------------------------------------------------------------------------------- cuSPARSELt

#define SLOPE_LT_FUNCTIONS(X)                                                                                     \
  X(cusparseLtInit)                                                                                               \
  X(cusparseLtDestroy)                                                                                            \
  X(cusparseLtGetVersion)                                                                                         \
  X(cusparseLtGetErrorName)                                                                                       \
  X(cusparseLtDenseDescriptorInit)                                                                                \
  X(cusparseLtStructuredDescriptorInit)                                                                           \
  X(cusparseLtMatDescriptorDestroy)                                                                               \
  X(cusparseLtMatmulDescriptorInit)                                                                               \
  X(cusparseLtMatmulDescSetAttribute)                                                                             \
  X(cusparseLtMatmulAlgSelectionInit)                                                                             \
  X(cusparseLtMatmulAlgSelectionDestroy)                                                                          \
  X(cusparseLtMatmulAlgSetAttribute)                                                                              \
  X(cusparseLtMatmulAlgGetAttribute)                                                                              \
  X(cusparseLtMatmulPlanInit)                                                                                     \
  X(cusparseLtMatmulPlanDestroy)                                                                                  \
  X(cusparseLtMatmulGetWorkspace)                                                                                 \
  X(cusparseLtMatmul)                                                                                             \
  X(cusparseLtSpMMACompressedSize2)                                                                               \
  X(cusparseLtSpMMACompress2)

struct Lt {
#define X(name) decltype(&::name) name = nullptr;
  SLOPE_LT_FUNCTIONS(X)
#undef X
  cusparseLtHandle_t handle;

  void ok(cusparseStatus_t status, const char* what) const {
    if (status != CUSPARSE_STATUS_SUCCESS) {
      throw std::runtime_error(std::string(what) + ": " + cusparseLtGetErrorName(status));
    }
  }
};

// The library and a handle, or null with a line that says why. Never closed: it may hold on to the CUDA context.
Lt* load_lt(const std::string& path) {
  std::vector<std::string> places;
  if (!path.empty()) places.push_back(path);
  places.push_back("libcusparseLt.so.0");
  void* library = nullptr;
  std::string reason;
  for (const std::string& place : places) {
    library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) {
      printf("cuSPARSELt: %s", place.c_str());
      break;
    }
    reason += std::string("\n  ") + dlerror();
  }
  if (library == nullptr) {
    printf("cuSPARSELt: not found%s\n", reason.c_str());
    return nullptr;
  }
  auto lt = std::make_unique<Lt>();
#define X(name)                                                          \
  lt->name = reinterpret_cast<decltype(&::name)>(dlsym(library, #name)); \
  if (lt->name == nullptr) {                                             \
    printf(": no function " #name "\n");                                 \
    return nullptr;                                                      \
  }
  SLOPE_LT_FUNCTIONS(X)
#undef X
  const cusparseStatus_t status = lt->cusparseLtInit(&lt->handle);
  if (status != CUSPARSE_STATUS_SUCCESS) {
    printf(": cusparseLtInit: %s\n", lt->cusparseLtGetErrorName(status));
    return nullptr;
  }
  int version = 0;
  lt->cusparseLtGetVersion(&lt->handle, &version);
  printf(", version %d\n", version);
  return lt.release();
}

#define LT(call) lt_.ok(lt_.call, #call)

class LtStructured {
 public:
  LtStructured(const Lt& lt, int64_t d_out, int64_t d_in, cudaDataType type) : lt_(lt) {
    LT(cusparseLtStructuredDescriptorInit(&lt_.handle, &descriptor_, d_out, d_in, d_in, 16, type, CUSPARSE_ORDER_ROW,
                                          CUSPARSELT_SPARSITY_50_PERCENT));
    try {
      LT(cusparseLtSpMMACompressedSize2(&lt_.handle, &descriptor_, &bytes_, &buffer_bytes_));
    } catch (...) {
      lt_.cusparseLtMatDescriptorDestroy(&descriptor_);
      throw;
    }
  }
  ~LtStructured() { lt_.cusparseLtMatDescriptorDestroy(&descriptor_); }
  LtStructured(const LtStructured&) = delete;
  LtStructured& operator=(const LtStructured&) = delete;
  size_t bytes() const { return bytes_; }

  void compress(const void* dense, void* compressed) {
    buffer_.need(buffer_bytes_);
    LT(cusparseLtSpMMACompress2(&lt_.handle, &descriptor_, 1, CUSPARSE_OPERATION_NON_TRANSPOSE, dense, compressed,
                                buffer_.get(), nullptr));
    OK(cudaDeviceSynchronize());
  }

 private:
  const Lt& lt_;
  cusparseLtMatDescriptor_t descriptor_;
  size_t bytes_ = 0, buffer_bytes_ = 0;
  Buffer buffer_;
};

// One product with one algorithm (-1: the library's own).
class LtPlan {
 public:
  LtPlan(const Lt& lt, int64_t n, int64_t d_out, int64_t d_in, cudaDataType type, int algorithm, const void* bias)
      : lt_(lt) {
    try {
      LT(cusparseLtStructuredDescriptorInit(&lt_.handle, &w_, d_out, d_in, d_in, 16, type, CUSPARSE_ORDER_ROW,
                                            CUSPARSELT_SPARSITY_50_PERCENT));
      made_ = 1;
      LT(cusparseLtDenseDescriptorInit(&lt_.handle, &x_, d_in, n, d_in, 16, type, CUSPARSE_ORDER_COL));
      made_ = 2;
      LT(cusparseLtDenseDescriptorInit(&lt_.handle, &y_, d_out, n, d_out, 16, type, CUSPARSE_ORDER_COL));
      made_ = 3;
      LT(cusparseLtMatmulDescriptorInit(&lt_.handle, &product_, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                        CUSPARSE_OPERATION_NON_TRANSPOSE, &w_, &x_, &y_, &y_, CUSPARSE_COMPUTE_32F));
      if (bias != nullptr) {
        LT(cusparseLtMatmulDescSetAttribute(&lt_.handle, &product_, CUSPARSELT_MATMUL_BIAS_POINTER, &bias,
                                            sizeof(bias)));
      }
      LT(cusparseLtMatmulAlgSelectionInit(&lt_.handle, &selection_, &product_, CUSPARSELT_MATMUL_ALG_DEFAULT));
      made_ = 4;
      LT(cusparseLtMatmulAlgGetAttribute(&lt_.handle, &selection_, CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID,
                                         &max_algorithm_, sizeof(max_algorithm_)));
      if (algorithm >= 0) {
        LT(cusparseLtMatmulAlgSetAttribute(&lt_.handle, &selection_, CUSPARSELT_MATMUL_ALG_CONFIG_ID, &algorithm,
                                           sizeof(algorithm)));
      }
      LT(cusparseLtMatmulPlanInit(&lt_.handle, &plan_, &product_, &selection_));
      made_ = 5;
      size_t workspace = 0;
      LT(cusparseLtMatmulGetWorkspace(&lt_.handle, &plan_, &workspace));
      workspace_.need(workspace);
    } catch (...) {
      destroy();
      throw;
    }
  }
  ~LtPlan() { destroy(); }
  LtPlan(const LtPlan&) = delete;
  LtPlan& operator=(const LtPlan&) = delete;
  int max_algorithm() const { return max_algorithm_; }

  const char* run(const void* compressed, const void* x, void* y, cudaStream_t stream) const {
    const float one = 1, nothing = 0;
    const cusparseStatus_t status = lt_.cusparseLtMatmul(&lt_.handle, &plan_, &one, compressed, x, &nothing, y, y,
                                                         workspace_.get(), &stream, 1);
    return status == CUSPARSE_STATUS_SUCCESS ? nullptr : lt_.cusparseLtGetErrorName(status);
  }

 private:
  void destroy() {
    if (made_ > 4) lt_.cusparseLtMatmulPlanDestroy(&plan_);
    if (made_ > 3) lt_.cusparseLtMatmulAlgSelectionDestroy(&selection_);
    if (made_ > 2) lt_.cusparseLtMatDescriptorDestroy(&y_);
    if (made_ > 1) lt_.cusparseLtMatDescriptorDestroy(&x_);
    if (made_ > 0) lt_.cusparseLtMatDescriptorDestroy(&w_);
    made_ = 0;
  }
  const Lt& lt_;
  cusparseLtMatDescriptor_t w_, x_, y_;
  cusparseLtMatmulDescriptor_t product_;
  cusparseLtMatmulAlgSelection_t selection_;
  cusparseLtMatmulPlan_t plan_;
  int made_ = 0, max_algorithm_ = 0;
  Buffer workspace_;
};

// --------------------------------------------------------------------------------------------------------------- check

constexpr size_t kGuard = 4096;

// One product's inputs, its float64 result and a guarded output.
template <typename T>
struct Case {
  int64_t n, d_out, d_in;
  Buffer x, values, indices, bias, guarded, exact, dense, counters, e[2];

  Case(int64_t n_, int64_t d_in_, int64_t d_out_, uint64_t seed)
      : n(n_),
        d_out(d_out_),
        d_in(d_in_),
        x(size_t(n * d_in) * sizeof(T)),
        values(size_t(d_out * d_in / 2) * sizeof(T)),
        indices(size_t(d_out * d_in / 8)),
        bias(size_t(d_out) * sizeof(T)),
        guarded(size_t(n * d_out) * sizeof(T) + 2 * kGuard),
        exact(size_t(n * d_out) * sizeof(double)),
        dense(size_t(n * d_out) * sizeof(T)),
        counters(3 * sizeof(unsigned long long)) {
    fill_normal<T>(x.get(), n * d_in, seed, 1.0f);
    fill_normal<T>(values.get(), d_out * d_in / 2, seed + 1, float(std::sqrt(2.0 / double(d_in))), true);
    fill_normal<T>(bias.get(), d_out, seed + 2, 1.0f);
    fill_indices(indices.get(), d_out * d_in / 8, seed + 3);
    for (Metadata order : {Metadata::k128, Metadata::k64}) {
      Buffer& target = e[int(order)];
      target = Buffer(sm90::metadata_bytes(order, d_out, d_in));
      OK(sm90::build_metadata(order, indices.bytes(), target.get(), d_out, d_in, nullptr));
    }
    OK(cudaDeviceSynchronize());
  }

  void* y() const { return guarded.bytes() + kGuard; }

  void refer(bool with_bias) {
    reference_kernel<T><<<grid(n * d_out), 256>>>(
        static_cast<const T*>(x.get()), static_cast<const T*>(values.get()), indices.bytes(),
        with_bias ? static_cast<const T*>(bias.get()) : nullptr, static_cast<double*>(exact.get()),
        static_cast<T*>(dense.get()), n, d_out, d_in);
    OK(cudaGetLastError());
    OK(cudaDeviceSynchronize());
  }

  void clear() { OK(cudaMemset(guarded.get(), 0xff, guarded.size())); }  // NaN in both dtypes

  struct Errors {
    double ours, dense;
    bool guard_kept;
    bool passed() const { return guard_kept && ours <= 2 * dense + 1e-30; }
  };
  Errors errors() { return compare(guarded, exact, dense); }

  // The same for any guarded output of this size.
  Errors compare(const Buffer& output, const Buffer& right, const Buffer& of_dense) {
    OK(cudaMemset(counters.get(), 0, counters.size()));
    auto* counts = static_cast<unsigned long long*>(counters.get());
    error_kernel<T><<<std::min(grid(n * d_out), 132u), 256>>>(reinterpret_cast<const T*>(output.bytes() + kGuard),
                                                              static_cast<const T*>(of_dense.get()),
                                                              static_cast<const double*>(right.get()), n * d_out, counts);
    OK(cudaGetLastError());
    guard_kernel<<<grid(kGuard), 256>>>(output.bytes(), kGuard, counts + 2);
    OK(cudaGetLastError());
    guard_kernel<<<grid(kGuard), 256>>>(output.bytes() + output.size() - kGuard, kGuard, counts + 2);
    OK(cudaGetLastError());
    unsigned long long host[3];
    OK(cudaMemcpy(host, counts, sizeof(host), cudaMemcpyDeviceToHost));
    Errors result{};
    std::memcpy(&result.ours, &host[0], 8);
    std::memcpy(&result.dense, &host[1], 8);
    result.guard_kept = host[2] == 0;
    return result;
  }

  const char* run(int config, Epilogue epilogue, const void* metadata, void* aux = nullptr) {
    return sm90::run(config, epilogue, TypeOf<T>::dtype, x.get(), values.get(), metadata, bias.get(), y(), aux, n, d_out,
                     d_in, nullptr, nullptr);
  }
};

const char* order_name(Metadata order) { return order == Metadata::k128 ? "k128" : "k64"; }

std::string config_name(int id) {
  const sm90::Config& c = sm90::config(id);
  return text("%s %c%d", c.name, c.raster == sm90::Raster::along_m ? 'M' : 'N', c.swizzle);
}

void check_metadata() {
  const int64_t shapes[][2] = {{16, 16}, {64, 128}, {80, 112}, {208, 336}, {768, 768}, {3072, 768}, {144, 1040}};
  for (Metadata order : {Metadata::k128, Metadata::k64}) {
    const int depth = order == Metadata::k128 ? 128 : 64;
    for (const auto& shape : shapes) {
      for (int offset : {0, 1}) {  // bytes by which `indices` misses alignment
        const int64_t d_out = shape[0], d_in = shape[1], bytes = d_out * d_in / 8;
        const std::string what = text("metadata %s %lldx%lld offset %d", order_name(order), (long long)d_out,
                                      (long long)d_in, offset);
        attempt(what, [&] {
          Buffer indices(size_t(bytes + offset)), e(sm90::metadata_bytes(order, d_out, d_in));
          fill_indices(indices.bytes() + offset, bytes, 7);
          OK(cudaMemset(e.get(), 0xff, e.size()));
          OK(sm90::build_metadata(order, indices.bytes() + offset, e.get(), d_out, d_in, nullptr));
          OK(cudaDeviceSynchronize());
          const auto source = to_host(indices.bytes() + offset, size_t(bytes)), made = to_host(e.get(), e.size());
          std::vector<uint8_t> expected(e.size(), 0x44);
          for (int64_t row = 0; row < d_out; ++row) {
            for (int64_t byte = 0; byte < d_in / 8; ++byte) {
              expected[size_t(sm90::metadata_offset(depth, d_out, row, byte))] = source[size_t(row * (d_in / 8) + byte)];
            }
          }
          if (expected != made) fail(what);
        });
      }
    }
  }
}

template <typename T>
void check_products() {
  const int64_t shapes[][3] = {{1, 64, 64},     {7, 112, 80},    {129, 336, 272}, {1000, 768, 768}, {129, 768, 64},
                               {7, 64, 768},    {1000, 208, 144}, {300, 16, 16},  {513, 640, 528}};
  struct Worst {
    double ratio = 0, ours = 0, dense = 0;
    int cases = 0, failed = 0;
  };
  std::vector<Worst> worst(size_t(sm90::kernel_count() * 2));
  for (const auto& shape : shapes) {
    const std::string place =
        text("%s n %lld, %lld -> %lld", TypeOf<T>::name, (long long)shape[0], (long long)shape[1], (long long)shape[2]);
    attempt(place, [&] {
      Case<T> data(shape[0], shape[1], shape[2], 11);
      for (Epilogue epilogue : {Epilogue::none, Epilogue::bias}) {
        data.refer(epilogue == Epilogue::bias);
        for (int id = 0; id < sm90::config_count(); ++id) {
          const sm90::Config& c = sm90::config(id);
          if (is_left_out(c.kernel)) continue;
          Worst& w = worst[size_t(c.kernel * 2 + int(epilogue))];
          const std::string what = place + (epilogue == Epilogue::bias ? " bias " : " ") + config_name(id);
          ++w.cases;
          const bool done = attempt(what, [&] {
            OK(sm90::can_run(id, epilogue, data.n, data.d_out, data.d_in, TypeOf<T>::dtype));
            data.clear();
            OK(data.run(id, epilogue, data.e[int(c.metadata)].get()));
            OK(cudaDeviceSynchronize());
            const auto errors = data.errors();
            const double ratio = errors.ours / std::max(errors.dense, 1e-30);
            if (ratio >= w.ratio) w.ratio = ratio, w.ours = errors.ours, w.dense = errors.dense;
            if (!errors.passed()) {
              ++w.failed;
              if (w.failed <= 3) {
                fail(what + text(": error %.3g, dense %.3g%s", errors.ours, errors.dense,
                                 errors.guard_kept ? "" : ", wrote outside of y"));
              } else {
                ++failures;
              }
            }
          });
          if (!done) ++w.failed;
        }
      }
    });
  }
  for (int kernel = 0; kernel < sm90::kernel_count(); ++kernel) {
    for (int epilogue : {0, 1}) {
      const Worst& w = worst[size_t(kernel * 2 + epilogue)];
      if (is_left_out(kernel)) continue;
      const int id = kernel * (sm90::config_count() / sm90::kernel_count());
      printf("%s %s %-22s %d stages  %-4s  %d of %d  worst error %.3g, dense %.3g, ratio %.3f\n",
             w.failed == 0 && w.cases > 0 ? "PASS" : "FAIL", TypeOf<T>::name, sm90::config(id).name,
             sm90::config(id).stages, epilogue == 1 ? "bias" : "none", w.cases - w.failed, w.cases, w.ours, w.dense,
             w.ratio);
    }
  }
  fflush(stdout);
}

constexpr Epilogue kFused[] = {Epilogue::bias_gelu, Epilogue::bias_gelu_tanh, Epilogue::gelu_gradient,
                               Epilogue::gelu_gradient_tanh};

const char* fused_name(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::bias_gelu: return "bias_gelu";
    case Epilogue::bias_gelu_tanh: return "bias_gelu_tanh";
    case Epilogue::gelu_gradient: return "gelu_gradient";
    default: return "gelu_gradient_tanh";
  }
}
bool is_forward(Epilogue epilogue) { return epilogue == Epilogue::bias_gelu || epilogue == Epilogue::bias_gelu_tanh; }
bool is_tanh(Epilogue epilogue) {
  return epilogue == Epilogue::bias_gelu_tanh || epilogue == Epilogue::gelu_gradient_tanh;
}

// Forward: y, aux, and y as the GELU of that aux. Backward: y, for an aux with values far out, which must stay as it is.
template <typename T>
void check_fused() {
  const int64_t shapes[][3] = {{1, 64, 64},     {7, 112, 80},     {129, 336, 272}, {1001, 768, 768}, {129, 768, 64},
                               {7, 64, 768},    {1001, 208, 144}, {301, 16, 16},   {513, 640, 528}};
  struct Worst {
    double ratio = 0, ratio_aux = 0;
    int cases = 0, failed = 0;
  };
  const int kernels = sm90::kernel_count();
  std::vector<Worst> worst(size_t(kernels) * 4);
  for (const auto& shape : shapes) {
    const std::string place =
        text("%s n %lld, %lld -> %lld", TypeOf<T>::name, (long long)shape[0], (long long)shape[1], (long long)shape[2]);
    attempt(place + " fused", [&] {
      Case<T> data(shape[0], shape[1], shape[2], 31);
      const int64_t count = data.n * data.d_out;
      Buffer aux(data.guarded.size()), aux_before(data.guarded.size()), right(data.exact.size()), of_dense(data.dense.size());
      T* const aux_data = reinterpret_cast<T*>(aux.bytes() + kGuard);
      T* const aux_data_before = reinterpret_cast<T*>(aux_before.bytes() + kGuard);
      OK(cudaMemset(aux_before.get(), 0xff, aux_before.size()));
      fill_normal<T>(aux_data_before, count, 41, 2.0f);
      far_out_kernel<T><<<grid(count), 256>>>(aux_data_before, count);
      OK(cudaGetLastError());
      for (Epilogue epilogue : kFused) {
        const bool forward = is_forward(epilogue), by_tanh = is_tanh(epilogue);
        data.refer(forward);
        if (forward) {
          activate_kernel<T><<<grid(count), 256>>>(static_cast<const double*>(data.exact.get()),
                                                   static_cast<const T*>(data.dense.get()),
                                                   static_cast<double*>(right.get()), static_cast<T*>(of_dense.get()), count,
                                                   by_tanh);
        } else {
          times_gradient_kernel<T><<<grid(count), 256>>>(
              static_cast<const double*>(data.exact.get()), static_cast<const T*>(data.dense.get()), aux_data_before,
              static_cast<double*>(right.get()), static_cast<T*>(of_dense.get()), count, by_tanh);
        }
        OK(cudaGetLastError());
        OK(cudaDeviceSynchronize());
        for (int id = 0; id < sm90::config_count(); ++id) {
          const sm90::Config& c = sm90::config(id);
          if (is_left_out(c.kernel) || sm90::fused_stages(id, epilogue) == 0) continue;
          Worst& w = worst[size_t(c.kernel * 4 + int(epilogue) - int(kFused[0]))];
          const std::string what = place + " " + fused_name(epilogue) + " " + config_name(id);
          const auto wrong = [&](const std::string& how) {
            if (++w.failed <= 3) {
              fail(what + ": " + how);
            } else {
              ++failures;
            }
          };
          ++w.cases;
          const bool done = attempt(what, [&] {
            OK(sm90::can_run(id, epilogue, data.n, data.d_out, data.d_in, TypeOf<T>::dtype));
            data.clear();
            if (forward) {
              OK(cudaMemset(aux.get(), 0xff, aux.size()));
            } else {
              OK(cudaMemcpy(aux.get(), aux_before.get(), aux.size(), cudaMemcpyDeviceToDevice));
            }
            OK(data.run(id, epilogue, data.e[int(c.metadata)].get(), aux_data));
            OK(cudaDeviceSynchronize());
            const auto errors = data.compare(data.guarded, right, of_dense);
            w.ratio = std::max(w.ratio, errors.ours / std::max(errors.dense, 1e-30));
            std::string how;
            if (!errors.passed()) {
              how += text(" y: error %.3g, dense %.3g%s;", errors.ours, errors.dense,
                          errors.guard_kept ? "" : ", wrote outside of y");
            }
            if (forward) {
              const auto of_aux = data.compare(aux, data.exact, data.dense);
              w.ratio_aux = std::max(w.ratio_aux, of_aux.ours / std::max(of_aux.dense, 1e-30));
              if (!of_aux.passed()) {
                how += text(" aux: error %.3g, dense %.3g%s;", of_aux.ours, of_aux.dense,
                            of_aux.guard_kept ? "" : ", wrote outside of aux");
              }
              auto* counter = static_cast<unsigned long long*>(data.counters.get());
              OK(cudaMemset(counter, 0, sizeof(*counter)));
              not_gelu_of_kernel<T><<<grid(count), 256>>>(static_cast<const T*>(data.y()), aux_data, count, by_tanh,
                                                          TypeOf<T>::half_ulp, counter);
              OK(cudaGetLastError());
              unsigned long long different = 0;
              OK(cudaMemcpy(&different, counter, sizeof(different), cudaMemcpyDeviceToHost));
              if (different != 0) how += text(" %llu of y are not the GELU of aux;", different);
            } else if (to_host(aux.get(), aux.size()) != to_host(aux_before.get(), aux_before.size())) {
              how += " aux was changed;";
            }
            if (!how.empty()) wrong(how);
          });
          if (!done) ++w.failed;
        }
      }
    });
  }
  for (int kernel = 0; kernel < kernels; ++kernel) {
    const int id = kernel * (sm90::config_count() / kernels);
    for (Epilogue epilogue : kFused) {
      const Worst& w = worst[size_t(kernel * 4 + int(epilogue) - int(kFused[0]))];
      const int stages = sm90::fused_stages(id, epilogue);
      if (is_left_out(kernel) || stages == 0) continue;
      printf("%s %s %-22s %d stages  %-18s  %d of %d  worst ratio %.3f", w.failed == 0 && w.cases > 0 ? "PASS" : "FAIL",
             TypeOf<T>::name, sm90::config(id).name, stages, fused_name(epilogue), w.cases - w.failed, w.cases, w.ratio);
      if (is_forward(epilogue)) printf(", of aux %.3f", w.ratio_aux);
      printf("\n");
    }
  }
  fflush(stdout);
}

void check_refusals() {
  const auto refused = [](const char* what, const char* reason) {
    if (reason == nullptr) fail(std::string("not refused: ") + what);
  };
  refused("d_in 24", sm90::can_run(0, Epilogue::none, 8, 64, 24, Dtype::bf16));
  refused("d_out 8", sm90::can_run(0, Epilogue::none, 8, 8, 64, Dtype::bf16));
  refused("n 0", sm90::can_run(0, Epilogue::none, 0, 64, 64, Dtype::bf16));
  refused("config -1", sm90::can_run(-1, Epilogue::none, 8, 64, 64, Dtype::bf16));
  refused("config count", sm90::can_run(sm90::config_count(), Epilogue::none, 8, 64, 64, Dtype::bf16));
  attempt("refusals", [&] {
    Buffer memory(1 << 16);
    uint8_t* m = memory.bytes();
    refused("x off by 2", sm90::run(0, Epilogue::none, Dtype::bf16, m + 2, m, m, nullptr, m, nullptr, 1, 64, 64, nullptr,
                                    nullptr));
    refused("no bias", sm90::run(0, Epilogue::bias, Dtype::bf16, m, m, m, nullptr, m, nullptr, 1, 64, 64, nullptr,
                                 nullptr));
    refused("gelu without bias", sm90::run(0, Epilogue::bias_gelu, Dtype::bf16, m, m, m, nullptr, m, m, 1, 64, 64, nullptr,
                                           nullptr));
    for (Epilogue epilogue : kFused) {
      if (epilogue == Epilogue::gelu_gradient || epilogue == Epilogue::gelu_gradient_tanh) {
        refused("no aux", sm90::run(0, epilogue, Dtype::bf16, m, m, m, m, m, nullptr, 1, 64, 64, nullptr, nullptr));
      }
      refused("aux off by 2", sm90::run(0, epilogue, Dtype::bf16, m, m, m, m, m, m + 2, 1, 64, 64, nullptr, nullptr));
      refused("fused, last kernel", sm90::can_run(sm90::config_count() - 1, epilogue, 8, 64, 64, Dtype::bf16));
    }
  });
}

void check() {
  printf("== check: error against float64 at most twice a dense operation's\n");
  const int before = failures;
  check_refusals();
  check_metadata();
  printf("%s metadata and refusals\n", failures == before ? "PASS" : "FAIL");
  check_products<__nv_bfloat16>();
  check_products<__half>();
  check_fused<__nv_bfloat16>();
  check_fused<__half>();
}

// -------------------------------------------------------------------------------------------------------------- layout

// Compares a metadata tail with ours: bytes that stand for groups of W, and all bytes.
std::string compare_tail(const std::vector<uint8_t>& tail, const std::vector<uint8_t>& source, Metadata order,
                         int64_t d_out, int64_t d_in) {
  const int depth = order == Metadata::k128 ? 128 : 64;
  int64_t different = 0, outside = 0;
  for (int64_t row = 0; row < d_out; ++row) {
    for (int64_t byte = 0; byte < d_in / 8; ++byte) {
      const size_t place = size_t(sm90::metadata_offset(depth, d_out, row, byte));
      if (place >= tail.size()) {
        ++outside;
      } else if (tail[place] != source[size_t(row * (d_in / 8) + byte)]) {
        ++different;
      }
    }
  }
  const bool same = different == 0 && outside == 0;
  return text("%s %s (%lld of %lld bytes differ, %lld lie outside)", order_name(order), same ? "SAME" : "DIFFERENT",
              (long long)different, (long long)(d_out * d_in / 8), (long long)outside);
}

// Finds where cuSPARSELt puts each nibble, from as many compressions as a nibble's number has bits.
void infer_layout(const Lt& lt) {
  using T = __nv_bfloat16;
  const int64_t d_out = 256, d_in = 512, nibbles = d_out * d_in / 4;
  const int bits = 15;
  LtStructured structured(lt, d_out, d_in, CUDA_R_16BF);
  const size_t values_bytes = size_t(d_out * d_in / 2) * sizeof(T);
  if (structured.bytes() <= values_bytes) throw std::runtime_error("the compressed form has no tail");
  const size_t tail_bytes = structured.bytes() - values_bytes;
  Buffer values(values_bytes), indices(size_t(nibbles / 2)), dense(size_t(d_out * d_in) * sizeof(T)),
      compressed(structured.bytes());
  fill_normal<T>(values.get(), d_out * d_in / 2, 3, 1.0f, true);
  std::vector<int64_t> source(2 * tail_bytes, 0);
  std::vector<bool> odd(2 * tail_bytes, false);
  for (int bit = 0; bit < bits; ++bit) {
    numbered_kernel<<<grid(nibbles / 2), 256>>>(indices.bytes(), nibbles / 2, bit);
    OK(cudaGetLastError());
    expand<T>(values.get(), indices.get(), dense.get(), d_out, d_in);
    structured.compress(dense.get(), compressed.get());
    const auto tail = to_host(compressed.bytes() + values_bytes, tail_bytes);
    for (size_t i = 0; i < 2 * tail_bytes; ++i) {
      const int nibble = tail[i / 2] >> (i % 2 * 4) & 15;
      if (nibble == 0xe) {
        source[i] |= int64_t(1) << bit;
      } else if (nibble != 0x4) {
        odd[i] = true;
      }
    }
  }
  std::vector<int64_t> place(size_t(nibbles), -1);
  int64_t strange = 0, twice = 0, missing = 0;
  for (size_t i = 0; i < 2 * tail_bytes; ++i) {
    if (odd[i]) {
      ++strange;
    } else if (place[size_t(source[i])] >= 0) {
      ++twice;
    } else {
      place[size_t(source[i])] = int64_t(i);
    }
  }
  for (int64_t at : place) missing += at < 0;
  printf("  order of %lldx%lld: tail of %zu nibbles, %lld not 4 or e, %lld twice, %lld missing\n", (long long)d_out,
         (long long)d_in, 2 * tail_bytes, (long long)strange, (long long)twice, (long long)missing);
  if (missing == nibbles) return;
  int64_t bent = 0;
  for (int64_t i = 0; i < nibbles; ++i) {
    int64_t sum = place[0];
    for (int bit = 0; bit < bits; ++bit) {
      if (i >> bit & 1) sum += place[size_t(1) << bit] - place[0];
    }
    bent += sum != place[size_t(i)];
  }
  printf("  group 0 of row 0 at nibble %lld; steps in nibbles, by bits of the column group:", (long long)place[0]);
  for (int bit = 0; bit < bits; ++bit) {
    if (bit == 7) printf("; by bits of the row:");
    printf(" %lld", (long long)(place[size_t(1) << bit] - place[0]));
  }
  printf("; %lld nibbles do not follow these steps\n", (long long)bent);
}

void layout(const Lt* lt_or_null) {
  printf("== layout: cuSPARSELt's compressed form beside ours\n");
  if (lt_or_null == nullptr) {
    printf("SKIP no cuSPARSELt\n");
    return;
  }
  const Lt& lt = *lt_or_null;
  using T = __nv_bfloat16;
  const int64_t shapes[][2] = {{128, 128}, {768, 768}, {3072, 768}, {768, 3072}, {4096, 1024}, {80, 272}, {208, 336}};
  for (const auto& shape : shapes) {
    const int64_t d_out = shape[0], d_in = shape[1];
    attempt(text("layout %lldx%lld", (long long)d_out, (long long)d_in), [&] {
      Case<T> data(129, d_in, d_out, 23);
      data.refer(false);
      Buffer dense(size_t(d_out * d_in) * sizeof(T));
      expand<T>(data.values.get(), data.indices.get(), dense.get(), d_out, d_in);
      LtStructured structured(lt, d_out, d_in, CUDA_R_16BF);
      const size_t values_bytes = data.values.size();
      printf("%lldx%lld: values %zu, metadata k128 %zu, k64 %zu; cuSPARSELt in all %zu (%+lld beside values + k128)\n",
             (long long)d_out, (long long)d_in, values_bytes, data.e[0].size(), data.e[1].size(), structured.bytes(),
             (long long)structured.bytes() - (long long)(values_bytes + data.e[0].size()));
      Buffer compressed(structured.bytes());
      OK(cudaMemset(compressed.get(), 0x44, compressed.size()));
      structured.compress(dense.get(), compressed.get());
      const auto all = to_host(compressed.get(), compressed.size());
      const auto ours = to_host(data.values.get(), values_bytes);
      const auto source = to_host(data.indices.get(), data.indices.size());
      if (all.size() < values_bytes) throw std::runtime_error("the compressed form is smaller than the values");
      printf("  values %s;", std::equal(ours.begin(), ours.end(), all.begin()) ? "SAME" : "DIFFERENT");
      const std::vector<uint8_t> tail(all.begin() + int64_t(values_bytes), all.end());
      for (Metadata order : {Metadata::k128, Metadata::k64}) {
        printf(" %s;", compare_tail(tail, source, order, d_out, d_in).c_str());
      }
      printf("\n  multiplied with cuSPARSELt's metadata:");
      for (Metadata order : {Metadata::k128, Metadata::k64}) {
        int id = 0;
        while (sm90::config(id).metadata != order) ++id;
        Buffer metadata(std::max(tail.size(), data.e[int(order)].size()));
        OK(cudaMemset(metadata.get(), 0x44, metadata.size()));
        OK(cudaMemcpy(metadata.get(), tail.data(), tail.size(), cudaMemcpyHostToDevice));
        data.clear();
        OK(data.run(id, Epilogue::none, metadata.get()));
        OK(cudaDeviceSynchronize());
        const auto errors = data.errors();
        printf(" %s %s (error %.3g, dense %.3g);", order_name(order), errors.passed() ? "RIGHT" : "WRONG", errors.ours,
               errors.dense);
      }
      printf("\n  cuSPARSELt with our operand:");
      for (Metadata order : {Metadata::k128, Metadata::k64}) {
        Buffer operand(std::max(structured.bytes(), values_bytes + data.e[int(order)].size()));
        OK(cudaMemcpy(operand.get(), data.values.get(), values_bytes, cudaMemcpyDeviceToDevice));
        OK(cudaMemcpy(operand.bytes() + values_bytes, data.e[int(order)].get(), data.e[int(order)].size(),
                      cudaMemcpyDeviceToDevice));
        data.clear();
        LtPlan plan(lt, data.n, d_out, d_in, CUDA_R_16BF, -1, nullptr);
        OK(plan.run(operand.get(), data.x.get(), data.y(), nullptr));
        OK(cudaDeviceSynchronize());
        const auto errors = data.errors();
        printf(" %s %s (error %.3g);", order_name(order), errors.passed() ? "RIGHT" : "WRONG", errors.ours);
      }
      printf("\n");
    });
  }
  attempt("order", [&] { infer_layout(lt); });
  fflush(stdout);
}

// --------------------------------------------------------------------------------------------------------------- bench

using Launch = std::function<const char*(int set, cudaStream_t)>;

class Stream {
 public:
  Stream() { OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_;
};

class Events {
 public:
  Events() {
    OK(cudaEventCreate(&from_));
    OK(cudaEventCreate(&to_));
  }
  ~Events() {
    cudaEventDestroy(from_);
    cudaEventDestroy(to_);
  }
  cudaEvent_t from_, to_;
};

// `launches` launches in turn over the sets, captured once.
class Graph {
 public:
  Graph(const Launch& launch, int launches, int sets, cudaStream_t stream) : launches_(launches), stream_(stream) {
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    const char* error = nullptr;
    for (int i = 0; i < launches && error == nullptr; ++i) error = launch(i % sets, stream);
    cudaGraph_t graph = nullptr;
    const cudaError_t status = cudaStreamEndCapture(stream, &graph);
    if (error == nullptr && status == cudaSuccess) {
      const cudaError_t made = cudaGraphInstantiate(&executable_, graph, 0);
      cudaGraphDestroy(graph);
      OK(made);
      return;
    }
    if (graph != nullptr) cudaGraphDestroy(graph);
    ok(error, "launch");
    OK(status);
  }
  ~Graph() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  double replay() {  // milliseconds a launch
    OK(cudaEventRecord(events_.from_, stream_));
    OK(cudaGraphLaunch(executable_, stream_));
    OK(cudaEventRecord(events_.to_, stream_));
    OK(cudaEventSynchronize(events_.to_));
    float ms = 0;
    OK(cudaEventElapsedTime(&ms, events_.from_, events_.to_));
    return double(ms) / launches_;
  }

 private:
  int launches_;
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
  Events events_;
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? NAN : (v[(v.size() - 1) / 2] + v[v.size() / 2]) / 2;
}

// Weights and activations of one product, several times over: together they do not fit in L2.
template <typename T>
struct Sets {
  struct Set {
    Buffer x, values, indices, e[2], compressed, y;
  };
  std::vector<Set> sets;
  Buffer bias, spare;

  Sets(const Lt* lt, int64_t n, int64_t d_out, int64_t d_in, size_t l2_bytes) {
    const size_t one = size_t(n * (d_in + d_out)) * sizeof(T) + size_t(d_out * d_in / 2) * sizeof(T);
    const int count = int(std::min<size_t>(8, std::max<size_t>(1, (4 * l2_bytes + one - 1) / one)));
    bias = Buffer(size_t(d_out) * sizeof(T));
    fill_normal<T>(bias.get(), d_out, 99, 1.0f);
    spare = Buffer(size_t(n * d_out) * sizeof(T));
    Buffer dense;
    if (lt != nullptr) dense = Buffer(size_t(d_out * d_in) * sizeof(T));
    for (int i = 0; i < count; ++i) {
      Set s;
      s.x = Buffer(size_t(n * d_in) * sizeof(T));
      s.values = Buffer(size_t(d_out * d_in / 2) * sizeof(T));
      s.indices = Buffer(size_t(d_out * d_in / 8));
      s.y = Buffer(size_t(n * d_out) * sizeof(T));
      fill_normal<T>(s.x.get(), n * d_in, uint64_t(100 + i), 1.0f);
      fill_normal<T>(s.values.get(), d_out * d_in / 2, uint64_t(200 + i), float(std::sqrt(2.0 / double(d_in))), true);
      fill_indices(s.indices.get(), d_out * d_in / 8, uint64_t(300 + i));
      for (Metadata order : {Metadata::k128, Metadata::k64}) {
        s.e[int(order)] = Buffer(sm90::metadata_bytes(order, d_out, d_in));
        OK(sm90::build_metadata(order, s.indices.bytes(), s.e[int(order)].get(), d_out, d_in, nullptr));
      }
      if (lt != nullptr) {
        LtStructured structured(*lt, d_out, d_in, TypeOf<T>::cuda);
        s.compressed = Buffer(structured.bytes());
        expand<T>(s.values.get(), s.indices.get(), dense.get(), d_out, d_in);
        structured.compress(dense.get(), s.compressed.get());
      }
      sets.push_back(std::move(s));
    }
    OK(cudaDeviceSynchronize());
  }
  int count() const { return int(sets.size()); }
};

// The share of work that a walk adds: the scheduler rounds both directions up to whole bands of clusters.
double padding(const sm90::Config& c, int64_t n, int64_t d_out, bool* repeats) {
  const auto up = [](int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; };
  const int64_t tiles_m = up((d_out + c.tile_m - 1) / c.tile_m, c.cluster_m);
  const int64_t tiles_n = up((n + c.tile_n - 1) / c.tile_n, c.cluster_n);
  const int64_t least = std::min(tiles_m, tiles_n);
  const int swizzle = c.swizzle >= 8 && least >= 6 ? 8 : c.swizzle >= 4 && least >= 3 ? 4 : c.swizzle >= 2 && least >= 2 ? 2 : 1;
  *repeats = swizzle != c.swizzle;  // the scheduler takes a smaller one, which is measured by itself
  return double(up(tiles_m, swizzle * c.cluster_m) * up(tiles_n, swizzle * c.cluster_n)) / double(tiles_m * tiles_n);
}

struct Contender {
  std::string name;
  int id = -1;  // of the configuration or of the algorithm
  Launch launch;
  double ms = NAN;
};

struct Bench {
  const Lt* lt;
  double deadline;
  size_t l2_bytes;
  FILE* csv;

  void row(const char* stage, const char* dtype, int64_t n, int64_t d_in, int64_t d_out, const std::string& name, double ms,
           int replays, int launches) const {
    if (csv == nullptr) return;
    fprintf(csv, "%s,%s,%lld,%lld,%lld,%s,%.6f,%d,%d\n", stage, dtype, (long long)n, (long long)d_in, (long long)d_out,
            name.c_str(), ms, replays, launches);
    fflush(csv);
  }

  template <typename T>
  void shape(int64_t n, int64_t d_in, int64_t d_out, bool small) const {
    const std::string place = text("n %5lld  %5lld -> %5lld", (long long)n, (long long)d_in, (long long)d_out);
    if (now() > deadline) {
      printf("%s  SKIP out of time\n", place.c_str());
      return;
    }
    attempt(place, [&] { measure<T>(place, n, d_in, d_out, small); });
    fflush(stdout);
  }

  template <typename T>
  void measure(const std::string& place, int64_t n, int64_t d_in, int64_t d_out, bool small) const {
    constexpr Dtype dtype = TypeOf<T>::dtype;
    Sets<T> data(lt, n, d_out, d_in, l2_bytes);
    Stream stream;
    const double flops = 2.0 * double(n) * double(d_in) * double(d_out);
    const double bytes = double(n) * double(d_in + d_out) * 2 + double(d_in) * double(d_out) * 1.125;
    const double guess = std::max(flops / 7e11, bytes / 3e9) + 0.004;  // ms
    const int few = std::max(data.count(), std::min(20, int(0.3 / guess) + 1));

    const auto screen = [&](Contender& c, const char* stage) {
      Graph graph(c.launch, few, data.count(), stream.get());
      graph.replay();
      std::vector<double> times;
      for (int i = 0; i < 3; ++i) times.push_back(graph.replay());
      c.ms = median(times);
      row(stage, TypeOf<T>::name, n, d_in, d_out, c.name, c.ms, 3, few);
    };

    // cuSPARSELt: all algorithms. The plans stay for the final round.
    std::vector<std::unique_ptr<LtPlan>> plans;
    Contender best_lt;
    int algorithms = 0, refused = 0;
    if (lt != nullptr) {
      int last = 0;
      try {
        last = LtPlan(*lt, n, d_out, d_in, TypeOf<T>::cuda, -1, nullptr).max_algorithm();
      } catch (const std::exception& error) {
        printf("%s  cuSPARSELt: %s\n", place.c_str(), error.what());
        last = 0;
      }
      for (int id = 0; id <= last && id < 200; ++id) {
        try {
          plans.push_back(std::make_unique<LtPlan>(*lt, n, d_out, d_in, TypeOf<T>::cuda, id, nullptr));
          const LtPlan* plan = plans.back().get();
          Contender c{text("cuSPARSELt id %d", id), id, [plan, &data](int set, cudaStream_t s) {
                        auto& one = data.sets[size_t(set)];
                        return plan->run(one.compressed.get(), one.x.get(), one.y.get(), s);
                      }};
          screen(c, "screen");
          ++algorithms;
          if (std::isnan(best_lt.ms) || c.ms < best_lt.ms) best_lt = c;
        } catch (const std::exception&) {  // the last id is exclusive in some versions, and not all take all shapes
          ++refused;
          recover();
        }
      }
    }

    // Ours: the best walk of each kernel.
    std::vector<Contender> kernels;
    for (int id = 0; id < sm90::config_count(); ++id) {
      const sm90::Config& c = sm90::config(id);
      bool repeats = false;
      const double share = padding(c, n, d_out, &repeats);
      if (repeats || (c.swizzle > 1 && share > 1.1)) continue;
      if ((!small && c.tile_n <= 64) || is_left_out(c.kernel)) continue;
      Contender contender{config_name(id), id, [id, n, d_out, d_in, &data](int set, cudaStream_t s) {
                            auto& one = data.sets[size_t(set)];
                            return sm90::run(id, Epilogue::none, dtype, one.x.get(), one.values.get(),
                                             one.e[int(sm90::config(id).metadata)].get(), nullptr, one.y.get(), nullptr,
                                             n, d_out, d_in, nullptr, s);
                          }};
      const bool done = attempt(place + " " + contender.name, [&] { screen(contender, "screen"); });
      if (!done) continue;
      if (kernels.empty() || sm90::config(kernels.back().id).kernel != c.kernel) {
        kernels.push_back(contender);
      } else if (contender.ms < kernels.back().ms) {
        kernels.back() = contender;
      }
    }
    if (kernels.empty()) return;
    std::sort(kernels.begin(), kernels.end(), [](const Contender& a, const Contender& b) { return a.ms < b.ms; });

    // The final round: replays in turn, so that all meet the same clocks.
    std::vector<Contender> finals;
    if (!std::isnan(best_lt.ms)) finals.push_back(best_lt);
    for (size_t i = 0; i < kernels.size() && i < 3; ++i) finals.push_back(kernels[i]);
    const int fastest = kernels[0].id;
    finals.push_back({config_name(fastest) + " bias", fastest, [fastest, n, d_out, d_in, &data](int set, cudaStream_t s) {
                        auto& one = data.sets[size_t(set)];
                        return sm90::run(fastest, Epilogue::bias, dtype, one.x.get(), one.values.get(),
                                         one.e[int(sm90::config(fastest).metadata)].get(), data.bias.get(), one.y.get(),
                                         nullptr, n, d_out, d_in, nullptr, s);
                      }});
    const bool hurry = now() > deadline;
    const int launches = std::max(data.count(), hurry ? 3 : 10), replays = hurry ? 5 : 20;
    std::vector<std::unique_ptr<Graph>> graphs;
    for (const Contender& c : finals) {
      graphs.push_back(std::make_unique<Graph>(c.launch, launches, data.count(), stream.get()));
      graphs.back()->replay();
    }
    std::vector<std::vector<double>> times(finals.size());
    for (int i = 0; i < replays; ++i) {
      for (size_t k = 0; k < finals.size(); ++k) times[k].push_back(graphs[k]->replay());
    }
    const double lt_ms = std::isnan(best_lt.ms) ? NAN : median(times[0]);
    printf("%s  %s  %d sets, %dx%d", place.c_str(), TypeOf<T>::name, data.count(), replays, launches);
    if (lt != nullptr) printf(", %d algorithms (%d refused)", algorithms, refused);
    for (size_t k = 0; k < finals.size(); ++k) {
      const double ms = median(times[k]);
      printf(" | %s %.4f ms %.0f TF", finals[k].name.c_str(), ms, flops / ms / 1e9);
      if (!(k == 0 && !std::isnan(best_lt.ms))) printf(" %.3fx", lt_ms / ms);
      row("final", TypeOf<T>::name, n, d_in, d_out, finals[k].name, ms, replays, launches);
    }
    if (!std::isnan(best_lt.ms)) {  // does the fastest agree with cuSPARSELt at this size
      Buffer largest(sizeof(unsigned));
      OK(cudaMemset(largest.get(), 0, sizeof(unsigned)));
      OK(cudaDeviceSynchronize());
      OK(best_lt.launch(0, stream.get()));
      OK(cudaStreamSynchronize(stream.get()));
      OK(cudaMemcpy(data.spare.get(), data.sets[0].y.get(), data.spare.size(), cudaMemcpyDeviceToDevice));
      OK(cudaMemset(data.sets[0].y.get(), 0xff, data.spare.size()));
      OK(cudaDeviceSynchronize());  // the streams here do not wait for the default one
      OK(kernels[0].launch(0, stream.get()));
      OK(cudaStreamSynchronize(stream.get()));
      difference_kernel<T><<<std::min(grid(n * d_out), 1056u), 256>>>(static_cast<const T*>(data.sets[0].y.get()),
                                                     static_cast<const T*>(data.spare.get()), n * d_out,
                                                     static_cast<unsigned*>(largest.get()));
      OK(cudaGetLastError());
      float difference = 0;
      OK(cudaMemcpy(&difference, largest.get(), sizeof(float), cudaMemcpyDeviceToHost));
      printf(" | differ by %.3g at most", difference);
      if (!(difference < 0.1f)) fail(place + ": differs from cuSPARSELt");
    }
    printf("\n    screened:");
    if (!std::isnan(best_lt.ms)) printf(" %s %.4f", best_lt.name.c_str(), best_lt.ms);
    for (const Contender& c : kernels) printf(" | %s %.4f %.3fx", c.name.c_str(), c.ms, best_lt.ms / c.ms);
    printf("\n");
  }

  // What a call costs the host, with the device kept out of the way by a tiny product.
  void host() const {
    attempt("host time", [&] {
      using T = __nv_bfloat16;
      Case<T> data(16, 256, 256, 5);
      Stream stream;
      const auto time = [&](const char* name, const std::function<const char*()>& call) {
        std::vector<double> times;
        for (int round = 0; round < 9; ++round) {
          const double start = now();
          for (int i = 0; i < 100; ++i) OK(call());
          times.push_back((now() - start) * 1e6 / 100);
          OK(cudaStreamSynchronize(stream.get()));
        }
        printf("host: %s %.2f us a call\n", name, median(times));
        row("host_us", "bf16", 16, 256, 256, name, median(times), 9, 100);
      };
      for (int id = 0; id < sm90::config_count(); id += sm90::config_count() / sm90::kernel_count()) {
        if (is_left_out(sm90::config(id).kernel)) continue;
        time(sm90::config(id).name, [&] {
          return sm90::run(id, Epilogue::none, Dtype::bf16, data.x.get(), data.values.get(),
                           data.e[int(sm90::config(id).metadata)].get(), nullptr, data.y(), nullptr, data.n, data.d_out,
                           data.d_in, nullptr, stream.get());
        });
      }
      if (lt != nullptr) {
        Buffer dense(size_t(data.d_out * data.d_in) * sizeof(T));
        expand<T>(data.values.get(), data.indices.get(), dense.get(), data.d_out, data.d_in);
        LtStructured structured(*lt, data.d_out, data.d_in, CUDA_R_16BF);
        Buffer compressed(structured.bytes());
        structured.compress(dense.get(), compressed.get());
        LtPlan plan(*lt, data.n, data.d_out, data.d_in, CUDA_R_16BF, -1, nullptr);
        time("cusparseLtMatmul (plan kept)",
             [&] { return plan.run(compressed.get(), data.x.get(), data.y(), stream.get()); });
      }
    });
  }

  void large() const {
    printf("== bench: TF counts the dense product's operations; x is cuSPARSELt's time over ours\n");
    host();
    const int64_t shapes[][3] = {
        // tokens, d_in, d_out; with the exchanged ones that the backward pass needs
        {32768, 768, 768},   {32768, 768, 2304},  {32768, 2304, 768},   {32768, 768, 3072},   {32768, 3072, 768},
        {32768, 1024, 1024}, {32768, 1024, 3072}, {32768, 3072, 1024},  {32768, 1024, 4096},  {32768, 4096, 1024},
        {16384, 1536, 1536}, {16384, 1536, 4608}, {16384, 4608, 1536},  {16384, 1536, 6144},  {16384, 6144, 1536},
        {16384, 4096, 4096}, {16384, 4096, 14336}, {16384, 14336, 4096}, {16384, 5120, 5120}, {16384, 5120, 20480},
        {16384, 20480, 5120}, {8192, 9216, 9216}, {8192, 9216, 36864},  {8192, 36864, 9216}};
    for (const auto& s : shapes) shape<__nv_bfloat16>(s[0], s[1], s[2], false);
    shape<__half>(32768, 1024, 4096, false);
    shape<__half>(16384, 4096, 4096, false);
  }

  // The fused epilogues of the library's kernels beside what they replace: the best of the same kernels, then a pass. Both by
  // their best walk. `x` is the time of those two over the fused one's.
  template <typename T>
  void measure_fused(const std::string& place, int64_t n, int64_t d_in, int64_t d_out) const {
    constexpr Dtype dtype = TypeOf<T>::dtype;
    Sets<T> data(nullptr, n, d_out, d_in, l2_bytes);
    std::vector<Buffer> aux;
    for (int i = 0; i < data.count(); ++i) {
      aux.emplace_back(size_t(n * d_out) * sizeof(T));
      fill_normal<T>(aux.back().get(), n * d_out, uint64_t(400 + i), 1.0f);
    }
    OK(cudaDeviceSynchronize());
    Stream stream;
    const int64_t eighths = n * d_out / 8;  // d_out is a multiple of 16
    const unsigned blocks = unsigned(std::min<int64_t>((eighths + 255) / 256, 1 << 20));

    const auto product = [&](int id, Epilogue epilogue, bool into_aux) -> Launch {
      return [=, &data, &aux](int set, cudaStream_t s) {
        auto& one = data.sets[size_t(set)];
        void* second = aux[size_t(set)].get();
        return sm90::run(id, epilogue, dtype, one.x.get(), one.values.get(), one.e[int(sm90::config(id).metadata)].get(),
                         data.bias.get(), into_aux ? second : one.y.get(), into_aux ? nullptr : second, n, d_out, d_in,
                         nullptr, s);
      };
    };
    const auto pass = [&](Epilogue epilogue) -> Launch {
      return [=, &data, &aux](int set, cudaStream_t s) -> const char* {
        auto* y = static_cast<Eight<T>*>(data.sets[size_t(set)].y.get());
        auto* other = static_cast<Eight<T>*>(aux[size_t(set)].get());
        switch (epilogue) {
          case Epilogue::bias_gelu:
            gelu_pass_kernel<T, sm90::ErfGelu><<<blocks, 256, 0, s>>>(other, y, eighths);
            break;
          case Epilogue::bias_gelu_tanh:
            gelu_pass_kernel<T, sm90::TanhGelu><<<blocks, 256, 0, s>>>(other, y, eighths);
            break;
          case Epilogue::gelu_gradient:
            gradient_pass_kernel<T, sm90::ErfGelu><<<blocks, 256, 0, s>>>(y, other, eighths);
            break;
          default:
            gradient_pass_kernel<T, sm90::TanhGelu><<<blocks, 256, 0, s>>>(y, other, eighths);
        }
        const cudaError_t status = cudaGetLastError();
        return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
      };
    };
    // The best walk of each of the library's kernels.
    const auto search = [&](Epilogue epilogue, bool into_aux, const char* label) {
      std::vector<Contender> kernels;
      const int few = std::max(data.count(), 2);
      for (int id = 0; id < sm90::config_count(); ++id) {
        const sm90::Config& c = sm90::config(id);
        bool repeats = false;
        const double share = padding(c, n, d_out, &repeats);
        if (repeats || (c.swizzle > 1 && share > 1.1)) continue;
        if (is_left_out(c.kernel) || sm90::fused_stages(id, kFused[0]) == 0) continue;
        Contender contender{config_name(id) + " " + label, id, product(id, epilogue, into_aux)};
        const bool done = attempt(place + " " + contender.name, [&] {
          Graph graph(contender.launch, few, data.count(), stream.get());
          graph.replay();
          contender.ms = median({graph.replay(), graph.replay(), graph.replay()});
          row("screen", TypeOf<T>::name, n, d_in, d_out, contender.name, contender.ms, 3, few);
        });
        if (!done) continue;
        if (kernels.empty() || sm90::config(kernels.back().id).kernel != c.kernel) {
          kernels.push_back(contender);
        } else if (contender.ms < kernels.back().ms) {
          kernels.back() = contender;
        }
      }
      std::sort(kernels.begin(), kernels.end(), [](const Contender& a, const Contender& b) { return a.ms < b.ms; });
      return kernels;
    };

    for (bool forward : {true, false}) {
      const auto plain = search(forward ? Epilogue::bias : Epilogue::none, forward, forward ? "bias" : "none");
      if (plain.empty()) return;
      for (Epilogue epilogue : kFused) {
        if (is_forward(epilogue) != forward) continue;
        const auto fused = search(epilogue, false, fused_name(epilogue));
        const Launch first = plain[0].launch, second = pass(epilogue);
        std::vector<Contender> finals = {plain[0],
                                         {plain[0].name + " + pass " + fused_name(epilogue), -1,
                                          [first, second](int set, cudaStream_t s) {
                                            const char* error = first(set, s);
                                            return error != nullptr ? error : second(set, s);
                                          }}};
        finals.insert(finals.end(), fused.begin(), fused.end());
        const int launches = std::max(data.count(), 5), replays = 10;
        std::vector<std::unique_ptr<Graph>> graphs;
        for (const Contender& c : finals) {
          graphs.push_back(std::make_unique<Graph>(c.launch, launches, data.count(), stream.get()));
          graphs.back()->replay();
        }
        std::vector<std::vector<double>> times(finals.size());
        for (int i = 0; i < replays; ++i) {
          for (size_t k = 0; k < finals.size(); ++k) times[k].push_back(graphs[k]->replay());
        }
        printf("%s  %s  %-18s", place.c_str(), TypeOf<T>::name, fused_name(epilogue));
        const double two = median(times[1]);
        for (size_t k = 0; k < finals.size(); ++k) {
          const double ms = median(times[k]);
          if (k == 1) {
            printf(" | + pass %.4f", ms);
          } else if (k == 0) {
            printf(" | %s %.4f", finals[k].name.c_str(), ms);
          } else {
            printf(" | %s %d stages %.4f %.3fx", config_name(finals[k].id).c_str(), sm90::fused_stages(finals[k].id, epilogue),
                   ms, two / ms);
          }
          row("fused", TypeOf<T>::name, n, d_in, d_out, finals[k].name, ms, replays, launches);
        }
        // At this size, too, they must agree; the backward pass needs its aux as it was for both.
        if (!fused.empty()) {
          Buffer largest(sizeof(unsigned));
          OK(cudaMemset(largest.get(), 0, sizeof(unsigned)));
          fill_normal<T>(aux[0].get(), n * d_out, 400, 1.0f);
          OK(cudaDeviceSynchronize());
          OK(finals[1].launch(0, stream.get()));
          OK(cudaStreamSynchronize(stream.get()));
          OK(cudaMemcpy(data.spare.get(), data.sets[0].y.get(), data.spare.size(), cudaMemcpyDeviceToDevice));
          OK(cudaMemset(data.sets[0].y.get(), 0xff, data.spare.size()));
          OK(cudaDeviceSynchronize());
          OK(fused[0].launch(0, stream.get()));
          OK(cudaStreamSynchronize(stream.get()));
          difference_kernel<T><<<std::min(grid(n * d_out), 1056u), 256>>>(
              static_cast<const T*>(data.sets[0].y.get()), static_cast<const T*>(data.spare.get()), n * d_out,
              static_cast<unsigned*>(largest.get()));
          OK(cudaGetLastError());
          float difference = 0;
          OK(cudaMemcpy(&difference, largest.get(), sizeof(float), cudaMemcpyDeviceToHost));
          printf(" | differ by %.3g at most", difference);
          if (!(difference < 0.1f)) fail(place + " " + fused_name(epilogue) + ": differs from two steps");
        }
        printf("\n");
      }
    }
  }

  void fused() const {
    printf("== fused: ms; x is the time of product and pass over the fused kernel's\n");
    // tokens, d_in, d_out: forward the up projection, backward the down projection's gradient, of the same shape
    const int64_t shapes[][3] = {{32768, 768, 3072}, {32768, 1024, 4096}, {16384, 1536, 6144}};
    for (const auto& s : shapes) {
      const std::string place = text("n %5lld  %5lld -> %5lld", (long long)s[0], (long long)s[1], (long long)s[2]);
      if (now() > deadline) {
        printf("%s  SKIP out of time\n", place.c_str());
        continue;
      }
      attempt(place, [&] { measure_fused<__nv_bfloat16>(place, s[0], s[1], s[2]); });
      fflush(stdout);
    }
  }

  void few_tokens() const {
    printf("== bench-small: few tokens\n");
    for (const auto& s : {std::pair<int64_t, int64_t>{4096, 14336}, {14336, 4096}}) {
      for (int64_t n : {8, 16, 64, 128, 512}) shape<__nv_bfloat16>(n, s.first, s.second, true);
    }
  }
};

int run_part(const std::string& part, const std::string& path, double deadline) {
  cudaDeviceProp properties{};
  cudaError_t status = cudaSetDevice(0);
  if (status == cudaSuccess) status = cudaGetDeviceProperties(&properties, 0);
  if (status != cudaSuccess) {
    printf("FAIL no device: %s\n", cudaGetErrorString(status));
    return 1;
  }
  printf("%s, %d multiprocessors, L2 %d MiB; ", properties.name, properties.multiProcessorCount,
         properties.l2CacheSize >> 20);
  if (const char* reason = sm90::can_run(0, Epilogue::none, 16, 64, 64, Dtype::bf16)) {
    printf("FAIL %s\n", reason);
    return 1;
  }
  const Lt* lt = load_lt(path);
  FILE* csv = nullptr;
  if (const char* out = getenv("OUT")) {
    csv = fopen((std::string(out) + "/sm90.csv").c_str(), "a");
    if (csv != nullptr && ftell(csv) == 0) fprintf(csv, "stage,dtype,tokens,d_in,d_out,name,ms,replays,launches\n");
  }
  const Bench bench{lt, deadline, size_t(properties.l2CacheSize), csv};
  const double begin = now();
  if (part == "check") attempt(part, [] { check(); });
  if (part == "layout") attempt(part, [&] { layout(lt); });
  if (part == "bench") attempt(part, [&] { bench.large(); });
  if (part == "fused") attempt(part, [&] { bench.fused(); });
  if (part == "bench-small") attempt(part, [&] { bench.few_tokens(); });
  printf("-- %s: %d failures, %.1f s\n", part.c_str(), failures, now() - begin);
  if (csv != nullptr) fclose(csv);
  fflush(stdout);
  return std::min(failures, 99);
}

}  // namespace

int main(int count, char** arguments) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const double start = now();
  std::vector<std::string> parts;
  std::string path;
  double seconds = 80;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--seconds" && i + 1 < count) {
      seconds = atof(arguments[++i]);
    } else if (argument == "--cusparselt" && i + 1 < count) {
      path = arguments[++i];
    } else if (argument == "--without" && i + 1 < count) {
      left_out.push_back(atoi(arguments[++i]));
    } else if (argument == "check" || argument == "layout" || argument == "bench" || argument == "bench-small" ||
               argument == "fused") {
      parts.push_back(argument);
    } else {
      fprintf(stderr,
              "usage: %s [check] [layout] [bench] [bench-small] [fused] [--seconds S] [--cusparselt PATH] "
              "[--without KERNEL]\n",
              arguments[0]);
      return 100;
    }
  }
  if (parts.empty()) parts = {"check", "layout", "bench", "bench-small"};
  int worst = 0;
  for (const std::string& part : parts) {
    fflush(stdout);
    const pid_t child = fork();  // before any call of CUDA in this process
    if (child == 0) _exit(run_part(part, path, start + seconds));
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) {
      printf("FAIL %s: no process\n", part.c_str());
      worst = 99;
    } else if (!WIFEXITED(status)) {
      printf("FAIL %s: ended by signal %d\n", part.c_str(), WTERMSIG(status));
      worst = 99;
    } else {
      worst = std::max(worst, WEXITSTATUS(status));
    }
  }
  printf("%s, %.1f s\n", worst == 0 ? "PASS" : "FAIL", now() - start);
  return worst;
}
