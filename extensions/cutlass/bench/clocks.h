// Streams, events and graphs that a launch is timed with, and inputs to rotate over.
#pragma once

#include "cusparselt.h"

namespace {

using Launch = std::function<const char*(int set, cudaStream_t)>;

class Stream {
 public:
  Stream() { OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_;
};

class Events {
 public:
  Events() {
    OK(cudaEventCreate(&from_));
    OK(cudaEventCreate(&to_));
  }
  ~Events() {
    cudaEventDestroy(from_);
    cudaEventDestroy(to_);
  }
  cudaEvent_t from_, to_;
};

// `launches` launches in turn over the sets, captured once.
class Graph {
 public:
  Graph(const Launch& launch, int launches, int sets, cudaStream_t stream) : launches_(launches), stream_(stream) {
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    const char* error = nullptr;
    for (int i = 0; i < launches && error == nullptr; ++i) error = launch(i % sets, stream);
    cudaGraph_t graph = nullptr;
    const cudaError_t status = cudaStreamEndCapture(stream, &graph);
    if (error == nullptr && status == cudaSuccess) {
      const cudaError_t made = cudaGraphInstantiate(&executable_, graph, 0);
      cudaGraphDestroy(graph);
      OK(made);
      return;
    }
    if (graph != nullptr) cudaGraphDestroy(graph);
    ok(error, "launch");
    OK(status);
  }
  ~Graph() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  double replay() {  // milliseconds a launch
    OK(cudaEventRecord(events_.from_, stream_));
    OK(cudaGraphLaunch(executable_, stream_));
    OK(cudaEventRecord(events_.to_, stream_));
    OK(cudaEventSynchronize(events_.to_));
    float ms = 0;
    OK(cudaEventElapsedTime(&ms, events_.from_, events_.to_));
    return double(ms) / launches_;
  }

 private:
  int launches_;
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
  Events events_;
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? NAN : (v[(v.size() - 1) / 2] + v[v.size() / 2]) / 2;
}

// Weights and activations of one product, several times over: together they do not fit in L2.
template <typename T>
struct Sets {
  struct Set {
    Buffer x, values, indices, e[2], compressed, y;
  };
  std::vector<Set> sets;
  Buffer bias, spare;

  Sets(const Lt* lt, int64_t n, int64_t d_out, int64_t d_in, size_t l2_bytes) {
    const size_t one = size_t(n * (d_in + d_out)) * sizeof(T) + size_t(d_out * d_in / 2) * sizeof(T);
    const int count = int(std::min<size_t>(8, std::max<size_t>(1, (4 * l2_bytes + one - 1) / one)));
    bias = Buffer(size_t(d_out) * sizeof(T));
    fill_normal<T>(bias.get(), d_out, 99, 1.0f);
    spare = Buffer(size_t(n * d_out) * sizeof(T));
    Buffer dense;
    if (lt != nullptr) dense = Buffer(size_t(d_out * d_in) * sizeof(T));
    for (int i = 0; i < count; ++i) {
      Set s;
      s.x = Buffer(size_t(n * d_in) * sizeof(T));
      s.values = Buffer(size_t(d_out * d_in / 2) * sizeof(T));
      s.indices = Buffer(size_t(d_out * d_in / 8));
      s.y = Buffer(size_t(n * d_out) * sizeof(T));
      fill_normal<T>(s.x.get(), n * d_in, uint64_t(100 + i), 1.0f);
      fill_normal<T>(s.values.get(), d_out * d_in / 2, uint64_t(200 + i), float(std::sqrt(2.0 / double(d_in))), true);
      fill_indices(s.indices.get(), d_out * d_in / 8, uint64_t(300 + i));
      for (Metadata order : {Metadata::k128, Metadata::k64}) {
        s.e[int(order)] = Buffer(sm90::metadata_bytes(order, d_out, d_in));
        OK(sm90::build_metadata(order, s.indices.bytes(), s.e[int(order)].get(), d_out, d_in, nullptr));
      }
      if (lt != nullptr) {
        LtStructured structured(*lt, d_out, d_in, TypeOf<T>::cuda);
        s.compressed = Buffer(structured.bytes());
        expand<T>(s.values.get(), s.indices.get(), dense.get(), d_out, d_in);
        structured.compress(dense.get(), s.compressed.get());
      }
      sets.push_back(std::move(s));
    }
    OK(cudaDeviceSynchronize());
  }
  int count() const { return int(sets.size()); }
};

// The share of work that a walk adds: the scheduler rounds both directions up to whole bands of clusters.
double padding(const sm90::Config& c, int64_t n, int64_t d_out, bool* repeats) {
  const auto up = [](int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; };
  const int64_t tiles_m = up((d_out + c.tile_m - 1) / c.tile_m, c.cluster_m);
  const int64_t tiles_n = up((n + c.tile_n - 1) / c.tile_n, c.cluster_n);
  const int64_t least = std::min(tiles_m, tiles_n);
  const int swizzle = c.swizzle >= 8 && least >= 6 ? 8 : c.swizzle >= 4 && least >= 3 ? 4 : c.swizzle >= 2 && least >= 2 ? 2 : 1;
  *repeats = swizzle != c.swizzle;  // the scheduler takes a smaller one, which is measured by itself
  return double(up(tiles_m, swizzle * c.cluster_m) * up(tiles_n, swizzle * c.cluster_n)) / double(tiles_m * tiles_n);
}

}  // namespace
