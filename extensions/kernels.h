// The CUDA kernels of slope_pl, free of torch: plain pointers, a stream, an error code.
//
// Shapes: W is (d_out, d_in), both multiples of 8. `values` (d_out, d_in / 2); `indices` (d_out, d_in / 8) bytes and
// `backward_indices` (d_in, d_out / 8) bytes, two groups of four a byte, low nibble first, `first | second << 2`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace slope {

enum class Dtype : int32_t { f32, bf16, f16 };

// values -> what the two products multiply, in one pass. Either output may be null. `forward_values` (d_out, d_in / 2) are
// the values in the 16-bit dtype `to`; `backward_values` (d_in, d_out / 2) the slots of the double-pruned transpose, +0.0
// in filler slots.
cudaError_t refresh(const void* values, Dtype from, const uint8_t* indices, const uint8_t* backward_indices,
                    void* forward_values, void* backward_values, Dtype to, int64_t d_out, int64_t d_in,
                    cudaStream_t stream);

// The re-setup's choice of columns: `chosen` (d_in, d_out / 8). With `previous` (may be null), counts[0] grows by the
// entries of the new backward mask that the old one lacked, counts[1] by those of the old one.
cudaError_t choose_columns(const void* values, Dtype dtype, const uint8_t* indices, const uint8_t* previous,
                           uint8_t* chosen, int64_t* counts, int64_t d_out, int64_t d_in, cudaStream_t stream);

// (rows, columns) of a 16-bit dtype: 1.0 at both positions of every group, +0.0 elsewhere.
cudaError_t write_markers(const uint8_t* indices, void* dense, Dtype dtype, int64_t rows, int64_t columns,
                          cudaStream_t stream);

// cuSPARSELt's metadata of a 2:4 matrix (rows, columns) on Hopper, without the library. `metadata_bytes` is what is written;
// the library's own size may be padded beyond it.
size_t metadata_bytes(int64_t rows, int64_t columns);
cudaError_t write_metadata(const uint8_t* indices, void* metadata, int64_t rows, int64_t columns, cudaStream_t stream);

// dense (rows, columns) -> its kept entries (rows, columns / 2), cast.
cudaError_t select_kept(const void* dense, Dtype from, const uint8_t* indices, void* kept, Dtype to, int64_t rows,
                        int64_t columns, cudaStream_t stream);

}  // namespace slope
