// check: every configuration against float64, the fused epilogues last, and what must be refused.
#pragma once

#include "data.h"

namespace {

constexpr size_t kGuard = 4096;

// One product's inputs, its float64 result and a guarded output.
template <typename T>
struct Case {
  int64_t n, d_out, d_in;
  Buffer x, values, indices, bias, guarded, exact, dense, counters, e[2];

  Case(int64_t n_, int64_t d_in_, int64_t d_out_, uint64_t seed)
      : n(n_),
        d_out(d_out_),
        d_in(d_in_),
        x(size_t(n * d_in) * sizeof(T)),
        values(size_t(d_out * d_in / 2) * sizeof(T)),
        indices(size_t(d_out * d_in / 8)),
        bias(size_t(d_out) * sizeof(T)),
        guarded(size_t(n * d_out) * sizeof(T) + 2 * kGuard),
        exact(size_t(n * d_out) * sizeof(double)),
        dense(size_t(n * d_out) * sizeof(T)),
        counters(3 * sizeof(unsigned long long)) {
    fill_normal<T>(x.get(), n * d_in, seed, 1.0f);
    fill_normal<T>(values.get(), d_out * d_in / 2, seed + 1, float(std::sqrt(2.0 / double(d_in))), true);
    fill_normal<T>(bias.get(), d_out, seed + 2, 1.0f);
    fill_indices(indices.get(), d_out * d_in / 8, seed + 3);
    for (Metadata order : {Metadata::k128, Metadata::k64}) {
      Buffer& target = e[int(order)];
      target = Buffer(sm90::metadata_bytes(order, d_out, d_in));
      OK(sm90::build_metadata(order, indices.bytes(), target.get(), d_out, d_in, nullptr));
    }
    OK(cudaDeviceSynchronize());
  }

  void* y() const { return guarded.bytes() + kGuard; }

  void refer(bool with_bias) {
    reference_kernel<T><<<grid(n * d_out), 256>>>(
        static_cast<const T*>(x.get()), static_cast<const T*>(values.get()), indices.bytes(),
        with_bias ? static_cast<const T*>(bias.get()) : nullptr, static_cast<double*>(exact.get()),
        static_cast<T*>(dense.get()), n, d_out, d_in);
    OK(cudaGetLastError());
    OK(cudaDeviceSynchronize());
  }

  void clear() { OK(cudaMemset(guarded.get(), 0xff, guarded.size())); }  // NaN in both dtypes

  struct Errors {
    double ours, dense;
    bool guard_kept;
    bool passed() const { return guard_kept && ours <= 2 * dense + 1e-30; }
  };
  Errors errors() { return compare(guarded, exact, dense); }

  // The same for any guarded output of this size.
  Errors compare(const Buffer& output, const Buffer& right, const Buffer& of_dense) {
    OK(cudaMemset(counters.get(), 0, counters.size()));
    auto* counts = static_cast<unsigned long long*>(counters.get());
    error_kernel<T><<<std::min(grid(n * d_out), 132u), 256>>>(reinterpret_cast<const T*>(output.bytes() + kGuard),
                                                              static_cast<const T*>(of_dense.get()),
                                                              static_cast<const double*>(right.get()), n * d_out, counts);
    OK(cudaGetLastError());
    guard_kernel<<<grid(kGuard), 256>>>(output.bytes(), kGuard, counts + 2);
    OK(cudaGetLastError());
    guard_kernel<<<grid(kGuard), 256>>>(output.bytes() + output.size() - kGuard, kGuard, counts + 2);
    OK(cudaGetLastError());
    unsigned long long host[3];
    OK(cudaMemcpy(host, counts, sizeof(host), cudaMemcpyDeviceToHost));
    Errors result{};
    std::memcpy(&result.ours, &host[0], 8);
    std::memcpy(&result.dense, &host[1], 8);
    result.guard_kept = host[2] == 0;
    return result;
  }

