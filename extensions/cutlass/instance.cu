// One kernel for one dtype: compiled with -DSLOPE_SM90_KERNEL=<line of instances.h> -DSLOPE_SM90_DTYPE=<0: bf16, 1: fp16>, and
// for a fused epilogue with -DSLOPE_SM90_EPILOGUE=<number of the Epilogue>.
#include <atomic>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

#if defined(SLOPE_SM90_EPILOGUE)
#include "gelu.h"
#endif
#include "instances.h"
#include "metadata.h"

#if !defined(CUTLASS_ARCH_MMA_SPARSE_SM90_SUPPORTED) || !defined(CUTLASS_SM90_CLUSTER_LAUNCH_ENABLED)
#error "needs nvcc 12.2 or later"
#endif
#if !defined(NDEBUG)
#error "compile with -DNDEBUG: assertions in the main loop make ptxas serialize the matrix instructions"
#endif

namespace slope::sm90 {
namespace {

constexpr Spec kSpec = kSpecs[SLOPE_SM90_KERNEL];
constexpr Dtype kDtype = Dtype(SLOPE_SM90_DTYPE);
constexpr int kDevices = 64;

using Element = std::conditional_t<kDtype == Dtype::bf16, cutlass::bfloat16_t, cutlass::half_t>;
using Tile = cute::Shape<cute::Int<kSpec.tile_m>, cute::Int<kSpec.tile_n>, cute::Int<kSpec.tile_k>>;
using Cluster = cute::Shape<cute::Int<kSpec.cluster_m>, cute::Int<kSpec.cluster_n>, cute::_1>;
using MainSchedule = std::conditional_t<kSpec.pingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                        cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
using StoreSchedule = std::conditional_t<kSpec.pingpong, cutlass::epilogue::TmaWarpSpecialized,
                                         cutlass::epilogue::TmaWarpSpecializedCooperative>;

// A is W; B is X^T and D is Y^T, both column-major, which are X and Y as they lie.
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
constexpr int kAlignment = 8;             // elements in 16 bytes
constexpr int kCompressedAlignment = 16;  // the same of A, counted in columns of W

namespace fusion = cutlass::epilogue::fusion;
using Bias = fusion::Sm90ColBroadcast<0, Tile, Element, float, cute::Stride<cute::_1, cute::_0, int64_t>, 1>;
using Biased = fusion::Sm90EVT<
    fusion::Sm90Compute<cutlass::plus, Element, float, cutlass::FloatRoundStyle::round_to_nearest>, Bias,
    fusion::Sm90AccFetch>;

#if !defined(SLOPE_SM90_EPILOGUE)
using Source = void;
using Output = Biased;
#else
constexpr Epilogue kEpilogue = Epilogue(SLOPE_SM90_EPILOGUE);
constexpr bool kForward = kEpilogue == Epilogue::bias_gelu || kEpilogue == Epilogue::bias_gelu_tanh;
constexpr bool kTanh = kEpilogue == Epilogue::bias_gelu_tanh || kEpilogue == Epilogue::gelu_gradient_tanh;
static_assert(SLOPE_SM90_EPILOGUE >= kFirstFused && SLOPE_SM90_EPILOGUE < kFirstFused + kFusedEpilogues);
static_assert(has_fused(SLOPE_SM90_KERNEL));
using Gelu = std::conditional_t<kTanh, TanhGelu, ErfGelu>;

template <class Floats>
struct Activate {
  CUTLASS_DEVICE Floats operator()(Floats const& x) const {
    Floats y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Floats::kElements; ++i) y[i] = Gelu::value(x[i]);
    return y;
  }
};
template <class Floats>
struct TimesGradient {
  CUTLASS_DEVICE Floats operator()(Floats const& product, Floats const& x) const {
    Floats y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Floats::kElements; ++i) y[i] = product[i] * Gelu::gradient(x[i]);
    return y;
  }
};
template <template <class> class Function>
using Compute = fusion::Sm90Compute<Function, Element, float, cutlass::FloatRoundStyle::round_to_nearest>;

