// bench, bench-small and fused: times by replayed CUDA graphs, the best of everything in turn.
#pragma once

#include "check.h"
#include "clocks.h"

namespace {

struct Contender {
  std::string name;
  int id = -1;  // of the configuration or of the algorithm
  Launch launch;
  double ms = NAN;
};

struct Bench {
  const Lt* lt;
  double deadline;
  size_t l2_bytes;
  FILE* csv;

  void row(const char* stage, const char* dtype, int64_t n, int64_t d_in, int64_t d_out, const std::string& name, double ms,
           int replays, int launches) const {
    if (csv == nullptr) return;
    fprintf(csv, "%s,%s,%lld,%lld,%lld,%s,%.6f,%d,%d\n", stage, dtype, (long long)n, (long long)d_in, (long long)d_out,
            name.c_str(), ms, replays, launches);
    fflush(csv);
  }

  template <typename T>
  void shape(int64_t n, int64_t d_in, int64_t d_out, bool small) const {
    const std::string place = text("n %5lld  %5lld -> %5lld", (long long)n, (long long)d_in, (long long)d_out);
    if (now() > deadline) {
      printf("%s  SKIP out of time\n", place.c_str());
      return;
    }
    attempt(place, [&] { measure<T>(place, n, d_in, d_out, small); });
    fflush(stdout);
  }

