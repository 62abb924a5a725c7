// The kernels that are built. One line is one kernel; instance.cu is compiled once for each line and dtype.
#pragma once

#include "spmm_sm90.h"

namespace slope::sm90 {

struct Spec {
  const char* name;
  int tile_m, tile_n, tile_k, cluster_m, cluster_n;
  bool pingpong;
};

// The library has the first three. With SLOPE_SM90_ALL, which the bench is built with, the rest of what was tried is there too.
inline constexpr Spec kSpecs[] = {
    {"128x256x64 coop 2x1", 128, 256, 64, 2, 1, false},
    {"256x192x64 coop 2x1", 256, 192, 64, 2, 1, false},
    {"128x128x64 ping 2x1", 128, 128, 64, 2, 1, true},
#if defined(SLOPE_SM90_ALL)
    {"128x256x128 coop 2x1", 128, 256, 128, 2, 1, false},
    {"256x128x128 coop 2x1", 256, 128, 128, 2, 1, false},
    {"256x128x128 coop 1x2", 256, 128, 128, 1, 2, false},
    {"128x128x128 ping 2x1", 128, 128, 128, 2, 1, true},
    {"256x128x64 coop 2x1", 256, 128, 64, 2, 1, false},
    {"128x64x128 ping 1x1", 128, 64, 128, 1, 1, true},
    {"64x32x128 ping 1x1", 64, 32, 128, 1, 1, true},
#endif
};
inline constexpr int kKernels = int(sizeof(kSpecs) / sizeof(kSpecs[0]));

constexpr Metadata order_of(const Spec& spec) { return spec.tile_k == 64 ? Metadata::k64 : Metadata::k128; }
constexpr int depth_of(Metadata order) { return order == Metadata::k64 ? 64 : 128; }

// What an instance is asked to do; sizes are checked before.
struct Problem {
  const void* x;
  const void* values;
  const void* e;
  const void* bias;
  void* y;
  int n, d_out, d_in;
  Raster raster;
  int swizzle;
  int device, multiprocessors;
  cudaStream_t stream;
  void* aux;
};

// Defined in instance.cu, once for each kernel and dtype.
struct Instance {
  int stages;
  const char* (*run)(const Problem&);
};
template <int Kernel, Dtype D>
Instance instance();

// With a fused epilogue: instance.cu compiled with -DSLOPE_SM90_EPILOGUE=<number of the Epilogue> as well. The library has them
// for the one kernel that was fastest or within 1 % of it in nearly all cases; the bench for the three of the library.
#if defined(SLOPE_SM90_ALL)
inline constexpr int kFirstFusedKernel = 0, kFusedKernels = 3;
#else
inline constexpr int kFirstFusedKernel = 1, kFusedKernels = 1;
#endif
inline constexpr int kFirstFused = int(Epilogue::bias_gelu), kFusedEpilogues = 4;
constexpr bool has_fused(int kernel) {
  return kernel >= kFirstFusedKernel && kernel < kFirstFusedKernel + kFusedKernels;
}
template <int Kernel, Dtype D, Epilogue E>
Instance fused_instance();

}  // namespace slope::sm90
