// What all parts of the bench share: failures that do not end it, device memory, and the headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cusparseLt.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../gelu.h"
#include "../metadata.h"
#include "../spmm_sm90.h"

#if !defined(SLOPE_SM90_ALL)
#error "the bench is built with SLOPE_SM90_ALL"
#endif

namespace {

namespace sm90 = slope::sm90;
using sm90::Dtype;
using sm90::Epilogue;
using sm90::Metadata;

int failures = 0;
std::vector<int> left_out;  // kernels, by number

bool is_left_out(int kernel) { return std::find(left_out.begin(), left_out.end(), kernel) != left_out.end(); }

std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

void fail(const std::string& what) {
  constexpr int kShown = 60;
  ++failures;
  if (failures <= kShown) printf("FAIL %s%s\n", what.c_str(), failures == kShown ? " (no more of them are shown)" : "");
}

void ok(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
void ok(const char* error, const char* what) {
  if (error != nullptr) throw std::runtime_error(std::string(what) + ": " + error);
}
#define OK(call) ok((call), #call)

// Clears an error that an attempt has left; ends the program if the device cannot be used any more.
void recover() {
  cudaGetLastError();
  const cudaError_t status = cudaDeviceSynchronize();
  if (status == cudaSuccess) return;
  cudaGetLastError();
  if (cudaFree(nullptr) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess) return;
  printf("FAIL the device is lost: %s\n", cudaGetErrorString(status));
  fflush(stdout);
  _Exit(99);
}

// Runs one case; what goes wrong in it is printed and does not end the others.
template <typename F>
bool attempt(const std::string& what, F&& f) {
  try {
    f();
    return true;
  } catch (const std::exception& error) {
    fail(what + ": " + error.what());
    recover();
    return false;
  }
}

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    if (bytes > 0) OK(cudaMalloc(&pointer_, bytes));
  }
  ~Buffer() { cudaFree(pointer_); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  void* get() const { return pointer_; }
  uint8_t* bytes() const { return static_cast<uint8_t*>(pointer_); }
  size_t size() const { return bytes_; }
  void need(size_t bytes) {
    if (bytes_ < bytes) {
      Buffer fresh(bytes);
      swap(fresh);
    }
  }

 private:
  void swap(Buffer& other) {
    std::swap(pointer_, other.pointer_);
    std::swap(bytes_, other.bytes_);
  }
  void* pointer_ = nullptr;
  size_t bytes_ = 0;
};

std::vector<uint8_t> to_host(const void* pointer, size_t bytes) {
  std::vector<uint8_t> host(bytes);
  OK(cudaMemcpy(host.data(), pointer, bytes, cudaMemcpyDeviceToHost));
  return host;
}

}  // namespace