  const char* run(int config, Epilogue epilogue, const void* metadata, void* aux = nullptr) {
    return sm90::run(config, epilogue, TypeOf<T>::dtype, x.get(), values.get(), metadata, bias.get(), y(), aux, n, d_out,
                     d_in, nullptr, nullptr);
  }
};

const char* order_name(Metadata order) { return order == Metadata::k128 ? "k128" : "k64"; }

std::string config_name(int id) {
  const sm90::Config& c = sm90::config(id);
  return text("%s %c%d", c.name, c.raster == sm90::Raster::along_m ? 'M' : 'N', c.swizzle);
}

void check_metadata() {
  const int64_t shapes[][2] = {{16, 16}, {64, 128}, {80, 112}, {208, 336}, {768, 768}, {3072, 768}, {144, 1040}};
  for (Metadata order : {Metadata::k128, Metadata::k64}) {
    const int depth = order == Metadata::k128 ? 128 : 64;
    for (const auto& shape : shapes) {
      for (int offset : {0, 1}) {  // bytes by which `indices` misses alignment
        const int64_t d_out = shape[0], d_in = shape[1], bytes = d_out * d_in / 8;
        const std::string what = text("metadata %s %lldx%lld offset %d", order_name(order), (long long)d_out,
                                      (long long)d_in, offset);
        attempt(what, [&] {
          Buffer indices(size_t(bytes + offset)), e(sm90::metadata_bytes(order, d_out, d_in));
          fill_indices(indices.bytes() + offset, bytes, 7);
          OK(cudaMemset(e.get(), 0xff, e.size()));
          OK(sm90::build_metadata(order, indices.bytes() + offset, e.get(), d_out, d_in, nullptr));
          OK(cudaDeviceSynchronize());
          const auto source = to_host(indices.bytes() + offset, size_t(bytes)), made = to_host(e.get(), e.size());
          std::vector<uint8_t> expected(e.size(), 0x44);
          for (int64_t row = 0; row < d_out; ++row) {
            for (int64_t byte = 0; byte < d_in / 8; ++byte) {
              expected[size_t(sm90::metadata_offset(depth, d_out, row, byte))] = source[size_t(row * (d_in / 8) + byte)];
            }
          }
          if (expected != made) fail(what);
        });
      }
    }
  }
}

template <typename T>
void check_products() {
  const int64_t shapes[][3] = {{1, 64, 64},     {7, 112, 80},    {129, 336, 272}, {1000, 768, 768}, {129, 768, 64},
                               {7, 64, 768},    {1000, 208, 144}, {300, 16, 16},  {513, 640, 528}};
  struct Worst {
    double ratio = 0, ours = 0, dense = 0;
    int cases = 0, failed = 0;
  };
  std::vector<Worst> worst(size_t(sm90::kernel_count() * 2));
  for (const auto& shape : shapes) {
    const std::string place =
        text("%s n %lld, %lld -> %lld", TypeOf<T>::name, (long long)shape[0], (long long)shape[1], (long long)shape[2]);
    attempt(place, [&] {
      Case<T> data(shape[0], shape[1], shape[2], 11);
      for (Epilogue epilogue : {Epilogue::none, Epilogue::bias}) {
        data.refer(epilogue == Epilogue::bias);
        for (int id = 0; id < sm90::config_count(); ++id) {
          const sm90::Config& c = sm90::config(id);
          if (is_left_out(c.kernel)) continue;
          Worst& w = worst[size_t(c.kernel * 2 + int(epilogue))];
          const std::string what = place + (epilogue == Epilogue::bias ? " bias " : " ") + config_name(id);
          ++w.cases;
          const bool done = attempt(what, [&] {
            OK(sm90::can_run(id, epilogue, data.n, data.d_out, data.d_in, TypeOf<T>::dtype));
            data.clear();
            OK(data.run(id, epilogue, data.e[int(c.metadata)].get()));
            OK(cudaDeviceSynchronize());
            const auto errors = data.errors();
            const double ratio = errors.ours / std::max(errors.dense, 1e-30);
            if (ratio >= w.ratio) w.ratio = ratio, w.ours = errors.ours, w.dense = errors.dense;
            if (!errors.passed()) {
              ++w.failed;
              if (w.failed <= 3) {
                fail(what + text(": error %.3g, dense %.3g%s", errors.ours, errors.dense,
                                 errors.guard_kept ? "" : ", wrote outside of y"));
              } else {
                ++failures;
              }
            }
          });
          if (!done) ++w.failed;
        }
      }
    });
  }
  for (int kernel = 0; kernel < sm90::kernel_count(); ++kernel) {
    for (int epilogue : {0, 1}) {
      const Worst& w = worst[size_t(kernel * 2 + epilogue)];
      if (is_left_out(kernel)) continue;
      const int id = kernel * (sm90::config_count() / sm90::kernel_count());
      printf("%s %s %-22s %d stages  %-4s  %d of %d  worst error %.3g, dense %.3g, ratio %.3f\n",
             w.failed == 0 && w.cases > 0 ? "PASS" : "FAIL", TypeOf<T>::name, sm90::config(id).name,
             sm90::config(id).stages, epilogue == 1 ? "bias" : "none", w.cases - w.failed, w.cases, w.ours, w.dense,
             w.ratio);
    }
  }
  fflush(stdout);
}

constexpr Epilogue kFused[] = {Epilogue::bias_gelu, Epilogue::bias_gelu_tanh, Epilogue::gelu_gradient,
                               Epilogue::gelu_gradient_tanh};

const char* fused_name(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::bias_gelu: return "bias_gelu";
    case Epilogue::bias_gelu_tanh: return "bias_gelu_tanh";
    case Epilogue::gelu_gradient: return "gelu_gradient";
    default: return "gelu_gradient_tanh";
  }
}
bool is_forward(Epilogue epilogue) { return epilogue == Epilogue::bias_gelu || epilogue == Epilogue::bias_gelu_tanh; }
bool is_tanh(Epilogue epilogue) {
  return epilogue == Epilogue::bias_gelu_tanh || epilogue == Epilogue::gelu_gradient_tanh;
}

