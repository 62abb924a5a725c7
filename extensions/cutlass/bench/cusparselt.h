// cuSPARSELt, found at run time: structured matrices, plans, and products beside ours.
#pragma once

#include "data.h"

namespace {

#define SLOPE_LT_FUNCTIONS(X)                                                                                     \
  X(cusparseLtInit)                                                                                               \
  X(cusparseLtDestroy)                                                                                            \
  X(cusparseLtGetVersion)                                                                                         \
  X(cusparseLtGetErrorName)                                                                                       \
  X(cusparseLtDenseDescriptorInit)                                                                                \
  X(cusparseLtStructuredDescriptorInit)                                                                           \
  X(cusparseLtMatDescriptorDestroy)                                                                               \
  X(cusparseLtMatmulDescriptorInit)                                                                               \
  X(cusparseLtMatmulDescSetAttribute)                                                                             \
  X(cusparseLtMatmulAlgSelectionInit)                                                                             \
  X(cusparseLtMatmulAlgSelectionDestroy)                                                                          \
  X(cusparseLtMatmulAlgSetAttribute)                                                                              \
  X(cusparseLtMatmulAlgGetAttribute)                                                                              \
  X(cusparseLtMatmulPlanInit)                                                                                     \
  X(cusparseLtMatmulPlanDestroy)                                                                                  \
  X(cusparseLtMatmulGetWorkspace)                                                                                 \
  X(cusparseLtMatmul)                                                                                             \
  X(cusparseLtSpMMACompressedSize2)                                                                               \
  X(cusparseLtSpMMACompress2)

struct Lt {
#define X(name) decltype(&::name) name = nullptr;
  SLOPE_LT_FUNCTIONS(X)
#undef X
  cusparseLtHandle_t handle;

