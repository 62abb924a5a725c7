// What the operations of library.cpp share: checks of their arguments, devices, streams and memory, through torch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "spmm/session.h"

// Absent from a torch without CUDA, where nothing below can be reached.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using slope::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A 16-byte boundary: what the kernels' vector accesses and cuSPARSELt's descriptors count on.
bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

Dtype dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, name, ": dtype ", name_of(dtype), ", expected Float, BFloat16 or Half");
  }
}

cudaDataType cuda_type_of(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name, ": dtype ", name_of(dtype),
                  ", cuSPARSELt multiplies BFloat16 and Half here");
  return dtype == ScalarType::BFloat16 ? CUDA_R_16BF : CUDA_R_16F;
}

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check_plain(const Tensor& tensor, const char* name, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == beside.get_device_index(), name,
                  ": all tensors must be on the same CUDA device");
  STD_TORCH_CHECK(tensor.is_contiguous() && aligned(tensor.const_data_ptr()), name, " of shape ", shape_of(tensor),
                  ": must be contiguous and start on a 16-byte boundary");
}

void check_indices(const Tensor& indices, const char* name, int64_t rows, int64_t columns, const Tensor& beside) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Byte && indices.dim() == 2 && indices.size(0) == rows &&
                      indices.size(1) * 8 == columns,
                  name, ": ", name_of(indices.scalar_type()), " of shape ", shape_of(indices),
                  ", expected Byte of shape (", rows, ", ", columns / 8, ")");
  check_plain(indices, name, beside);
}

// Kept values (d_out, d_in / 2); returns {d_out, d_in}.
std::pair<int64_t, int64_t> check_values(const Tensor& values, const Tensor& indices) {
  STD_TORCH_CHECK(values.dim() == 2, "values: shape ", shape_of(values), ", expected (d_out, d_in / 2)");
  const int64_t d_out = values.size(0), d_in = values.size(1) * 2;
  STD_TORCH_CHECK(d_out % 8 == 0 && d_in % 8 == 0, "values: shape ", shape_of(values),
                  ": d_out and d_in must be multiples of 8");
  check_plain(values, "values", values);
  check_indices(indices, "indices", d_out, d_in, values);
  return {d_out, d_in};
}

// Runs `body` and turns what it throws into torch's exception.
template <typename F>
auto guarded(F&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::runtime_error& error) {
    STD_TORCH_CHECK(false, error.what());
  }
}

slope::Session& session_of(const Tensor& tensor) { return slope::Session::current(tensor.get_device_index()); }

// Makes a tensor's device the current one; costs next to nothing where it is already.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) {
    int32_t current = -1;
    const int32_t wanted = tensor.get_device_index();
    STD_TORCH_CHECK(aoti_torch_get_current_device_index(&current) == 0, "no current device");
    if (current != wanted) guard_.emplace(wanted);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// A new contiguous tensor. Not torch::stable::new_empty, which looks the operation up by name at every call.
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle result = nullptr;
  // The exception's type is lost on its way through the stable interface; Lightning knows this one by its words.
  STD_TORCH_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                           aoti_torch_device_type_cuda(), like.get_device_index(), &result) == 0,
                  "CUDA out of memory: slope_pl found none for a tensor of ",
                  shape.empty() ? 1 : shape[0] * strides[0], " elements");
  return Tensor(result);
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  STD_TORCH_CHECK(aoti_torch_get_dtype(tensor.get(), &code) == 0, "no dtype");
  return code;
}

Tensor scratch(size_t bytes, const Tensor& like) {
  return new_tensor(like, {int64_t(bytes)}, aoti_torch_dtype_uint8());
}

}  // namespace