  template <typename T>
  void measure(const std::string& place, int64_t n, int64_t d_in, int64_t d_out, bool small) const {
    constexpr Dtype dtype = TypeOf<T>::dtype;
    Sets<T> data(lt, n, d_out, d_in, l2_bytes);
    Stream stream;
    const double flops = 2.0 * double(n) * double(d_in) * double(d_out);
    const double bytes = double(n) * double(d_in + d_out) * 2 + double(d_in) * double(d_out) * 1.125;
    const double guess = std::max(flops / 7e11, bytes / 3e9) + 0.004;  // ms
    const int few = std::max(data.count(), std::min(20, int(0.3 / guess) + 1));

    const auto screen = [&](Contender& c, const char* stage) {
      Graph graph(c.launch, few, data.count(), stream.get());
      graph.replay();
      std::vector<double> times;
      for (int i = 0; i < 3; ++i) times.push_back(graph.replay());
      c.ms = median(times);
      row(stage, TypeOf<T>::name, n, d_in, d_out, c.name, c.ms, 3, few);
    };

    // cuSPARSELt: all algorithms. The plans stay for the final round.
    std::vector<std::unique_ptr<LtPlan>> plans;
    Contender best_lt;
    int algorithms = 0, refused = 0;
    if (lt != nullptr) {
      int last = 0;
      try {
        last = LtPlan(*lt, n, d_out, d_in, TypeOf<T>::cuda, -1, nullptr).max_algorithm();
      } catch (const std::exception& error) {
        printf("%s  cuSPARSELt: %s\n", place.c_str(), error.what());
        last = 0;
      }
      for (int id = 0; id <= last && id < 200; ++id) {
        try {
          plans.push_back(std::make_unique<LtPlan>(*lt, n, d_out, d_in, TypeOf<T>::cuda, id, nullptr));
          const LtPlan* plan = plans.back().get();
          Contender c{text("cuSPARSELt id %d", id), id, [plan, &data](int set, cudaStream_t s) {
                        auto& one = data.sets[size_t(set)];
                        return plan->run(one.compressed.get(), one.x.get(), one.y.get(), s);
                      }};
          screen(c, "screen");
          ++algorithms;
          if (std::isnan(best_lt.ms) || c.ms < best_lt.ms) best_lt = c;
        } catch (const std::exception&) {  // the last id is exclusive in some versions, and not all take all shapes
          ++refused;
          recover();
        }
      }
    }

    // Ours: the best walk of each kernel.
    std::vector<Contender> kernels;
    for (int id = 0; id < sm90::config_count(); ++id) {
      const sm90::Config& c = sm90::config(id);
      bool repeats = false;
      const double share = padding(c, n, d_out, &repeats);
      if (repeats || (c.swizzle > 1 && share > 1.1)) continue;
      if ((!small && c.tile_n <= 64) || is_left_out(c.kernel)) continue;
      Contender contender{config_name(id), id, [id, n, d_out, d_in, &data](int set, cudaStream_t s) {
                            auto& one = data.sets[size_t(set)];
                            return sm90::run(id, Epilogue::none, dtype, one.x.get(), one.values.get(),
                                             one.e[int(sm90::config(id).metadata)].get(), nullptr, one.y.get(), nullptr,
                                             n, d_out, d_in, nullptr, s);
                          }};
      const bool done = attempt(place + " " + contender.name, [&] { screen(contender, "screen"); });
      if (!done) continue;
      if (kernels.empty() || sm90::config(kernels.back().id).kernel != c.kernel) {
        kernels.push_back(contender);
      } else if (contender.ms < kernels.back().ms) {
        kernels.back() = contender;
      }
    }
    if (kernels.empty()) return;
    std::sort(kernels.begin(), kernels.end(), [](const Contender& a, const Contender& b) { return a.ms < b.ms; });

    // The final round: replays in turn, so that all meet the same clocks.
    std::vector<Contender> finals;
    if (!std::isnan(best_lt.ms)) finals.push_back(best_lt);
    for (size_t i = 0; i < kernels.size() && i < 3; ++i) finals.push_back(kernels[i]);
    const int fastest = kernels[0].id;
    finals.push_back({config_name(fastest) + " bias", fastest, [fastest, n, d_out, d_in, &data](int set, cudaStream_t s) {
                        auto& one = data.sets[size_t(set)];
                        return sm90::run(fastest, Epilogue::bias, dtype, one.x.get(), one.values.get(),
                                         one.e[int(sm90::config(fastest).metadata)].get(), data.bias.get(), one.y.get(),
                                         nullptr, n, d_out, d_in, nullptr, s);
                      }});
    const bool hurry = now() > deadline;
    const int launches = std::max(data.count(), hurry ? 3 : 10), replays = hurry ? 5 : 20;
    std::vector<std::unique_ptr<Graph>> graphs;
    for (const Contender& c : finals) {
      graphs.push_back(std::make_unique<Graph>(c.launch, launches, data.count(), stream.get()));
      graphs.back()->replay();
    }
    std::vector<std::vector<double>> times(finals.size());
    for (int i = 0; i < replays; ++i) {
      for (size_t k = 0; k < finals.size(); ++k) times[k].push_back(graphs[k]->replay());
    }
    const double lt_ms = std::isnan(best_lt.ms) ? NAN : median(times[0]);
    printf("%s  %s  %d sets, %dx%d", place.c_str(), TypeOf<T>::name, data.count(), replays, launches);
    if (lt != nullptr) printf(", %d algorithms (%d refused)", algorithms, refused);
    for (size_t k = 0; k < finals.size(); ++k) {
      const double ms = median(times[k]);
      printf(" | %s %.4f ms %.0f TF", finals[k].name.c_str(), ms, flops / ms / 1e9);
      if (!(k == 0 && !std::isnan(best_lt.ms))) printf(" %.3fx", lt_ms / ms);
      row("final", TypeOf<T>::name, n, d_in, d_out, finals[k].name, ms, replays, launches);
    }
    if (!std::isnan(best_lt.ms)) {  // does the fastest agree with cuSPARSELt at this size
      Buffer largest(sizeof(unsigned));
      OK(cudaMemset(largest.get(), 0, sizeof(unsigned)));
      OK(cudaDeviceSynchronize());
      OK(best_lt.launch(0, stream.get()));
      OK(cudaStreamSynchronize(stream.get()));
      OK(cudaMemcpy(data.spare.get(), data.sets[0].y.get(), data.spare.size(), cudaMemcpyDeviceToDevice));
      OK(cudaMemset(data.sets[0].y.get(), 0xff, data.spare.size()));
      OK(cudaDeviceSynchronize());  // the streams here do not wait for the default one
      OK(kernels[0].launch(0, stream.get()));
      OK(cudaStreamSynchronize(stream.get()));
      difference_kernel<T><<<std::min(grid(n * d_out), 1056u), 256>>>(static_cast<const T*>(data.sets[0].y.get()),
                                                     static_cast<const T*>(data.spare.get()), n * d_out,
                                                     static_cast<unsigned*>(largest.get()));
      OK(cudaGetLastError());
      float difference = 0;
      OK(cudaMemcpy(&difference, largest.get(), sizeof(float), cudaMemcpyDeviceToHost));
      printf(" | differ by %.3g at most", difference);
      if (!(difference < 0.1f)) fail(place + ": differs from cuSPARSELt");
    }
    printf("\n    screened:");
    if (!std::isnan(best_lt.ms)) printf(" %s %.4f", best_lt.name.c_str(), best_lt.ms);
    for (const Contender& c : kernels) printf(" | %s %.4f %.3fx", c.name.c_str(), c.ms, best_lt.ms / c.ms);
    printf("\n");
  }

