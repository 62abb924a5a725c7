// cuSPARSELt with its set-up kept: a handle per device and thread, and plans that live across calls.
#pragma once

#include <cuda_runtime_api.h>
#include <cusparseLt.h>

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>

namespace slope {

// Everything that a plan depends on. Y (n, d_out) = X (n, d_in) W^T + bias, all row-major; `ld` is the row stride of X.
struct PlanKey {
  int64_t n, d_out, d_in, ld;
  int64_t algorithm;  // -1: the library's own choice
  int64_t split_k, split_k_mode;
  const void* bias;  // part of the plan: the library reads the pointer when the plan is made
  cudaDataType dtype;

  bool operator==(const PlanKey& other) const;
};

struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const;
};

// Descriptors and plan of one product; they refer to each other, so they stay where they are.
class Plan {
 public:
  Plan(const cusparseLtHandle_t* handle, const PlanKey& key);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void run(const cusparseLtHandle_t* handle, const void* operand, const void* x, void* y, void* workspace,
           cudaStream_t stream) const;
  size_t workspace_bytes() const { return workspace_bytes_; }
  size_t operand_bytes() const { return operand_bytes_; }
  int max_algorithm() const { return max_algorithm_; }

 private:
  void destroy();

  cusparseLtMatDescriptor_t w_, x_, y_;
  cusparseLtMatmulDescriptor_t product_;
  cusparseLtMatmulAlgSelection_t selection_;
  cusparseLtMatmulPlan_t plan_;
  int made_ = 0;  // how many of the five objects exist, in the order they are made
  size_t workspace_bytes_ = 0, operand_bytes_ = 0;
  int max_algorithm_ = 0;
};

// One handle and its plans, used by one thread at a time: cuSPARSELt's handles are not to be shared between threads, and
// the backward pass runs on another one than the forward.
class Session {
 public:
  Session();  // for the current device
  const Plan& plan(const PlanKey& key);
  const cusparseLtHandle_t* handle() const { return &handle_; }
  size_t plans() const { return plans_.size(); }

  // The calling thread's session for a device. A thread that ends leaves its sessions to the next one.
  static Session& current(int device);

 private:
  struct Entry {
    PlanKey key;
    std::unique_ptr<Plan> plan;
  };
  using Order = std::list<Entry>;

  cusparseLtHandle_t handle_;
  Order order_;  // most recently used first
  std::unordered_map<PlanKey, Order::iterator, PlanKeyHash> plans_;
};

// The library's own compression of a 16-bit W (d_out, d_in), for the layout of its metadata.
class Compression {
 public:
  Compression(Session& session, int64_t d_out, int64_t d_in, cudaDataType dtype);
  ~Compression() { cusparseLtMatDescriptorDestroy(&descriptor_); }
  Compression(const Compression&) = delete;
  Compression& operator=(const Compression&) = delete;

  size_t operand_bytes() const { return operand_bytes_; }  // values, then metadata
  size_t buffer_bytes() const { return buffer_bytes_; }
  // Compresses the dense matrix `markers`; `buffer` is scratch of `buffer_bytes`.
  void run(const void* markers, void* compressed, void* buffer, cudaStream_t stream) const;

 private:
  const cusparseLtHandle_t* handle_;
  cusparseLtMatDescriptor_t descriptor_;
  size_t operand_bytes_ = 0, buffer_bytes_ = 0;
};

// Throws std::runtime_error that names the call and the library's reason.
void check(cusparseStatus_t status, const char* what);
void check(cudaError_t status, const char* what);

}  // namespace slope