// Forward: y, aux, and y as the GELU of that aux. Backward: y, for an aux with values far out, which must stay as it is.
template <typename T>
void check_fused() {
  const int64_t shapes[][3] = {{1, 64, 64},     {7, 112, 80},     {129, 336, 272}, {1001, 768, 768}, {129, 768, 64},
                               {7, 64, 768},    {1001, 208, 144}, {301, 16, 16},   {513, 640, 528}};
  struct Worst {
    double ratio = 0, ratio_aux = 0;
    int cases = 0, failed = 0;
  };
  const int kernels = sm90::kernel_count();
  std::vector<Worst> worst(size_t(kernels) * 4);
  for (const auto& shape : shapes) {
    const std::string place =
        text("%s n %lld, %lld -> %lld", TypeOf<T>::name, (long long)shape[0], (long long)shape[1], (long long)shape[2]);
    attempt(place + " fused", [&] {
      Case<T> data(shape[0], shape[1], shape[2], 31);
      const int64_t count = data.n * data.d_out;
      Buffer aux(data.guarded.size()), aux_before(data.guarded.size()), right(data.exact.size()), of_dense(data.dense.size());
      T* const aux_data = reinterpret_cast<T*>(aux.bytes() + kGuard);
      T* const aux_data_before = reinterpret_cast<T*>(aux_before.bytes() + kGuard);
      OK(cudaMemset(aux_before.get(), 0xff, aux_before.size()));
      fill_normal<T>(aux_data_before, count, 41, 2.0f);
      far_out_kernel<T><<<grid(count), 256>>>(aux_data_before, count);
      OK(cudaGetLastError());
      for (Epilogue epilogue : kFused) {
        const bool forward = is_forward(epilogue), by_tanh = is_tanh(epilogue);
        data.refer(forward);
        if (forward) {
          activate_kernel<T><<<grid(count), 256>>>(static_cast<const double*>(data.exact.get()),
                                                   static_cast<const T*>(data.dense.get()),
                                                   static_cast<double*>(right.get()), static_cast<T*>(of_dense.get()), count,
                                                   by_tanh);
        } else {
          times_gradient_kernel<T><<<grid(count), 256>>>(
              static_cast<const double*>(data.exact.get()), static_cast<const T*>(data.dense.get()), aux_data_before,
              static_cast<double*>(right.get()), static_cast<T*>(of_dense.get()), count, by_tanh);
        }
        OK(cudaGetLastError());
        OK(cudaDeviceSynchronize());
        for (int id = 0; id < sm90::config_count(); ++id) {
          const sm90::Config& c = sm90::config(id);
          if (is_left_out(c.kernel) || sm90::fused_stages(id, epilogue) == 0) continue;
          Worst& w = worst[size_t(c.kernel * 4 + int(epilogue) - int(kFused[0]))];
          const std::string what = place + " " + fused_name(epilogue) + " " + config_name(id);
          const auto wrong = [&](const std::string& how) {
            if (++w.failed <= 3) {
              fail(what + ": " + how);
            } else {
              ++failures;
            }
          };
          ++w.cases;
          const bool done = attempt(what, [&] {
            OK(sm90::can_run(id, epilogue, data.n, data.d_out, data.d_in, TypeOf<T>::dtype));
            data.clear();
            if (forward) {
              OK(cudaMemset(aux.get(), 0xff, aux.size()));
            } else {
              OK(cudaMemcpy(aux.get(), aux_before.get(), aux.size(), cudaMemcpyDeviceToDevice));
            }
            OK(data.run(id, epilogue, data.e[int(c.metadata)].get(), aux_data));
            OK(cudaDeviceSynchronize());
            const auto errors = data.compare(data.guarded, right, of_dense);
            w.ratio = std::max(w.ratio, errors.ours / std::max(errors.dense, 1e-30));
            std::string how;
            if (!errors.passed()) {
              how += text(" y: error %.3g, dense %.3g%s;", errors.ours, errors.dense,
                          errors.guard_kept ? "" : ", wrote outside of y");
            }
            if (forward) {
              const auto of_aux = data.compare(aux, data.exact, data.dense);
              w.ratio_aux = std::max(w.ratio_aux, of_aux.ours / std::max(of_aux.dense, 1e-30));
              if (!of_aux.passed()) {
                how += text(" aux: error %.3g, dense %.3g%s;", of_aux.ours, of_aux.dense,
                            of_aux.guard_kept ? "" : ", wrote outside of aux");
              }
              auto* counter = static_cast<unsigned long long*>(data.counters.get());
              OK(cudaMemset(counter, 0, sizeof(*counter)));
              not_gelu_of_kernel<T><<<grid(count), 256>>>(static_cast<const T*>(data.y()), aux_data, count, by_tanh,
                                                          TypeOf<T>::half_ulp, counter);
              OK(cudaGetLastError());
              unsigned long long different = 0;
              OK(cudaMemcpy(&different, counter, sizeof(different), cudaMemcpyDeviceToHost));
              if (different != 0) how += text(" %llu of y are not the GELU of aux;", different);
            } else if (to_host(aux.get(), aux.size()) != to_host(aux_before.get(), aux_before.size())) {
              how += " aux was changed;";
            }
            if (!how.empty()) wrong(how);
          });
          if (!done) ++w.failed;
        }
      }
    });
  }
  for (int kernel = 0; kernel < kernels; ++kernel) {
    const int id = kernel * (sm90::config_count() / kernels);
    for (Epilogue epilogue : kFused) {
      const Worst& w = worst[size_t(kernel * 4 + int(epilogue) - int(kFused[0]))];
      const int stages = sm90::fused_stages(id, epilogue);
      if (is_left_out(kernel) || stages == 0) continue;
      printf("%s %s %-22s %d stages  %-18s  %d of %d  worst ratio %.3f", w.failed == 0 && w.cases > 0 ? "PASS" : "FAIL",
             TypeOf<T>::name, sm90::config(id).name, stages, fused_name(epilogue), w.cases - w.failed, w.cases, w.ratio);
      if (is_forward(epilogue)) printf(", of aux %.3f", w.ratio_aux);
      printf("\n");
    }
  }
  fflush(stdout);
}

