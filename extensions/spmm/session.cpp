#include "session.h"

#include <functional>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace slope {
namespace {

// Plans of one thread and device. Training uses a few per layer; varying token counts push the oldest out.
constexpr size_t kMaxPlans = 1024;
constexpr uint32_t kAlignment = 16;

// Sessions outlive their threads and are never destroyed: at process exit the CUDA context may be gone before them.
struct Pool {
  std::mutex mutex;
  std::unordered_map<int, std::vector<std::unique_ptr<Session>>> idle;
};

Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

// A thread's sessions, one a device; handed back when the thread ends.
struct Lease {
  std::unordered_map<int, std::unique_ptr<Session>> sessions;

  ~Lease() {
    std::lock_guard<std::mutex> lock(pool().mutex);
    for (auto& [device, session] : sessions) pool().idle[device].push_back(std::move(session));
  }
};

}  // namespace

void check(cusparseStatus_t status, const char* what) {
  if (status != CUSPARSE_STATUS_SUCCESS) {
    throw std::runtime_error(std::string(what) + ": " + cusparseLtGetErrorName(status) + " (" +
                             cusparseLtGetErrorString(status) + ")");
  }
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

bool PlanKey::operator==(const PlanKey& o) const {
  return n == o.n && d_out == o.d_out && d_in == o.d_in && ld == o.ld && algorithm == o.algorithm &&
         split_k == o.split_k && split_k_mode == o.split_k_mode && bias == o.bias && dtype == o.dtype;
}

size_t PlanKeyHash::operator()(const PlanKey& key) const {
  size_t seed = 0;
  for (int64_t part : {key.n, key.d_out, key.d_in, key.ld, key.algorithm, key.split_k, key.split_k_mode,
                       int64_t(reinterpret_cast<intptr_t>(key.bias)), int64_t(key.dtype)}) {
    seed ^= std::hash<int64_t>{}(part) + 0x9e3779b97f4a7c15ULL + (seed << 6) + (seed >> 2);
  }
  return seed;
}

// The sparse operand comes first in cuSPARSELt, so the product is made transposed: Y^T (d_out, n) = W (d_out, d_in)
// X^T (d_in, n). X^T and Y^T column-major are X and Y row-major: nothing is copied.
Plan::Plan(const cusparseLtHandle_t* handle, const PlanKey& key) {
  try {
    check(cusparseLtStructuredDescriptorInit(handle, &w_, key.d_out, key.d_in, key.d_in, kAlignment, key.dtype,
                                             CUSPARSE_ORDER_ROW, CUSPARSELT_SPARSITY_50_PERCENT),
          "cusparseLtStructuredDescriptorInit");
    ++made_;
    check(cusparseLtDenseDescriptorInit(handle, &x_, key.d_in, key.n, key.ld, kAlignment, key.dtype,
                                        CUSPARSE_ORDER_COL),
          "cusparseLtDenseDescriptorInit (input)");
    ++made_;
    check(cusparseLtDenseDescriptorInit(handle, &y_, key.d_out, key.n, key.d_out, kAlignment, key.dtype,
                                        CUSPARSE_ORDER_COL),
          "cusparseLtDenseDescriptorInit (output)");
    ++made_;
    check(cusparseLtMatmulDescriptorInit(handle, &product_, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                         CUSPARSE_OPERATION_NON_TRANSPOSE, &w_, &x_, &y_, &y_, CUSPARSE_COMPUTE_32F),
          "cusparseLtMatmulDescriptorInit");
    if (key.bias != nullptr) {
      check(cusparseLtMatmulDescSetAttribute(handle, &product_, CUSPARSELT_MATMUL_BIAS_POINTER, &key.bias,
                                             sizeof(key.bias)),
            "cusparseLtMatmulDescSetAttribute (bias)");
    }
    check(cusparseLtMatmulAlgSelectionInit(handle, &selection_, &product_, CUSPARSELT_MATMUL_ALG_DEFAULT),
          "cusparseLtMatmulAlgSelectionInit");
    ++made_;
    check(cusparseLtMatmulAlgGetAttribute(handle, &selection_, CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID, &max_algorithm_,
                                          sizeof(max_algorithm_)),
          "cusparseLtMatmulAlgGetAttribute (max id)");
    if (key.algorithm >= 0) {
      const int id = int(key.algorithm);
      check(cusparseLtMatmulAlgSetAttribute(handle, &selection_, CUSPARSELT_MATMUL_ALG_CONFIG_ID, &id, sizeof(id)),
            "cusparseLtMatmulAlgSetAttribute (id)");
    }
    if (key.split_k > 1) {
      const int parts = int(key.split_k);
      const auto mode = static_cast<cusparseLtSplitKMode_t>(key.split_k_mode);
      check(cusparseLtMatmulAlgSetAttribute(handle, &selection_, CUSPARSELT_MATMUL_SPLIT_K, &parts, sizeof(parts)),
            "cusparseLtMatmulAlgSetAttribute (split-k)");
      check(cusparseLtMatmulAlgSetAttribute(handle, &selection_, CUSPARSELT_MATMUL_SPLIT_K_MODE, &mode, sizeof(mode)),
            "cusparseLtMatmulAlgSetAttribute (split-k mode)");
    }
    check(cusparseLtMatmulPlanInit(handle, &plan_, &product_, &selection_), "cusparseLtMatmulPlanInit");
    ++made_;
    check(cusparseLtMatmulGetWorkspace(handle, &plan_, &workspace_bytes_), "cusparseLtMatmulGetWorkspace");
    size_t buffer = 0;
    check(cusparseLtSpMMACompressedSize2(handle, &w_, &operand_bytes_, &buffer), "cusparseLtSpMMACompressedSize2");
  } catch (...) {
    destroy();
    throw;
  }
}

Plan::~Plan() { destroy(); }

void Plan::destroy() {
  if (made_ > 4) cusparseLtMatmulPlanDestroy(&plan_);
  if (made_ > 3) cusparseLtMatmulAlgSelectionDestroy(&selection_);
  if (made_ > 2) cusparseLtMatDescriptorDestroy(&y_);
  if (made_ > 1) cusparseLtMatDescriptorDestroy(&x_);
  if (made_ > 0) cusparseLtMatDescriptorDestroy(&w_);
  made_ = 0;
}

void Plan::run(const cusparseLtHandle_t* handle, const void* operand, const void* x, void* y, void* workspace,
               cudaStream_t stream) const {
  const float one = 1.0f, nothing = 0.0f;
  check(cusparseLtMatmul(handle, &plan_, &one, operand, x, &nothing, y, y, workspace, &stream, 1), "cusparseLtMatmul");
}

Session::Session() { check(cusparseLtInit(&handle_), "cusparseLtInit"); }

const Plan& Session::plan(const PlanKey& key) {
  const auto found = plans_.find(key);
  if (found != plans_.end()) {
    if (found->second != order_.begin()) order_.splice(order_.begin(), order_, found->second);
    return *found->second->plan;
  }
  order_.push_front({key, std::make_unique<Plan>(&handle_, key)});
  plans_.emplace(key, order_.begin());
  if (plans_.size() > kMaxPlans) {
    plans_.erase(order_.back().key);
    order_.pop_back();
  }
  return *order_.front().plan;
}

Session& Session::current(int device) {
  thread_local Lease lease;
  auto& mine = lease.sessions[device];
  if (mine == nullptr) {
    // A new thread (autograd's, say) has no current context yet, which the library takes for granted.
    check(cudaSetDevice(device), "cudaSetDevice");
    {
      std::lock_guard<std::mutex> lock(pool().mutex);
      auto& idle = pool().idle[device];
      if (!idle.empty()) {
        mine = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (mine == nullptr) mine = std::make_unique<Session>();
  }
  return *mine;
}

Compression::Compression(Session& session, int64_t d_out, int64_t d_in, cudaDataType dtype)
    : handle_(session.handle()) {
  check(cusparseLtStructuredDescriptorInit(handle_, &descriptor_, d_out, d_in, d_in, kAlignment, dtype,
                                           CUSPARSE_ORDER_ROW, CUSPARSELT_SPARSITY_50_PERCENT),
        "cusparseLtStructuredDescriptorInit");
  check(cusparseLtSpMMACompressedSize2(handle_, &descriptor_, &operand_bytes_, &buffer_bytes_),
        "cusparseLtSpMMACompressedSize2");
}

void Compression::run(const void* markers, void* compressed, void* buffer, cudaStream_t stream) const {
  check(cusparseLtSpMMACompress2(handle_, &descriptor_, /*isSparseA=*/1, CUSPARSE_OPERATION_NON_TRANSPOSE, markers,
                                 compressed, buffer, stream),
        "cusparseLtSpMMACompress2");
}

}  // namespace slope
