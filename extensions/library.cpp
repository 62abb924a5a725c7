// torch.ops.slope_cuda.*: schemas, checks and memory for the kernels of this folder, against torch's stable ABI.
//
// Nothing here decides: which backend, which algorithm and when an operand is out of date is Python's affair
// (slope_pl/ops). Every function sets the device of its tensors, uses their current stream and never waits for it.

#include <optional>
#include <tuple>
#include <vector>

#include "hopper.h"
#include "tensors.h"

namespace {

// From here on an algorithm's id names a configuration of the CUTLASS kernels, whose operands have metadata of their own.
constexpr int64_t kSm90 = 0x4000;

// In which order the metadata of an operand are.
enum Order : int64_t {
  kLibrary = 0,  // cuSPARSELt's, made by cuSPARSELt
  kDirect = 1,   // the same, written by our kernel
  kCutlass = 2,  // of the CUTLASS kernels
};

// How to multiply, in one number: the algorithm's id plus one (0: the library's choice) in the low 16 bits, then 8 bits of
// split-k parts and 8 bits of its mode. One argument of an operation is a microsecond.
struct How {
  int64_t algorithm, split_k, split_k_mode;
  explicit How(int64_t code) : algorithm((code & 0xffff) - 1), split_k(code >> 16 & 0xff), split_k_mode(code >> 24) {}
};

// Rows of an input that can be read in place: one stride from row to row, a multiple of 8 elements.
struct Rows {
  int64_t n, ld;
};

std::optional<Rows> rows_of(const Tensor& x, int64_t d_in) {
  const int64_t n = d_in == 0 ? 0 : x.numel() / d_in;
  if (!aligned(x.const_data_ptr())) return std::nullopt;
  if (x.is_contiguous()) return Rows{n, d_in};
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= d_in && x.stride(0) % 8 == 0) return Rows{n, x.stride(0)};
  return std::nullopt;
}

Tensor spmm(const Tensor& input, const Tensor& operand, const MaybeTensor& bias, int64_t d_out, int64_t how,
            int64_t tail_how) {
  STD_TORCH_CHECK(input.dim() >= 1, "spmm: x has no dimensions");
  const int64_t d_in = input.size(input.dim() - 1);
  const ScalarType dtype = input.scalar_type();
  const cudaDataType type = cuda_type_of(dtype, "x");
  check_plain(operand, "operand", input);
  STD_TORCH_CHECK(operand.scalar_type() == dtype, "spmm: operand is ", name_of(operand.scalar_type()), ", x is ",
                  name_of(dtype));
  const void* bias_pointer = nullptr;
  if (bias.has_value()) {
    check_plain(*bias, "bias", input);
    STD_TORCH_CHECK(bias->scalar_type() == dtype && bias->numel() == d_out, "spmm: bias is ",
                    name_of(bias->scalar_type()), " with ", bias->numel(), " elements, expected ", name_of(dtype),
                    " with ", d_out);
    bias_pointer = bias->const_data_ptr();
  }
  OnDeviceOf guard(input);
  const How best(how);
  auto rows = rows_of(input, d_in);
  if (best.algorithm >= kSm90 && rows.has_value() && rows->ld != d_in) rows.reset();  // read without gaps only
  const Tensor x = rows.has_value()        ? input
                   : input.is_contiguous() ? torch::stable::clone(input)  // misaligned
                                           : torch::stable::contiguous(input);
  if (!rows.has_value()) rows = Rows{d_in == 0 ? 0 : x.numel() / d_in, d_in};
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = d_out;
  const int32_t code = dtype_code(input);
  Tensor y = new_tensor(input, shape, code);
  if (rows->n == 0) return y;
  if (best.algorithm >= kSm90) {
    slope::multiply_sm90(x, operand, bias_pointer, y.mutable_data_ptr(), nullptr, rows->n, d_out, d_in,
                         best.algorithm - kSm90, bias_pointer == nullptr ? slope::After::nothing : slope::After::bias);
    return y;
  }

  return guarded([&] {
    const cudaStream_t stream = current_stream(input);
    slope::Session& session = session_of(input);
    auto multiply = [&](int64_t n, int64_t ld, const void* from, void* to, const How& by) {
      const slope::Plan& plan = session.plan(
          {n, d_out, d_in, ld, by.algorithm, by.split_k, by.split_k_mode, bias_pointer, type});
      STD_TORCH_CHECK(size_t(operand.numel()) * 2 >= plan.operand_bytes(), "spmm: operand has ", operand.numel(),
                      " elements, expected at least ", plan.operand_bytes() / 2, " for W (", d_out, ", ", d_in, ")");
      std::optional<Tensor> workspace;
      if (plan.workspace_bytes() > 0) workspace = scratch(plan.workspace_bytes(), input);
      plan.run(session.handle(), operand.const_data_ptr(), from, to,
               workspace.has_value() ? workspace->mutable_data_ptr() : nullptr, stream);
    };
    // cuSPARSELt wants a multiple of 8 rows. The rest, at most 7, goes through a padded product of 8 of its own.
    const int64_t rest = rows->n % 8, whole = rows->n - rest, bytes = 2;
    const auto* from = static_cast<const char*>(x.const_data_ptr());
    auto* to = static_cast<char*>(y.mutable_data_ptr());
    if (whole > 0) multiply(whole, rows->ld, from, to, best);
    if (rest > 0) {
      Tensor padded = new_tensor(input, {8, d_in}, code), result = new_tensor(input, {8, d_out}, code);
      auto* tail = static_cast<char*>(padded.mutable_data_ptr());
      slope::check(cudaMemcpy2DAsync(tail, d_in * bytes, from + whole * rows->ld * bytes, rows->ld * bytes,
                                     d_in * bytes, rest, cudaMemcpyDeviceToDevice, stream),
                   "copy of the last rows");
      slope::check(cudaMemsetAsync(tail + rest * d_in * bytes, 0, (8 - rest) * d_in * bytes, stream), "padding");
      multiply(8, d_in, tail, result.mutable_data_ptr(), How(tail_how));
      slope::check(cudaMemcpyAsync(to + whole * d_out * bytes, result.const_data_ptr(), rest * d_out * bytes,
                                   cudaMemcpyDeviceToDevice, stream),
                   "copy of the last rows");
    }
    return y;
  });
}