  void ok(cusparseStatus_t status, const char* what) const {
    if (status != CUSPARSE_STATUS_SUCCESS) {
      throw std::runtime_error(std::string(what) + ": " + cusparseLtGetErrorName(status));
    }
  }
};

// The library and a handle, or null with a line that says why. Never closed: it may hold on to the CUDA context.
Lt* load_lt(const std::string& path) {
  std::vector<std::string> places;
  if (!path.empty()) places.push_back(path);
  places.push_back("libcusparseLt.so.0");
  void* library = nullptr;
  std::string reason;
  for (const std::string& place : places) {
    library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) {
      printf("cuSPARSELt: %s", place.c_str());
      break;
    }
    reason += std::string("\n  ") + dlerror();
  }
  if (library == nullptr) {
    printf("cuSPARSELt: not found%s\n", reason.c_str());
    return nullptr;
  }
  auto lt = std::make_unique<Lt>();
#define X(name)                                                          \
  lt->name = reinterpret_cast<decltype(&::name)>(dlsym(library, #name)); \
  if (lt->name == nullptr) {                                             \
    printf(": no function " #name "\n");                                 \
    return nullptr;                                                      \
  }
  SLOPE_LT_FUNCTIONS(X)
#undef X
  const cusparseStatus_t status = lt->cusparseLtInit(&lt->handle);
  if (status != CUSPARSE_STATUS_SUCCESS) {
    printf(": cusparseLtInit: %s\n", lt->cusparseLtGetErrorName(status));
    return nullptr;
  }
  int version = 0;
  lt->cusparseLtGetVersion(&lt->handle, &version);
  printf(", version %d\n", version);
  return lt.release();
}

#define LT(call) lt_.ok(lt_.call, #call)

class LtStructured {
 public:
  LtStructured(const Lt& lt, int64_t d_out, int64_t d_in, cudaDataType type) : lt_(lt) {
    LT(cusparseLtStructuredDescriptorInit(&lt_.handle, &descriptor_, d_out, d_in, d_in, 16, type, CUSPARSE_ORDER_ROW,
                                          CUSPARSELT_SPARSITY_50_PERCENT));
    try {
      LT(cusparseLtSpMMACompressedSize2(&lt_.handle, &descriptor_, &bytes_, &buffer_bytes_));
    } catch (...) {
      lt_.cusparseLtMatDescriptorDestroy(&descriptor_);
      throw;
    }
  }
  ~LtStructured() { lt_.cusparseLtMatDescriptorDestroy(&descriptor_); }
  LtStructured(const LtStructured&) = delete;
  LtStructured& operator=(const LtStructured&) = delete;
  size_t bytes() const { return bytes_; }

  void compress(const void* dense, void* compressed) {
    buffer_.need(buffer_bytes_);
    LT(cusparseLtSpMMACompress2(&lt_.handle, &descriptor_, 1, CUSPARSE_OPERATION_NON_TRANSPOSE, dense, compressed,
                                buffer_.get(), nullptr));
    OK(cudaDeviceSynchronize());
  }

 private:
  const Lt& lt_;
  cusparseLtMatDescriptor_t descriptor_;
  size_t bytes_ = 0, buffer_bytes_ = 0;
  Buffer buffer_;
};

// One product with one algorithm (-1: the library's own).
class LtPlan {
 public:
  LtPlan(const Lt& lt, int64_t n, int64_t d_out, int64_t d_in, cudaDataType type, int algorithm, const void* bias)
      : lt_(lt) {
    try {
      LT(cusparseLtStructuredDescriptorInit(&lt_.handle, &w_, d_out, d_in, d_in, 16, type, CUSPARSE_ORDER_ROW,
                                            CUSPARSELT_SPARSITY_50_PERCENT));
      made_ = 1;
      LT(cusparseLtDenseDescriptorInit(&lt_.handle, &x_, d_in, n, d_in, 16, type, CUSPARSE_ORDER_COL));
      made_ = 2;
      LT(cusparseLtDenseDescriptorInit(&lt_.handle, &y_, d_out, n, d_out, 16, type, CUSPARSE_ORDER_COL));
      made_ = 3;
      LT(cusparseLtMatmulDescriptorInit(&lt_.handle, &product_, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                        CUSPARSE_OPERATION_NON_TRANSPOSE, &w_, &x_, &y_, &y_, CUSPARSE_COMPUTE_32F));
      if (bias != nullptr) {
        LT(cusparseLtMatmulDescSetAttribute(&lt_.handle, &product_, CUSPARSELT_MATMUL_BIAS_POINTER, &bias,
                                            sizeof(bias)));
      }
      LT(cusparseLtMatmulAlgSelectionInit(&lt_.handle, &selection_, &product_, CUSPARSELT_MATMUL_ALG_DEFAULT));
      made_ = 4;
      LT(cusparseLtMatmulAlgGetAttribute(&lt_.handle, &selection_, CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID,
                                         &max_algorithm_, sizeof(max_algorithm_)));
      if (algorithm >= 0) {
        LT(cusparseLtMatmulAlgSetAttribute(&lt_.handle, &selection_, CUSPARSELT_MATMUL_ALG_CONFIG_ID, &algorithm,
                                           sizeof(algorithm)));
      }
      LT(cusparseLtMatmulPlanInit(&lt_.handle, &plan_, &product_, &selection_));
      made_ = 5;
      size_t workspace = 0;
      LT(cusparseLtMatmulGetWorkspace(&lt_.handle, &plan_, &workspace));
      workspace_.need(workspace);
    } catch (...) {
      destroy();
      throw;
    }
  }
  ~LtPlan() { destroy(); }
  LtPlan(const LtPlan&) = delete;
  LtPlan& operator=(const LtPlan&) = delete;
  int max_algorithm() const { return max_algorithm_; }

  const char* run(const void* compressed, const void* x, void* y, cudaStream_t stream) const {
    const float one = 1, nothing = 0;
    const cusparseStatus_t status = lt_.cusparseLtMatmul(&lt_.handle, &plan_, &one, compressed, x, &nothing, y, y,
                                                         workspace_.get(), &stream, 1);
    return status == CUSPARSE_STATUS_SUCCESS ? nullptr : lt_.cusparseLtGetErrorName(status);
  }

 private:
  void destroy() {
    if (made_ > 4) lt_.cusparseLtMatmulPlanDestroy(&plan_);
    if (made_ > 3) lt_.cusparseLtMatmulAlgSelectionDestroy(&selection_);
    if (made_ > 2) lt_.cusparseLtMatDescriptorDestroy(&y_);
    if (made_ > 1) lt_.cusparseLtMatDescriptorDestroy(&x_);
    if (made_ > 0) lt_.cusparseLtMatDescriptorDestroy(&w_);
    made_ = 0;
  }
  const Lt& lt_;
  cusparseLtMatDescriptor_t w_, x_, y_;
  cusparseLtMatmulDescriptor_t product_;
  cusparseLtMatmulAlgSelection_t selection_;
  cusparseLtMatmulPlan_t plan_;
  int made_ = 0, max_algorithm_ = 0;
  Buffer workspace_;
};

}  // namespace
