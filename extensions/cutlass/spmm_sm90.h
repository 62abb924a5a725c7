// Y (n, d_out) = X (n, d_in) W^T + bias on Hopper, W 2:4 sparse: a second implementation beside cuSPARSELt, made of CUTLASS's
// sparse warpgroup kernels. Plain C++: no torch and no CUTLASS types here.
//
// All matrices are row-major, X and Y bf16 or fp16. W (d_out, d_in) is stored as `values` (d_out, d_in / 2), which the kernels
// read as it is, and as `e`, the metadata that build_metadata() makes of `indices` (d_out, d_in / 8): two groups of four a
// byte, low nibble first, `first | second << 2`. The gradient of X is the same product with the pruned W^T for W, d_in and
// d_out exchanged.
//
// Every function may be called from several threads. None synchronizes, and run() and build_metadata() may be captured in a
// CUDA graph: what they keep (attributes of kernels and devices) is set on first use and is the same whoever sets it.
// Reasons and errors are strings that live as long as the program; nullptr means success.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace slope::sm90 {

enum class Dtype : int32_t { bf16, f16 };

enum class Epilogue : int32_t {
  none,  // Y = X W^T
  bias,  // Y = X W^T + bias, bias (d_out) in the dtype of Y, added in float
  // Fused activations, for the kernels that fuses() names. The aux (n, d_out) has the dtype of Y.
  bias_gelu,       // aux = X W^T + bias as `bias` rounds it, Y = gelu(aux), the one with erf; no aux where it is null
  bias_gelu_tanh,  // the same with PyTorch's approximate="tanh"
  gelu_gradient,   // Y = (X W^T) * gelu'(aux), rounded once
  gelu_gradient_tanh,
};

// Order of the bytes of the metadata: it follows the depth of a kernel's tile. Kernels of one depth share one operand.
enum class Metadata : int32_t { k128, k64 };

// In which direction neighbouring blocks walk over Y: along the features (M) or along the tokens (N).
enum class Raster : int32_t { along_m, along_n };

// A kernel and how it walks. M is d_out, N the tokens, K d_in. `swizzle` (1, 2, 4, 8): blocks run in bands of that many
// clusters, so that what they read together is nearer to a square.
struct Config {
  int kernel;
  const char* name;  // of the kernel: tile, schedule, cluster
  int tile_m, tile_n, tile_k, cluster_m, cluster_n;
  bool pingpong;  // two warpgroups take turns at whole tiles; otherwise both share one tile
  int stages;
  Metadata metadata;
  Raster raster;
  int swizzle;
};

int config_count();
int kernel_count();
const Config& config(int id);  // ids of one kernel are neighbours

// Bytes of `e`: d_out rounded up to 64, times d_in rounded up to the depth of the order (128 or 64), over 8.
size_t metadata_bytes(Metadata order, int64_t d_out, int64_t d_in);

// `e` needs 16-byte alignment. Entries beyond d_out and d_in are valid (positions 0 and 1) and meet zeros.
const char* build_metadata(Metadata order, const uint8_t* indices, void* e, int64_t d_out, int64_t d_in,
                           cudaStream_t stream);

// Why a call of this kind cannot run on the current device, or nullptr. d_out and d_in: multiples of 16; n: any, 1 or more.
const char* can_run(int config_id, Epilogue epilogue, int64_t n, int64_t d_out, int64_t d_in, Dtype dtype);

// Bytes of scratch that run() needs (0 for every configuration there is today; ask all the same).
size_t workspace_bytes(int config_id, Epilogue epilogue, int64_t n, int64_t d_out, int64_t d_in, Dtype dtype);

// Stages of the main loop with a fused epilogue (bias_gelu and later), 0 where a configuration has none.
int fused_stages(int config_id, Epilogue epilogue);

// x, values, e and y need 16-byte alignment. `bias` is read by Epilogue::bias and bias_gelu; `aux` is for the fused epilogues
// (written by bias_gelu unless null, read by gelu_gradient; 16-byte alignment, apart from y).
const char* run(int config_id, Epilogue epilogue, Dtype dtype, const void* x, const void* values, const void* e,
                const void* bias_or_null, void* y, void* aux_or_null, int64_t n, int64_t d_out, int64_t d_in,
                void* workspace, cudaStream_t stream);

}  // namespace slope::sm90