int64_t max_algorithm(const Tensor& x, int64_t d_out) {
  const int64_t d_in = x.size(x.dim() - 1);
  OnDeviceOf guard(x);
  return guarded([&]() -> int64_t {
    const slope::PlanKey key{8, d_out, d_in, d_in, -1, 1, 0, nullptr, cuda_type_of(x.scalar_type(), "x")};
    return session_of(x).plan(key).max_algorithm();
  });
}

int64_t kept_plans(const Tensor& x) { return int64_t(session_of(x).plans()); }

int64_t operand_bytes(const Tensor& like, int64_t d_out, int64_t d_in, ScalarType dtype, int64_t order) {
  const cudaDataType type = cuda_type_of(dtype, "operand");
  if (order == kCutlass) return d_out * d_in + slope::sm90_metadata_bytes(d_out, d_in);
  OnDeviceOf guard(like);
  return guarded([&]() -> int64_t {
    const slope::Compression compression(session_of(like), d_out, d_in, type);
    return int64_t(compression.operand_bytes());
  });
}

// cuSPARSELt's metadata by cuSPARSELt: the marker matrix is compressed, what follows the values is kept.
void compress_markers(const uint8_t* indices, Tensor& operand, int64_t rows, int64_t columns, cudaDataType type,
                      cudaStream_t stream) {
  const slope::Compression compression(session_of(operand), rows, columns, type);
  const size_t total = compression.operand_bytes(), values = size_t(rows * columns);
  STD_TORCH_CHECK(size_t(operand.numel()) * 2 == total, "operand: ", operand.numel() * 2, " bytes, expected ", total);
  Tensor markers = scratch(size_t(rows * columns) * 2, operand), compressed = scratch(total, operand);
  Tensor buffer = scratch(compression.buffer_bytes() + 1, operand);
  slope::check(slope::write_markers(indices, markers.mutable_data_ptr(), dtype_of(operand.scalar_type(), "operand"), rows,
                                    columns, stream),
               "markers");
  // Metadata are padded to tiles, and the padding is not written.
  slope::check(cudaMemsetAsync(static_cast<char*>(compressed.mutable_data_ptr()) + values, 0, total - values, stream),
               "padding of the metadata");
  compression.run(markers.const_data_ptr(), compressed.mutable_data_ptr(), buffer.mutable_data_ptr(), stream);
  slope::check(cudaMemcpyAsync(static_cast<char*>(operand.mutable_data_ptr()) + values,
                               static_cast<const char*>(compressed.const_data_ptr()) + values, total - values,
                               cudaMemcpyDeviceToDevice, stream),
               "copy of the metadata");
}

