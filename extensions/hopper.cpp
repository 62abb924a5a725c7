// The CUTLASS kernels as torch.ops.slope_cuda.*: what they alone can do, activations in the epilogue of a product.

#include "hopper.h"

#include <tuple>
#include <vector>

#include "tensors.h"
#if defined(SLOPE_WITH_SM90)
#include "cutlass/spmm_sm90.h"
#endif

namespace slope {

#if defined(SLOPE_WITH_SM90)
namespace {

constexpr auto kOrder = sm90::Metadata::k64;  // of all kernels in the library

void check_reason(const char* reason, const char* what) { STD_TORCH_CHECK(reason == nullptr, what, ": ", reason); }

static_assert(int(After::bias) == int(sm90::Epilogue::bias) && int(After::gelu) == int(sm90::Epilogue::bias_gelu) &&
              int(After::gelu_gradient_tanh) == int(sm90::Epilogue::gelu_gradient_tanh));

}  // namespace

void multiply_sm90(const Tensor& x, const Tensor& operand, const void* bias, void* y, void* aux, int64_t n, int64_t d_out,
                   int64_t d_in, int64_t config, After after) {
  const size_t values = size_t(d_out * d_in), bytes = values + sm90::metadata_bytes(kOrder, d_out, d_in);
  STD_TORCH_CHECK(size_t(operand.numel()) * 2 >= bytes, "spmm: operand has ", operand.numel(), " elements, expected ",
                  bytes / 2, " for W (", d_out, ", ", d_in, ") and a CUTLASS kernel");
  const auto dtype = x.scalar_type() == ScalarType::BFloat16 ? sm90::Dtype::bf16 : sm90::Dtype::f16;
  const auto* data = static_cast<const char*>(operand.const_data_ptr());
  check_reason(sm90::run(int(config), sm90::Epilogue(int(after)), dtype, x.const_data_ptr(), data, data + values, bias, y,
                         aux, n, d_out, d_in, nullptr, current_stream(x)),
               "spmm");
}

int64_t sm90_configs() { return sm90::config_count(); }

int64_t sm90_metadata_bytes(int64_t d_out, int64_t d_in) { return int64_t(sm90::metadata_bytes(kOrder, d_out, d_in)); }

void write_sm90_metadata(const Tensor& indices, void* metadata, int64_t rows, int64_t columns) {
  check_reason(sm90::build_metadata(kOrder, static_cast<const uint8_t*>(indices.const_data_ptr()), metadata, rows, columns,
                                    current_stream(indices)),
               "write_metadata");
}
#else
namespace {
[[noreturn]] void absent() {
  STD_TORCH_CHECK(false, "this library was built without the CUTLASS kernels");
  __builtin_unreachable();
}
}  // namespace

void multiply_sm90(const Tensor&, const Tensor&, const void*, void*, void*, int64_t, int64_t, int64_t, int64_t, After) {
  absent();
}
int64_t sm90_configs() { return 0; }
int64_t sm90_metadata_bytes(int64_t, int64_t) { absent(); }
void write_sm90_metadata(const Tensor&, void*, int64_t, int64_t) { absent(); }
#endif

}  // namespace slope

