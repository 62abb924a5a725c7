// The CUTLASS kernels behind torch tensors. Without them (no SLOPE_WITH_SM90) everything here raises.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace slope {

// What follows a product, in the numbers of sm90::Epilogue.
enum class After : int32_t { nothing, bias, gelu, gelu_tanh, gelu_gradient, gelu_gradient_tanh };

// y (n, d_out) = x (n, d_in) W^T, and what follows. x and y contiguous; n at least 1.
void multiply_sm90(const torch::stable::Tensor& x, const torch::stable::Tensor& operand, const void* bias, void* y,
                   void* aux, int64_t n, int64_t d_out, int64_t d_in, int64_t config, After after);

// How many configurations there are; 0 without the kernels.
int64_t sm90_configs();

// Bytes of metadata after the values; write_sm90_metadata() fills them.
int64_t sm90_metadata_bytes(int64_t d_out, int64_t d_in);
void write_sm90_metadata(const torch::stable::Tensor& indices, void* metadata, int64_t rows, int64_t columns);

}  // namespace slope