  // What a call costs the host, with the device kept out of the way by a tiny product.
  void host() const {
    attempt("host time", [&] {
      using T = __nv_bfloat16;
      Case<T> data(16, 256, 256, 5);
      Stream stream;
      const auto time = [&](const char* name, const std::function<const char*()>& call) {
        std::vector<double> times;
        for (int round = 0; round < 9; ++round) {
          const double start = now();
          for (int i = 0; i < 100; ++i) OK(call());
          times.push_back((now() - start) * 1e6 / 100);
          OK(cudaStreamSynchronize(stream.get()));
        }
        printf("host: %s %.2f us a call\n", name, median(times));
        row("host_us", "bf16", 16, 256, 256, name, median(times), 9, 100);
      };
      for (int id = 0; id < sm90::config_count(); id += sm90::config_count() / sm90::kernel_count()) {
        if (is_left_out(sm90::config(id).kernel)) continue;
        time(sm90::config(id).name, [&] {
          return sm90::run(id, Epilogue::none, Dtype::bf16, data.x.get(), data.values.get(),
                           data.e[int(sm90::config(id).metadata)].get(), nullptr, data.y(), nullptr, data.n, data.d_out,
                           data.d_in, nullptr, stream.get());
        });
      }
      if (lt != nullptr) {
        Buffer dense(size_t(data.d_out * data.d_in) * sizeof(T));
        expand<T>(data.values.get(), data.indices.get(), dense.get(), data.d_out, data.d_in);
        LtStructured structured(*lt, data.d_out, data.d_in, CUDA_R_16BF);
        Buffer compressed(structured.bytes());
        structured.compress(dense.get(), compressed.get());
        LtPlan plan(*lt, data.n, data.d_out, data.d_in, CUDA_R_16BF, -1, nullptr);
        time("cusparseLtMatmul (plan kept)",
             [&] { return plan.run(compressed.get(), data.x.get(), data.y(), stream.get()); });
      }
    });
  }

  void large() const {
    printf("== bench: TF counts the dense product's operations; x is cuSPARSELt's time over ours\n");
    host();
    const int64_t shapes[][3] = {
        // tokens, d_in, d_out; with the exchanged ones that the backward pass needs
        {32768, 768, 768},   {32768, 768, 2304},  {32768, 2304, 768},   {32768, 768, 3072},   {32768, 3072, 768},
        {32768, 1024, 1024}, {32768, 1024, 3072}, {32768, 3072, 1024},  {32768, 1024, 4096},  {32768, 4096, 1024},
        {16384, 1536, 1536}, {16384, 1536, 4608}, {16384, 4608, 1536},  {16384, 1536, 6144},  {16384, 6144, 1536},
        {16384, 4096, 4096}, {16384, 4096, 14336}, {16384, 14336, 4096}, {16384, 5120, 5120}, {16384, 5120, 20480},
        {16384, 20480, 5120}, {8192, 9216, 9216}, {8192, 9216, 36864},  {8192, 36864, 9216}};
    for (const auto& s : shapes) shape<__nv_bfloat16>(s[0], s[1], s[2], false);
    shape<__half>(32768, 1024, 4096, false);
    shape<__half>(16384, 4096, 4096, false);
  }

