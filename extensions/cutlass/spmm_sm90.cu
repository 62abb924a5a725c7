#include "spmm_sm90.h"

#include <array>
#include <atomic>
#include <limits>
#include <utility>

#include "instances.h"
#include "metadata.h"

namespace slope::sm90 {
namespace {

constexpr int kRasters = 2, kSwizzles = 4;  // swizzles 1, 2, 4, 8
constexpr int kConfigs = kKernels * kRasters * kSwizzles;
constexpr int kDevices = 64;

using Instances = std::array<Instance, size_t(kKernels)>;

template <Dtype D, int... Kernel>
Instances collect(std::integer_sequence<int, Kernel...>) {
  return {instance<Kernel, D>()...};
}

const Instances& instances(Dtype dtype) {
  static const Instances bf16 = collect<Dtype::bf16>(std::make_integer_sequence<int, kKernels>());
  static const Instances f16 = collect<Dtype::f16>(std::make_integer_sequence<int, kKernels>());
  return dtype == Dtype::bf16 ? bf16 : f16;
}

constexpr bool is_fused(Epilogue epilogue) {
  return int(epilogue) >= kFirstFused && int(epilogue) < kFirstFused + kFusedEpilogues;
}
constexpr bool reads_bias(Epilogue epilogue) {
  return epilogue == Epilogue::bias || epilogue == Epilogue::bias_gelu || epilogue == Epilogue::bias_gelu_tanh;
}
static_assert(is_fused(Epilogue::gelu_gradient_tanh) && !is_fused(Epilogue::bias));

template <Dtype D, Epilogue E, int... Kernel>
std::array<Instance, size_t(kFusedKernels)> collect_fused(std::integer_sequence<int, Kernel...>) {
  return {fused_instance<kFirstFusedKernel + Kernel, D, E>()...};
}
template <Dtype D, int... E>
std::array<std::array<Instance, size_t(kFusedKernels)>, size_t(kFusedEpilogues)> collect_all_fused(
    std::integer_sequence<int, E...>) {
  return {collect_fused<D, Epilogue(kFirstFused + E)>(std::make_integer_sequence<int, kFusedKernels>())...};
}

const Instance& fused_instance_of(Dtype dtype, Epilogue epilogue, int kernel) {
  static const auto bf16 = collect_all_fused<Dtype::bf16>(std::make_integer_sequence<int, kFusedEpilogues>());
  static const auto f16 = collect_all_fused<Dtype::f16>(std::make_integer_sequence<int, kFusedEpilogues>());
  return (dtype == Dtype::bf16 ? bf16 : f16)[size_t(int(epilogue) - kFirstFused)][size_t(kernel - kFirstFusedKernel)];
}

std::array<Config, size_t(kConfigs)> make_configs() {
  std::array<Config, size_t(kConfigs)> configs{};
  size_t id = 0;
  for (int kernel = 0; kernel < kKernels; ++kernel) {
    const Spec& s = kSpecs[kernel];
    const int stages = instances(Dtype::bf16)[size_t(kernel)].stages;
    for (Raster raster : {Raster::along_m, Raster::along_n}) {
      for (int swizzle : {1, 2, 4, 8}) {
        configs[id++] = {kernel,     s.name, s.tile_m,    s.tile_n, s.tile_k, s.cluster_m, s.cluster_n,
                         s.pingpong, stages, order_of(s), raster,   swizzle};
      }
    }
  }
  return configs;
}

const std::array<Config, size_t(kConfigs)>& configs() {
  static const std::array<Config, size_t(kConfigs)> table = make_configs();
  return table;
}

struct Device {
  int id = 0, multiprocessors = 0;
  bool hopper = false;
};

// The current device. What is asked of the driver is kept: multiprocessors, and 1 << 20 for compute capability 9.0.
const char* current_device(Device* device) {
  static std::atomic<int> known[kDevices];
  cudaError_t status = cudaGetDevice(&device->id);
  int packed = 0;
  const bool kept = status == cudaSuccess && device->id < kDevices;
  if (kept) packed = known[device->id].load(std::memory_order_relaxed);
  if (status == cudaSuccess && packed == 0) {
    int multiprocessors = 0, major = 0, minor = 0;
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device->id);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device->id);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device->id);
    if (status == cudaSuccess) {
      packed = multiprocessors | (major == 9 && minor == 0 ? 1 << 20 : 0);
      if (kept) known[device->id].store(packed, std::memory_order_relaxed);
    }
  }
  if (status != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(status);
  }
  device->multiprocessors = packed & ((1 << 20) - 1);
  device->hopper = packed >> 20 != 0;
  return nullptr;
}