// GELU is taken of what `Biased` has rounded, the very numbers that are stored: as an operation of its own would see them, and
// as the backward pass, which has only them, will.
namespace detail = cutlass::epilogue::collective::detail;
using Shape = detail::EpilogueDescriptor<Tile, cutlass::epilogue::collective::EpilogueTileAuto, void, Element, StoreSchedule>;
using AuxShape = detail::AuxStoreDescriptor<Shape, Column, Element>;
using Aux = fusion::Sm90AuxStore<AuxShape::Stages, typename AuxShape::EpilogueTile, Element,
                                 cutlass::FloatRoundStyle::round_to_nearest, typename AuxShape::Stride,
                                 typename AuxShape::SmemLayoutAtom, typename AuxShape::CopyOpR2S, kAlignment>;
using Forward = fusion::Sm90EVT<Compute<Activate>, fusion::Sm90EVT<Aux, Biased>>;

// The aux that is read comes as CUTLASS's C: same layout as D, so that both share their buffers.
using Backward = fusion::Sm90EVT<Compute<TimesGradient>, fusion::Sm90AccFetch, fusion::Sm90SrcFetch<Element>>;

using Source = std::conditional_t<kForward, void, Element>;
using Output = std::conditional_t<kForward, Forward, Backward>;
#endif

using Store = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, Column, kAlignment, Element, Column, kAlignment,
    StoreSchedule, Output>::CollectiveOp;
using Main = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, Row, kCompressedAlignment, Element, Column,
    kAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Store::SharedStorage))>,
    MainSchedule>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, Store>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
using Sparse = typename Main::SparseConfig;

// `values` is A: two kept entries for four columns, rows apart by d_in / 2 of them (CUTLASS counts the stride in columns).
static_assert(std::is_same_v<typename Sparse::ElementASparsity, cute::_2> && Sparse::LogicalElemsAPerChunk{} == 4);
constexpr auto kSample = cute::make_shape(208, 1, 336, 1);
static_assert(cute::get<0>(cute::stride(Sparse::fill_layoutA(kSample))) == 336 &&
              cute::get<0>(cute::shape(Sparse::fill_layoutA(kSample))) == 208);
// `e` is made of bytes that cover eight columns each.
static_assert(sizeof(typename Main::ElementE) == 1 && Sparse::ElementEMmaSparsity{} == 8);
static_assert(Sparse::TensorEAtomM{} == kAtomRows && Sparse::TensorEAtomK{} == depth_of(order_of(kSpec)));

// Both offsets are a sum of a part that depends on the row and one that depends on the column: each alone is enough.
constexpr int64_t kSampleRows = 208, kSampleColumns = 336;
constexpr auto kSampleE = Sparse::fill_layoutE(kSample);
constexpr int kDepth = depth_of(order_of(kSpec));
constexpr bool rows_agree() {
  for (int row = 0; row < kSampleRows; ++row) {
    if (int64_t(kSampleE(row, 0, 0)) != 8 * metadata_offset(kDepth, kSampleRows, row, 0)) return false;
  }
  return true;
}
constexpr bool columns_agree() {  // the even group in the low nibble
  for (int group = 0; group < kSampleColumns / 4; ++group) {
    const int64_t place = 8 * metadata_offset(kDepth, kSampleRows, 0, group / 2) + group % 2 * 4;
    if (int64_t(kSampleE(0, 4 * group, 0)) != place) return false;
  }
  return true;
}
static_assert(rows_agree());
static_assert(columns_agree());
static_assert(int64_t(cute::cosize(kSampleE)) == round_up(kSampleRows, kAtomRows) * round_up(kSampleColumns, kDepth));

// What a device needs before the first launch, and what is asked of it once: how many clusters it runs at a time.
struct Prepared {
  std::atomic<int> clusters[kDevices];  // 0: not prepared yet; otherwise the count and one
};
Prepared prepared;