  // The fused epilogues of the library's kernels beside what they replace: the best of the same kernels, then a pass. Both by
  // their best walk. `x` is the time of those two over the fused one's.
  template <typename T>
  void measure_fused(const std::string& place, int64_t n, int64_t d_in, int64_t d_out) const {
    constexpr Dtype dtype = TypeOf<T>::dtype;
    Sets<T> data(nullptr, n, d_out, d_in, l2_bytes);
    std::vector<Buffer> aux;
    for (int i = 0; i < data.count(); ++i) {
      aux.emplace_back(size_t(n * d_out) * sizeof(T));
      fill_normal<T>(aux.back().get(), n * d_out, uint64_t(400 + i), 1.0f);
    }
    OK(cudaDeviceSynchronize());
    Stream stream;
    const int64_t eighths = n * d_out / 8;  // d_out is a multiple of 16
    const unsigned blocks = unsigned(std::min<int64_t>((eighths + 255) / 256, 1 << 20));

    const auto product = [&](int id, Epilogue epilogue, bool into_aux) -> Launch {
      return [=, &data, &aux](int set, cudaStream_t s) {
        auto& one = data.sets[size_t(set)];
        void* second = aux[size_t(set)].get();
        return sm90::run(id, epilogue, dtype, one.x.get(), one.values.get(), one.e[int(sm90::config(id).metadata)].get(),
                         data.bias.get(), into_aux ? second : one.y.get(), into_aux ? nullptr : second, n, d_out, d_in,
                         nullptr, s);
      };
    };
    const auto pass = [&](Epilogue epilogue) -> Launch {
      return [=, &data, &aux](int set, cudaStream_t s) -> const char* {
        auto* y = static_cast<Eight<T>*>(data.sets[size_t(set)].y.get());
        auto* other = static_cast<Eight<T>*>(aux[size_t(set)].get());
        switch (epilogue) {
          case Epilogue::bias_gelu:
            gelu_pass_kernel<T, sm90::ErfGelu><<<blocks, 256, 0, s>>>(other, y, eighths);
            break;
          case Epilogue::bias_gelu_tanh:
            gelu_pass_kernel<T, sm90::TanhGelu><<<blocks, 256, 0, s>>>(other, y, eighths);
            break;
          case Epilogue::gelu_gradient:
            gradient_pass_kernel<T, sm90::ErfGelu><<<blocks, 256, 0, s>>>(y, other, eighths);
            break;
          default:
            gradient_pass_kernel<T, sm90::TanhGelu><<<blocks, 256, 0, s>>>(y, other, eighths);
        }
        const cudaError_t status = cudaGetLastError();
        return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
      };
    };
    // The best walk of each of the library's kernels.
    const auto search = [&](Epilogue epilogue, bool into_aux, const char* label) {
      std::vector<Contender> kernels;
      const int few = std::max(data.count(), 2);
      for (int id = 0; id < sm90::config_count(); ++id) {
        const sm90::Config& c = sm90::config(id);
        bool repeats = false;
        const double share = padding(c, n, d_out, &repeats);
        if (repeats || (c.swizzle > 1 && share > 1.1)) continue;
        if (is_left_out(c.kernel) || sm90::fused_stages(id, kFused[0]) == 0) continue;
        Contender contender{config_name(id) + " " + label, id, product(id, epilogue, into_aux)};
        const bool done = attempt(place + " " + contender.name, [&] {
          Graph graph(contender.launch, few, data.count(), stream.get());
          graph.replay();
          contender.ms = median({graph.replay(), graph.replay(), graph.replay()});
          row("screen", TypeOf<T>::name, n, d_in, d_out, contender.name, contender.ms, 3, few);
        });
        if (!done) continue;
        if (kernels.empty() || sm90::config(kernels.back().id).kernel != c.kernel) {
          kernels.push_back(contender);
        } else if (contender.ms < kernels.back().ms) {
          kernels.back() = contender;
        }
      }
      std::sort(kernels.begin(), kernels.end(), [](const Contender& a, const Contender& b) { return a.ms < b.ms; });
      return kernels;
    };

    for (bool forward : {true, false}) {
      const auto plain = search(forward ? Epilogue::bias : Epilogue::none, forward, forward ? "bias" : "none");
      if (plain.empty()) return;
      for (Epilogue epilogue : kFused) {
        if (is_forward(epilogue) != forward) continue;
        const auto fused = search(epilogue, false, fused_name(epilogue));
        const Launch first = plain[0].launch, second = pass(epilogue);
        std::vector<Contender> finals = {plain[0],
                                         {plain[0].name + " + pass " + fused_name(epilogue), -1,
                                          [first, second](int set, cudaStream_t s) {
                                            const char* error = first(set, s);
                                            return error != nullptr ? error : second(set, s);
                                          }}};
        finals.insert(finals.end(), fused.begin(), fused.end());
        const int launches = std::max(data.count(), 5), replays = 10;
        std::vector<std::unique_ptr<Graph>> graphs;
        for (const Contender& c : finals) {
          graphs.push_back(std::make_unique<Graph>(c.launch, launches, data.count(), stream.get()));
          graphs.back()->replay();
        }
        std::vector<std::vector<double>> times(finals.size());
        for (int i = 0; i < replays; ++i) {
          for (size_t k = 0; k < finals.size(); ++k) times[k].push_back(graphs[k]->replay());
        }
        printf("%s  %s  %-18s", place.c_str(), TypeOf<T>::name, fused_name(epilogue));
        const double two = median(times[1]);
        for (size_t k = 0; k < finals.size(); ++k) {
          const double ms = median(times[k]);
          if (k == 1) {
            printf(" | + pass %.4f", ms);
          } else if (k == 0) {
            printf(" | %s %.4f", finals[k].name.c_str(), ms);
          } else {
            printf(" | %s %d stages %.4f %.3fx", config_name(finals[k].id).c_str(), sm90::fused_stages(finals[k].id, epilogue),
                   ms, two / ms);
          }
          row("fused", TypeOf<T>::name, n, d_in, d_out, finals[k].name, ms, replays, launches);
        }
        // At this size, too, they must agree; the backward pass needs its aux as it was for both.
        if (!fused.empty()) {
          Buffer largest(sizeof(unsigned));
          OK(cudaMemset(largest.get(), 0, sizeof(unsigned)));
          fill_normal<T>(aux[0].get(), n * d_out, 400, 1.0f);
          OK(cudaDeviceSynchronize());
          OK(finals[1].launch(0, stream.get()));
          OK(cudaStreamSynchronize(stream.get()));
          OK(cudaMemcpy(data.spare.get(), data.sets[0].y.get(), data.spare.size(), cudaMemcpyDeviceToDevice));
          OK(cudaMemset(data.sets[0].y.get(), 0xff, data.spare.size()));
          OK(cudaDeviceSynchronize());
          OK(fused[0].launch(0, stream.get()));
          OK(cudaStreamSynchronize(stream.get()));
          difference_kernel<T><<<std::min(grid(n * d_out), 1056u), 256>>>(
              static_cast<const T*>(data.sets[0].y.get()), static_cast<const T*>(data.spare.get()), n * d_out,
              static_cast<unsigned*>(largest.get()));
          OK(cudaGetLastError());
          float difference = 0;
          OK(cudaMemcpy(&difference, largest.get(), sizeof(float), cudaMemcpyDeviceToHost));
          printf(" | differ by %.3g at most", difference);
          if (!(difference < 0.1f)) fail(place + " " + fused_name(epilogue) + ": differs from two steps");
        }
        printf("\n");
      }
    }
  }

  void fused() const {
    printf("== fused: ms; x is the time of product and pass over the fused kernel's\n");
    // tokens, d_in, d_out: forward the up projection, backward the down projection's gradient, of the same shape
    const int64_t shapes[][3] = {{32768, 768, 3072}, {32768, 1024, 4096}, {16384, 1536, 6144}};
    for (const auto& s : shapes) {
      const std::string place = text("n %5lld  %5lld -> %5lld", (long long)s[0], (long long)s[1], (long long)s[2]);
      if (now() > deadline) {
        printf("%s  SKIP out of time\n", place.c_str());
        continue;
      }
      attempt(place, [&] { measure_fused<__nv_bfloat16>(place, s[0], s[1], s[2]); });
      fflush(stdout);
    }
  }

  void few_tokens() const {
    printf("== bench-small: few tokens\n");
    for (const auto& s : {std::pair<int64_t, int64_t>{4096, 14336}, {14336, 4096}}) {
      for (int64_t n : {8, 16, 64, 128, 512}) shape<__nv_bfloat16>(n, s.first, s.second, true);
    }
  }
};

}  // namespace