namespace {

bool sm90_is_fused(int64_t config) {
#if defined(SLOPE_WITH_SM90)
  return slope::sm90::fused_stages(int(config), slope::sm90::Epilogue::bias_gelu) > 0;
#else
  return false;
#endif
}

// An input without gaps, on a 16-byte boundary.
Tensor plain(const Tensor& input) {
  if (!input.is_contiguous()) return torch::stable::contiguous(input);
  return aligned(input.const_data_ptr()) ? input : torch::stable::clone(input);
}

struct Product {
  int64_t n, d_in;
  std::vector<int64_t> shape;  // of the result
};

Product checked(const char* name, const Tensor& x, const Tensor& operand, int64_t d_out) {
  STD_TORCH_CHECK(x.dim() >= 1, name, ": x has no dimensions");
  cuda_type_of(x.scalar_type(), "x");
  check_plain(operand, "operand", x);
  STD_TORCH_CHECK(operand.scalar_type() == x.scalar_type(), name, ": operand is ", name_of(operand.scalar_type()),
                  ", x is ", name_of(x.scalar_type()));
  const int64_t d_in = x.size(x.dim() - 1);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = d_out;
  return {d_in == 0 ? 0 : x.numel() / d_in, d_in, shape};
}

// {gelu(pre), pre} with pre = x W^T + bias, rounded before the activation; pre is empty unless it is to be kept.
std::tuple<Tensor, Tensor> spmm_gelu(const Tensor& x, const Tensor& operand, const Tensor& bias, int64_t d_out,
                                     int64_t config, bool tanh, bool keep) {
  const Product p = checked("spmm_gelu", x, operand, d_out);
  check_plain(bias, "bias", x);
  STD_TORCH_CHECK(bias.scalar_type() == x.scalar_type() && bias.numel() == d_out, "spmm_gelu: bias is ",
                  name_of(bias.scalar_type()), " with ", bias.numel(), " elements, expected ", name_of(x.scalar_type()),
                  " with ", d_out);
  OnDeviceOf guard(x);
  const int32_t code = dtype_code(x);
  Tensor y = new_tensor(x, p.shape, code), pre = new_tensor(x, keep ? p.shape : std::vector<int64_t>{0}, code);
  if (p.n > 0) {
    slope::multiply_sm90(plain(x), operand, bias.const_data_ptr(), y.mutable_data_ptr(),
                         keep ? pre.mutable_data_ptr() : nullptr, p.n, d_out, p.d_in, config,
                         tanh ? slope::After::gelu_tanh : slope::After::gelu);
  }
  return {y, pre};
}

// (dy W) gelu'(pre), rounded once.
Tensor spmm_gelu_gradient(const Tensor& dy, const Tensor& operand, const Tensor& pre, int64_t d_out, int64_t config,
                          bool tanh) {
  const Product p = checked("spmm_gelu_gradient", dy, operand, d_out);
  STD_TORCH_CHECK(pre.scalar_type() == dy.scalar_type() && pre.numel() == p.n * d_out && pre.size(pre.dim() - 1) == d_out,
                  "spmm_gelu_gradient: pre is ", name_of(pre.scalar_type()), " of shape ", shape_of(pre), ", expected ",
                  name_of(dy.scalar_type()), " with ", p.n, " rows of ", d_out);
  OnDeviceOf guard(dy);
  Tensor y = new_tensor(dy, p.shape, dtype_code(dy));
  if (p.n > 0) {
    const Tensor aux = plain(pre);
    slope::multiply_sm90(plain(dy), operand, nullptr, y.mutable_data_ptr(), const_cast<void*>(aux.const_data_ptr()), p.n,
                         d_out, p.d_in, config, tanh ? slope::After::gelu_gradient_tanh : slope::After::gelu_gradient);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slope_cuda, m) {
  m.def(
      "spmm_gelu(Tensor x, Tensor operand, Tensor bias, int d_out, int config, bool tanh, bool keep) -> (Tensor, Tensor)");
  m.def(
      "spmm_gelu_gradient(Tensor dy, Tensor operand, Tensor pre, int d_out, int config, bool tanh) -> Tensor");
  m.def("sm90_configs() -> int");
  m.def("sm90_is_fused(int config) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(slope_cuda, CUDA, m) {
  m.impl("spmm_gelu", TORCH_BOX(&spmm_gelu));
  m.impl("spmm_gelu_gradient", TORCH_BOX(&spmm_gelu_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(slope_cuda, CompositeExplicitAutograd, m) {
  m.impl("sm90_configs", TORCH_BOX(&slope::sm90_configs));
  m.impl("sm90_is_fused", TORCH_BOX(&sm90_is_fused));
}