void write_metadata(const Tensor& indices, Tensor operand, int64_t order) {
  STD_TORCH_CHECK(indices.dim() == 2, "indices: shape ", shape_of(indices), ", expected (rows, columns / 8)");
  const int64_t rows = indices.size(0), columns = indices.size(1) * 8;
  const cudaDataType type = cuda_type_of(operand.scalar_type(), "operand");
  check_plain(operand, "operand", operand);
  check_indices(indices, "indices", rows, columns, operand);
  OnDeviceOf guard(operand);
  const cudaStream_t stream = current_stream(operand);
  const auto* bytes = static_cast<const uint8_t*>(indices.const_data_ptr());
  // rows * columns / 2 values of two bytes come first; what follows is the metadata.
  const size_t values = size_t(rows * columns), room = size_t(operand.numel()) * 2;
  auto* metadata = static_cast<char*>(operand.mutable_data_ptr()) + values;
  if (order == kCutlass) {
    STD_TORCH_CHECK(room >= values + size_t(slope::sm90_metadata_bytes(rows, columns)), "operand: ", room,
                    " bytes are too few");
    slope::write_sm90_metadata(indices, metadata, rows, columns);
    return;
  }
  guarded([&] {
    if (order == kLibrary) {
      compress_markers(bytes, operand, rows, columns, type, stream);
      return;
    }
    const size_t written = slope::metadata_bytes(rows, columns);
    STD_TORCH_CHECK(room >= values + written, "operand: ", room, " bytes, expected at least ", values + written);
    slope::check(slope::write_metadata(bytes, metadata, rows, columns, stream), "write_metadata");
    slope::check(cudaMemsetAsync(metadata + written, 0, room - values - written, stream), "padding of the metadata");
  });
}

void refresh(const Tensor& values, const Tensor& indices, const MaybeTensor& backward_indices,
             MaybeTensor forward_operand, MaybeTensor backward_operand) {
  const auto [d_out, d_in] = check_values(values, indices);
  STD_TORCH_CHECK(forward_operand.has_value() || backward_operand.has_value(), "refresh: no operand was given");
  const Tensor& target = forward_operand.has_value() ? *forward_operand : *backward_operand;
  for (const MaybeTensor* operand : {&forward_operand, &backward_operand}) {
    if (!operand->has_value()) continue;
    check_plain(**operand, "operand", values);
    STD_TORCH_CHECK((*operand)->scalar_type() == target.scalar_type() && (*operand)->numel() * 2 >= d_out * d_in,
                    "refresh: operand is ", name_of((*operand)->scalar_type()), " with ", (*operand)->numel(),
                    " elements, expected ", name_of(target.scalar_type()), " with at least ", d_out * d_in / 2);
  }
  const uint8_t* columns = nullptr;
  if (backward_operand.has_value()) {
    STD_TORCH_CHECK(backward_indices.has_value(), "refresh: a backward operand needs backward_indices");
    check_indices(*backward_indices, "backward_indices", d_in, d_out, values);
    columns = static_cast<const uint8_t*>(backward_indices->const_data_ptr());
  }
  OnDeviceOf guard(values);
  guarded([&, d_out = d_out, d_in = d_in] {
    slope::check(slope::refresh(values.const_data_ptr(), dtype_of(values.scalar_type(), "values"),
                                static_cast<const uint8_t*>(indices.const_data_ptr()), columns,
                                forward_operand.has_value() ? forward_operand->mutable_data_ptr() : nullptr,
                                backward_operand.has_value() ? backward_operand->mutable_data_ptr() : nullptr,
                                dtype_of(target.scalar_type(), "operand"), d_out, d_in, current_stream(values)),
                 "refresh");
  });
}