const char* prepare(int device, int* clusters) {
  const bool kept = device >= 0 && device < kDevices;
  if (kept) {
    const int found = prepared.clusters[device].load(std::memory_order_acquire);
    if (found != 0) {
      *clusters = found - 1;
      return nullptr;
    }
  }
  const void* kernel = reinterpret_cast<const void*>(&cutlass::device_kernel<Kernel>);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(Kernel::SharedStorageSize));
  if (status != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(status);
  }
  *clusters = 0;
  if (kSpec.cluster_m * kSpec.cluster_n > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kSpec.cluster_m;
    attribute.val.clusterDim.y = kSpec.cluster_n;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(kSpec.cluster_m, kSpec.cluster_n, 1);
    launch.blockDim = dim3(Kernel::MaxThreadsPerBlock, 1, 1);
    launch.dynamicSmemBytes = Kernel::SharedStorageSize;
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    status = cudaOccupancyMaxActiveClusters(clusters, kernel, &launch);
    if (status != cudaSuccess) {
      cudaGetLastError();
      return cudaGetErrorString(status);
    }
    if (*clusters < 1) return "the device runs no cluster of this kernel's size";
  }
  if (kept) prepared.clusters[device].store(*clusters + 1, std::memory_order_release);
  return nullptr;
}

#if defined(SLOPE_SM90_EPILOGUE)
template <class Arguments, class Stride>  // a template, so that only one of the branches has to fit
void set_fused(const Problem& p, const Stride& stride, Arguments* epilogue) {
  if constexpr (kForward) {
    const typename Biased::Arguments biased{{static_cast<const Element*>(p.bias), Element(0), {}}, {}, {}};
    epilogue->thread = {{biased, {static_cast<Element*>(p.aux), stride}}, {}};
  } else {
    epilogue->ptr_C = static_cast<const Element*>(p.aux);
  }
}
#endif

const char* run_kernel(const Problem& p) {
  int clusters = 0;
  if (const char* error = prepare(p.device, &clusters)) return error;

  const auto shape = cute::make_shape(p.d_out, p.n, p.d_in, 1);
  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = shape;

  arguments.mainloop.ptr_A = static_cast<const Element*>(p.values);
  arguments.mainloop.layout_a = Sparse::fill_layoutA(shape);
  arguments.mainloop.ptr_B = static_cast<const Element*>(p.x);
  arguments.mainloop.dB = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(p.n, p.d_in, 1));
  arguments.mainloop.ptr_E = static_cast<const typename Main::ElementE*>(p.e);
  arguments.mainloop.layout_e = Sparse::fill_layoutE(shape);

  const auto stride_y =
      cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(p.d_out, p.n, 1));
  arguments.epilogue.ptr_C = nullptr;
#if !defined(SLOPE_SM90_EPILOGUE)
  arguments.epilogue.thread = {{static_cast<const Element*>(p.bias), Element(0), {}}, {}, {}};
#else
  set_fused(p, stride_y, &arguments.epilogue);
#endif
  arguments.epilogue.dC = stride_y;
  arguments.epilogue.ptr_D = static_cast<Element*>(p.y);
  arguments.epilogue.dD = stride_y;

  arguments.hw_info.device_id = p.device;
  arguments.hw_info.sm_count = p.multiprocessors;
  arguments.hw_info.max_active_clusters = clusters;
  using Order = std::decay_t<decltype(arguments.scheduler.raster_order)>;
  arguments.scheduler.raster_order = p.raster == Raster::along_m ? Order::AlongM : Order::AlongN;
  arguments.scheduler.max_swizzle_size = p.swizzle;

  if (!Kernel::can_implement(arguments)) return "CUTLASS does not take this shape";
  typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
  if (Gemm::run(params, p.stream) != cutlass::Status::kSuccess) return "the launch failed";
  return nullptr;
}

}  // namespace

#if !defined(SLOPE_SM90_EPILOGUE)
template <>
Instance instance<SLOPE_SM90_KERNEL, kDtype>() {
  return {Main::DispatchPolicy::Stages, &run_kernel};
}
#else
static_assert(Main::DispatchPolicy::Stages >= 4, "the epilogue leaves the main loop too little shared memory");
static_assert(Kernel::SharedStorageSize <= 227 * 1024);
static_assert(std::is_same_v<typename AuxShape::Stride, typename Kernel::StrideD>, "aux and D lie alike");
template <>
Instance fused_instance<SLOPE_SM90_KERNEL, kDtype, kEpilogue>() {
  return {Main::DispatchPolicy::Stages, &run_kernel};
}
#endif

}  // namespace slope::sm90
