// The kept entries of a dense matrix, at memory speed; see README.md here.
#include "../device.cuh"

namespace slope {
namespace {

template <typename From, typename To>
__global__ void select_kernel(const Eight<From>* __restrict__ dense, const uint8_t* __restrict__ indices,
                              Four<To>* __restrict__ kept, int64_t bytes) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += int64_t(gridDim.x) * blockDim.x) {
    const Eight<From> eight = dense[i];
    const unsigned byte = indices[i];
    const Pair a = low_group(byte), b = high_group(byte);
    Four<To> four;
    four.v[0] = cast<To>(pick(eight.v, a.first));
    four.v[1] = cast<To>(pick(eight.v, a.second));
    four.v[2] = cast<To>(pick(eight.v + 4, b.first));
    four.v[3] = cast<To>(pick(eight.v + 4, b.second));
    kept[i] = four;
  }
}

}  // namespace

cudaError_t select_kept(const void* dense, Dtype from, const uint8_t* indices, void* kept, Dtype to, int64_t rows,
                        int64_t columns, cudaStream_t stream) {
  const int64_t bytes = rows * (columns / 8);
  if (bytes == 0) return cudaSuccess;
  return with_float(from, [&](auto source) {
    return with_float(to, [&](auto target) {
      using From = decltype(source);
      using To = decltype(target);
      select_kernel<From, To><<<blocks_for(bytes, 256), 256, 0, stream>>>(
          static_cast<const Eight<From>*>(dense), indices, static_cast<Four<To>*>(kept), bytes);
      return cudaGetLastError();
    });
  });
}

}  // namespace slope