const char* check_sizes(int64_t d_out, int64_t d_in) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 1024;
  if (d_out < 16 || d_in < 16 || d_out % 16 != 0 || d_in % 16 != 0) return "d_out and d_in must be multiples of 16";
  if (d_out > most || d_in > most) return "d_out and d_in must fit in 32 bits";
  return nullptr;
}

const char* check_call(int id, Epilogue epilogue, int64_t n, int64_t d_out, int64_t d_in, Dtype dtype, Device* device) {
  if (id < 0 || id >= kConfigs) return "there is no such configuration";
  if (epilogue != Epilogue::none && epilogue != Epilogue::bias && !is_fused(epilogue)) return "there is no such epilogue";
  if (is_fused(epilogue) && !has_fused(configs()[size_t(id)].kernel)) return "this kernel has no such epilogue";
  if (dtype != Dtype::bf16 && dtype != Dtype::f16) return "the dtype must be bf16 or fp16";
  if (n < 1 || n > std::numeric_limits<int32_t>::max() - 1024) return "n must be at least 1 and fit in 32 bits";
  if (const char* error = check_sizes(d_out, d_in)) return error;
  if (const char* error = current_device(device)) return error;
  return device->hopper ? nullptr : "these kernels need compute capability 9.0 (H100, H200)";
}

bool aligned(const void* pointer, uintptr_t unit) { return reinterpret_cast<uintptr_t>(pointer) % unit == 0; }

// A thread moves what rows r and r + 8 hold of one atom's columns: `depth / 8` bytes each, which end up side by side, two
// bytes of the one and two of the other in turn, the first halves of the 32-column blocks apart from the second.
template <int Depth>
__global__ void __launch_bounds__(256) metadata_kernel(const uint8_t* __restrict__ indices, uint8_t* __restrict__ e,
                                                       int64_t rows, int64_t row_bytes, int64_t atoms_down,
                                                       int64_t units, bool whole_atoms) {
  constexpr int kBlocks = Depth / 32;
  constexpr uint32_t kUnused = 0x44444444u;  // positions 0 and 1 in every group
  struct alignas(4 * kBlocks) Words {
    uint32_t w[kBlocks];
  };
  for (int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; unit < units;
       unit += int64_t(gridDim.x) * blockDim.x) {
    const int pair = int(unit % 32);  // of the 32 pairs of rows in an atom
    const int64_t atom = unit / 32;
    const int64_t row0 = atom % atoms_down * kAtomRows + pair / 8 * 16 + pair % 8;
    const int64_t byte0 = atom / atoms_down * (Depth / 8);
    Words in[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row0 + 8 * i;
      if (row < rows && whole_atoms) {
        in[i] = *reinterpret_cast<const Words*>(indices + row * row_bytes + byte0);
        continue;
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        in[i].w[b] = kUnused;
        if (row >= rows) continue;
        uint32_t word = 0;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          const int64_t column = byte0 + 4 * b + byte;
          const uint32_t value = column < row_bytes ? indices[row * row_bytes + column] : kUnused & 0xff;
          word |= value << (8 * byte);
        }
        in[i].w[b] = word;
      }
    }
    Words out[2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      out[0].w[b] = __byte_perm(in[0].w[b], in[1].w[b], 0x5410);
      out[1].w[b] = __byte_perm(in[0].w[b], in[1].w[b], 0x7632);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<Words*>(e + metadata_offset(Depth, rows, row0, byte0 + 2 * half)) = out[half];
    }
  }
}