void check_refusals() {
  const auto refused = [](const char* what, const char* reason) {
    if (reason == nullptr) fail(std::string("not refused: ") + what);
  };
  refused("d_in 24", sm90::can_run(0, Epilogue::none, 8, 64, 24, Dtype::bf16));
  refused("d_out 8", sm90::can_run(0, Epilogue::none, 8, 8, 64, Dtype::bf16));
  refused("n 0", sm90::can_run(0, Epilogue::none, 0, 64, 64, Dtype::bf16));
  refused("config -1", sm90::can_run(-1, Epilogue::none, 8, 64, 64, Dtype::bf16));
  refused("config count", sm90::can_run(sm90::config_count(), Epilogue::none, 8, 64, 64, Dtype::bf16));
  attempt("refusals", [&] {
    Buffer memory(1 << 16);
    uint8_t* m = memory.bytes();
    refused("x off by 2", sm90::run(0, Epilogue::none, Dtype::bf16, m + 2, m, m, nullptr, m, nullptr, 1, 64, 64, nullptr,
                                    nullptr));
    refused("no bias", sm90::run(0, Epilogue::bias, Dtype::bf16, m, m, m, nullptr, m, nullptr, 1, 64, 64, nullptr,
                                 nullptr));
    refused("gelu without bias", sm90::run(0, Epilogue::bias_gelu, Dtype::bf16, m, m, m, nullptr, m, m, 1, 64, 64, nullptr,
                                           nullptr));
    for (Epilogue epilogue : kFused) {
      if (epilogue == Epilogue::gelu_gradient || epilogue == Epilogue::gelu_gradient_tanh) {
        refused("no aux", sm90::run(0, epilogue, Dtype::bf16, m, m, m, m, m, nullptr, 1, 64, 64, nullptr, nullptr));
      }
      refused("aux off by 2", sm90::run(0, epilogue, Dtype::bf16, m, m, m, m, m, m + 2, 1, 64, 64, nullptr, nullptr));
      refused("fused, last kernel", sm90::can_run(sm90::config_count() - 1, epilogue, 8, 64, 64, Dtype::bf16));
    }
  });
}

void check() {
  printf("== check: error against float64 at most twice a dense operation's\n");
  const int before = failures;
  check_refusals();
  check_metadata();
  printf("%s metadata and refusals\n", failures == before ? "PASS" : "FAIL");
  check_products<__nv_bfloat16>();
  check_products<__half>();
  check_fused<__nv_bfloat16>();
  check_fused<__half>();
}

}  // namespace