std::tuple<Tensor, Tensor> choose_columns(const Tensor& values, const Tensor& indices, const MaybeTensor& previous) {
  const auto [d_out, d_in] = check_values(values, indices);
  const uint8_t* before = nullptr;
  if (previous.has_value()) {
    check_indices(*previous, "previous", d_in, d_out, values);
    before = static_cast<const uint8_t*>(previous->const_data_ptr());
  }
  OnDeviceOf guard(values);
  Tensor chosen = torch::stable::new_empty(indices, {d_in, d_out / 8});
  Tensor counts = torch::stable::new_zeros(values, {2}, ScalarType::Long);
  guarded([&, d_out = d_out, d_in = d_in] {
    slope::check(slope::choose_columns(values.const_data_ptr(), dtype_of(values.scalar_type(), "values"),
                                       static_cast<const uint8_t*>(indices.const_data_ptr()), before,
                                       static_cast<uint8_t*>(chosen.mutable_data_ptr()),
                                       static_cast<int64_t*>(counts.mutable_data_ptr()), d_out, d_in,
                                       current_stream(values)),
                 "choose_columns");
  });
  return {chosen, counts};
}

Tensor select_entries(const Tensor& dense, const Tensor& indices, ScalarType dtype) {
  STD_TORCH_CHECK(dense.dim() == 2 && dense.size(1) % 8 == 0, "select: shape ", shape_of(dense),
                  ", expected (rows, columns) with columns a multiple of 8");
  check_plain(dense, "dense", dense);
  check_indices(indices, "indices", dense.size(0), dense.size(1), dense);
  OnDeviceOf guard(dense);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  Tensor kept = new_tensor(dense, {dense.size(0), dense.size(1) / 2}, code);
  guarded([&] {
    slope::check(slope::select_kept(dense.const_data_ptr(), dtype_of(dense.scalar_type(), "dense"),
                                    static_cast<const uint8_t*>(indices.const_data_ptr()), kept.mutable_data_ptr(),
                                    dtype_of(dtype, "dtype"), dense.size(0), dense.size(1), current_stream(dense)),
                 "select");
  });
  return kept;
}

// Major, minor and patch in three digits each: the library's own number is ambiguous from 0.10 on.
int64_t version_code(int64_t major, int64_t minor, int64_t patch) { return (major * 1000 + minor) * 1000 + patch; }

int64_t header_version() { return version_code(CUSPARSELT_VER_MAJOR, CUSPARSELT_VER_MINOR, CUSPARSELT_VER_PATCH); }

int64_t library_version() {
  int part[3] = {0, 0, 0};
  const libraryPropertyType properties[3] = {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL};
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(cusparseLtGetProperty(properties[i], &part[i]) == CUSPARSE_STATUS_SUCCESS,
                    "cusparseLtGetProperty failed");
  }
  return version_code(part[0], part[1], part[2]);
}

}  // namespace

STABLE_TORCH_LIBRARY(slope_cuda, m) {
  m.def("spmm(Tensor x, Tensor operand, Tensor? bias, int d_out, int how, int tail_how) -> Tensor");
  m.def("max_algorithm(Tensor x, int d_out) -> int");
  m.def("kept_plans(Tensor x) -> int");
  m.def("operand_bytes(Tensor like, int d_out, int d_in, ScalarType dtype, int order) -> int");
  m.def("write_metadata(Tensor indices, Tensor(a!) operand, int order) -> ()");
  m.def(
      "refresh(Tensor values, Tensor indices, Tensor? backward_indices, Tensor(a!)? forward_operand, "
      "Tensor(b!)? backward_operand) -> ()");
  m.def("choose_columns(Tensor values, Tensor indices, Tensor? previous) -> (Tensor, Tensor)");
  m.def("select(Tensor dense, Tensor indices, ScalarType dtype) -> Tensor");
  m.def("header_version() -> int");
  m.def("library_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(slope_cuda, CUDA, m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("max_algorithm", TORCH_BOX(&max_algorithm));
  m.impl("kept_plans", TORCH_BOX(&kept_plans));
  m.impl("operand_bytes", TORCH_BOX(&operand_bytes));
  m.impl("write_metadata", TORCH_BOX(&write_metadata));
  m.impl("refresh", TORCH_BOX(&refresh));
  m.impl("choose_columns", TORCH_BOX(&choose_columns));
  m.impl("select", TORCH_BOX(&select_entries));
}

STABLE_TORCH_LIBRARY_IMPL(slope_cuda, CompositeExplicitAutograd, m) {
  m.impl("header_version", TORCH_BOX(&header_version));
  m.impl("library_version", TORCH_BOX(&library_version));
}
