// layout: cuSPARSELt's compressed form beside ours.
#pragma once

#include "cusparselt.h"
#include "check.h"

namespace {

// Compares a metadata tail with ours: bytes that stand for groups of W, and all bytes.
std::string compare_tail(const std::vector<uint8_t>& tail, const std::vector<uint8_t>& source, Metadata order,
                         int64_t d_out, int64_t d_in) {
  const int depth = order == Metadata::k128 ? 128 : 64;
  int64_t different = 0, outside = 0;
  for (int64_t row = 0; row < d_out; ++row) {
    for (int64_t byte = 0; byte < d_in / 8; ++byte) {
      const size_t place = size_t(sm90::metadata_offset(depth, d_out, row, byte));
      if (place >= tail.size()) {
        ++outside;
      } else if (tail[place] != source[size_t(row * (d_in / 8) + byte)]) {
        ++different;
      }
    }
  }
  const bool same = different == 0 && outside == 0;
  return text("%s %s (%lld of %lld bytes differ, %lld lie outside)", order_name(order), same ? "SAME" : "DIFFERENT",
              (long long)different, (long long)(d_out * d_in / 8), (long long)outside);
}

// Finds where cuSPARSELt puts each nibble, from as many compressions as a nibble's number has bits.
void infer_layout(const Lt& lt) {
  using T = __nv_bfloat16;
  const int64_t d_out = 256, d_in = 512, nibbles = d_out * d_in / 4;
  const int bits = 15;
  LtStructured structured(lt, d_out, d_in, CUDA_R_16BF);
  const size_t values_bytes = size_t(d_out * d_in / 2) * sizeof(T);
  if (structured.bytes() <= values_bytes) throw std::runtime_error("the compressed form has no tail");
  const size_t tail_bytes = structured.bytes() - values_bytes;
  Buffer values(values_bytes), indices(size_t(nibbles / 2)), dense(size_t(d_out * d_in) * sizeof(T)),
      compressed(structured.bytes());
  fill_normal<T>(values.get(), d_out * d_in / 2, 3, 1.0f, true);
  std::vector<int64_t> source(2 * tail_bytes, 0);
  std::vector<bool> odd(2 * tail_bytes, false);
  for (int bit = 0; bit < bits; ++bit) {
    numbered_kernel<<<grid(nibbles / 2), 256>>>(indices.bytes(), nibbles / 2, bit);
    OK(cudaGetLastError());
    expand<T>(values.get(), indices.get(), dense.get(), d_out, d_in);
    structured.compress(dense.get(), compressed.get());
    const auto tail = to_host(compressed.bytes() + values_bytes, tail_bytes);
    for (size_t i = 0; i < 2 * tail_bytes; ++i) {
      const int nibble = tail[i / 2] >> (i % 2 * 4) & 15;
      if (nibble == 0xe) {
        source[i] |= int64_t(1) << bit;
      } else if (nibble != 0x4) {
        odd[i] = true;
      }
    }
  }
  std::vector<int64_t> place(size_t(nibbles), -1);
  int64_t strange = 0, twice = 0, missing = 0;
  for (size_t i = 0; i < 2 * tail_bytes; ++i) {
    if (odd[i]) {
      ++strange;
    } else if (place[size_t(source[i])] >= 0) {
      ++twice;
    } else {
      place[size_t(source[i])] = int64_t(i);
    }
  }
  for (int64_t at : place) missing += at < 0;
  printf("  order of %lldx%lld: tail of %zu nibbles, %lld not 4 or e, %lld twice, %lld missing\n", (long long)d_out,
         (long long)d_in, 2 * tail_bytes, (long long)strange, (long long)twice, (long long)missing);
  if (missing == nibbles) return;
  int64_t bent = 0;
  for (int64_t i = 0; i < nibbles; ++i) {
    int64_t sum = place[0];
    for (int bit = 0; bit < bits; ++bit) {
      if (i >> bit & 1) sum += place[size_t(1) << bit] - place[0];
    }
    bent += sum != place[size_t(i)];
  }
  printf("  group 0 of row 0 at nibble %lld; steps in nibbles, by bits of the column group:", (long long)place[0]);
  for (int bit = 0; bit < bits; ++bit) {
    if (bit == 7) printf("; by bits of the row:");
    printf(" %lld", (long long)(place[size_t(1) << bit] - place[0]));
  }
  printf("; %lld nibbles do not follow these steps\n", (long long)bent);
}

void layout(const Lt* lt_or_null) {
  printf("== layout: cuSPARSELt's compressed form beside ours\n");
  if (lt_or_null == nullptr) {
    printf("SKIP no cuSPARSELt\n");
    return;
  }
  const Lt& lt = *lt_or_null;
  using T = __nv_bfloat16;
  const int64_t shapes[][2] = {{128, 128}, {768, 768}, {3072, 768}, {768, 3072}, {4096, 1024}, {80, 272}, {208, 336}};
  for (const auto& shape : shapes) {
    const int64_t d_out = shape[0], d_in = shape[1];
    attempt(text("layout %lldx%lld", (long long)d_out, (long long)d_in), [&] {
      Case<T> data(129, d_in, d_out, 23);
      data.refer(false);
      Buffer dense(size_t(d_out * d_in) * sizeof(T));
      expand<T>(data.values.get(), data.indices.get(), dense.get(), d_out, d_in);
      LtStructured structured(lt, d_out, d_in, CUDA_R_16BF);
      const size_t values_bytes = data.values.size();
      printf("%lldx%lld: values %zu, metadata k128 %zu, k64 %zu; cuSPARSELt in all %zu (%+lld beside values + k128)\n",
             (long long)d_out, (long long)d_in, values_bytes, data.e[0].size(), data.e[1].size(), structured.bytes(),
             (long long)structured.bytes() - (long long)(values_bytes + data.e[0].size()));
      Buffer compressed(structured.bytes());
      OK(cudaMemset(compressed.get(), 0x44, compressed.size()));
      structured.compress(dense.get(), compressed.get());
      const auto all = to_host(compressed.get(), compressed.size());
      const auto ours = to_host(data.values.get(), values_bytes);
      const auto source = to_host(data.indices.get(), data.indices.size());
      if (all.size() < values_bytes) throw std::runtime_error("the compressed form is smaller than the values");
      printf("  values %s;", std::equal(ours.begin(), ours.end(), all.begin()) ? "SAME" : "DIFFERENT");
      const std::vector<uint8_t> tail(all.begin() + int64_t(values_bytes), all.end());
      for (Metadata order : {Metadata::k128, Metadata::k64}) {
        printf(" %s;", compare_tail(tail, source, order, d_out, d_in).c_str());
      }
      printf("\n  multiplied with cuSPARSELt's metadata:");
      for (Metadata order : {Metadata::k128, Metadata::k64}) {
        int id = 0;
        while (sm90::config(id).metadata != order) ++id;
        Buffer metadata(std::max(tail.size(), data.e[int(order)].size()));
        OK(cudaMemset(metadata.get(), 0x44, metadata.size()));
        OK(cudaMemcpy(metadata.get(), tail.data(), tail.size(), cudaMemcpyHostToDevice));
        data.clear();
        OK(data.run(id, Epilogue::none, metadata.get()));
        OK(cudaDeviceSynchronize());
        const auto errors = data.errors();
        printf(" %s %s (error %.3g, dense %.3g);", order_name(order), errors.passed() ? "RIGHT" : "WRONG", errors.ours,
               errors.dense);
      }
      printf("\n  cuSPARSELt with our operand:");
      for (Metadata order : {Metadata::k128, Metadata::k64}) {
        Buffer operand(std::max(structured.bytes(), values_bytes + data.e[int(order)].size()));
        OK(cudaMemcpy(operand.get(), data.values.get(), values_bytes, cudaMemcpyDeviceToDevice));
        OK(cudaMemcpy(operand.bytes() + values_bytes, data.e[int(order)].get(), data.e[int(order)].size(),
                      cudaMemcpyDeviceToDevice));
        data.clear();
        LtPlan plan(lt, data.n, d_out, d_in, CUDA_R_16BF, -1, nullptr);
        OK(plan.run(operand.get(), data.x.get(), data.y(), nullptr));
        OK(cudaDeviceSynchronize());
        const auto errors = data.errors();
        printf(" %s %s (error %.3g);", order_name(order), errors.passed() ? "RIGHT" : "WRONG", errors.ours);
      }
      printf("\n");
    });
  }
  attempt("order", [&] { infer_layout(lt); });
  fflush(stdout);
}

}  // namespace
