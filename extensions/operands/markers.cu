// The marker matrix that metadata is taken from: 1.0 wherever a group keeps an entry, whatever its value is.
#include "../device.cuh"

namespace slope {
namespace {

template <typename T>
__global__ void markers_kernel(const uint8_t* __restrict__ indices, Eight<T>* __restrict__ dense, int64_t bytes) {
  const T one = T(1.0f);
  const Four<T> ones{{one, one, one, one}};
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += int64_t(gridDim.x) * blockDim.x) {
    dense[i] = spread(ones, indices[i], zero<T>());
  }
}

}  // namespace

cudaError_t write_markers(const uint8_t* indices, void* dense, Dtype dtype, int64_t rows, int64_t columns,
                          cudaStream_t stream) {
  const int64_t bytes = rows * (columns / 8);
  if (bytes == 0) return cudaSuccess;
  return with_16_bit(dtype, [&](auto sample) {
    using T = decltype(sample);
    markers_kernel<T><<<blocks_for(bytes, 256), 256, 0, stream>>>(indices, static_cast<Eight<T>*>(dense), bytes);
    return cudaGetLastError();
  });
}

}  // namespace slope