template <int Depth>
cudaError_t launch_metadata(const uint8_t* indices, void* e, int64_t d_out, int64_t d_in, cudaStream_t stream) {
  const int64_t down = round_up(d_out, kAtomRows) / kAtomRows, across = round_up(d_in, Depth) / Depth;
  const int64_t units = down * across * 32;
  const int64_t blocks = units / 256 + 1 < 4096 ? units / 256 + 1 : 4096;
  metadata_kernel<Depth><<<unsigned(blocks), 256, 0, stream>>>(indices, static_cast<uint8_t*>(e), d_out, d_in / 8, down,
                                                               units, d_in % Depth == 0 && aligned(indices, 16));
  return cudaGetLastError();
}

}  // namespace

int config_count() { return kConfigs; }
int kernel_count() { return kKernels; }
const Config& config(int id) { return configs()[size_t(id)]; }

size_t metadata_bytes(Metadata order, int64_t d_out, int64_t d_in) {
  return size_t(round_up(d_out, kAtomRows) * round_up(d_in, depth_of(order)) / 8);
}

const char* build_metadata(Metadata order, const uint8_t* indices, void* e, int64_t d_out, int64_t d_in,
                           cudaStream_t stream) {
  if (const char* error = check_sizes(d_out, d_in)) return error;
  if (indices == nullptr || e == nullptr) return "indices and e must not be null";
  if (!aligned(e, 16)) return "e must be aligned to 16 bytes";
  const cudaError_t status = order == Metadata::k128 ? launch_metadata<128>(indices, e, d_out, d_in, stream)
                                                     : launch_metadata<64>(indices, e, d_out, d_in, stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* can_run(int config_id, Epilogue epilogue, int64_t n, int64_t d_out, int64_t d_in, Dtype dtype) {
  Device device;
  return check_call(config_id, epilogue, n, d_out, d_in, dtype, &device);
}

int fused_stages(int config_id, Epilogue epilogue) {
  if (config_id < 0 || config_id >= kConfigs || !is_fused(epilogue) || !has_fused(config(config_id).kernel)) return 0;
  return fused_instance_of(Dtype::bf16, epilogue, config(config_id).kernel).stages;
}

size_t workspace_bytes(int, Epilogue, int64_t, int64_t, int64_t, Dtype) { return 0; }

const char* run(int config_id, Epilogue epilogue, Dtype dtype, const void* x, const void* values, const void* e,
                const void* bias_or_null, void* y, void* aux_or_null, int64_t n, int64_t d_out, int64_t d_in,
                void* /*workspace*/, cudaStream_t stream) {
  Device device;
  if (const char* error = check_call(config_id, epilogue, n, d_out, d_in, dtype, &device)) return error;
  if (x == nullptr || values == nullptr || e == nullptr || y == nullptr) return "x, values, e and y must not be null";
  if (!aligned(x, 16) || !aligned(values, 16) || !aligned(e, 16) || !aligned(y, 16)) {
    return "x, values, e and y must be aligned to 16 bytes";
  }
  if (reads_bias(epilogue) && bias_or_null == nullptr) return "the bias is null";
  if (!aligned(bias_or_null, 2)) return "the bias must be aligned to 2 bytes";
  const bool reads_aux = is_fused(epilogue) && !reads_bias(epilogue);
  if ((reads_aux && aux_or_null == nullptr) || !aligned(aux_or_null, 16)) {
    return "aux must not be null where it is read, and must be aligned to 16 bytes";
  }
  const Config& c = config(config_id);
  const Problem problem{x,
                        values,
                        e,
                        reads_bias(epilogue) ? bias_or_null : nullptr,
                        y,
                        int(n),
                        int(d_out),
                        int(d_in),
                        c.raster,
                        c.swizzle,
                        device.id,
                        device.multiprocessors,
                        stream,
                        aux_or_null};
  if (is_fused(epilogue)) return fused_instance_of(dtype, epilogue, c.kernel).run(problem);
  return instances(dtype)[size_t(c.kernel)].run(problem);
}

}  // namespace slope::sm90
