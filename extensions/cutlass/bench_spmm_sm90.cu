// Checks and measures the kernels of spmm_sm90.h, cuSPARSELt beside them where the library is found.
//
//   bench [check] [layout] [bench] [bench-small] [fused] [--seconds S] [--cusparselt PATH] [--without KERNEL]...
//
// Without a name: all of them but `fused`, each in a process of its own, so that a lost device ends one part alone. After
// S seconds (80) no further shape is measured.
//
// check: every configuration against float64 and against a dense operation of the same dtype, the fused epilogues last.
// layout: cuSPARSELt's compressed form beside ours. bench, bench-small: times by replayed CUDA graphs; with OUT set, all of
// them in $OUT/sm90.csv as well. fused: times of the epilogues with GELU, beside a product with a pass after it.
// The exit code is the largest number of failures in a part (at most 99).
#include "bench/check.h"
#include "bench/layout.h"
#include "bench/measure.h"

namespace {

int run_part(const std::string& part, const std::string& path, double deadline) {
  cudaDeviceProp properties{};
  cudaError_t status = cudaSetDevice(0);
  if (status == cudaSuccess) status = cudaGetDeviceProperties(&properties, 0);
  if (status != cudaSuccess) {
    printf("FAIL no device: %s\n", cudaGetErrorString(status));
    return 1;
  }
  printf("%s, %d multiprocessors, L2 %d MiB; ", properties.name, properties.multiProcessorCount,
         properties.l2CacheSize >> 20);
  if (const char* reason = sm90::can_run(0, Epilogue::none, 16, 64, 64, Dtype::bf16)) {
    printf("FAIL %s\n", reason);
    return 1;
  }
  const Lt* lt = load_lt(path);
  FILE* csv = nullptr;
  if (const char* out = getenv("OUT")) {
    csv = fopen((std::string(out) + "/sm90.csv").c_str(), "a");
    if (csv != nullptr && ftell(csv) == 0) fprintf(csv, "stage,dtype,tokens,d_in,d_out,name,ms,replays,launches\n");
  }
  const Bench bench{lt, deadline, size_t(properties.l2CacheSize), csv};
  const double begin = now();
  if (part == "check") attempt(part, [] { check(); });
  if (part == "layout") attempt(part, [&] { layout(lt); });
  if (part == "bench") attempt(part, [&] { bench.large(); });
  if (part == "fused") attempt(part, [&] { bench.fused(); });
  if (part == "bench-small") attempt(part, [&] { bench.few_tokens(); });
  printf("-- %s: %d failures, %.1f s\n", part.c_str(), failures, now() - begin);
  if (csv != nullptr) fclose(csv);
  fflush(stdout);
  return std::min(failures, 99);
}

}  // namespace

int main(int count, char** arguments) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const double start = now();
  std::vector<std::string> parts;
  std::string path;
  double seconds = 80;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--seconds" && i + 1 < count) {
      seconds = atof(arguments[++i]);
    } else if (argument == "--cusparselt" && i + 1 < count) {
      path = arguments[++i];
    } else if (argument == "--without" && i + 1 < count) {
      left_out.push_back(atoi(arguments[++i]));
    } else if (argument == "check" || argument == "layout" || argument == "bench" || argument == "bench-small" ||
               argument == "fused") {
      parts.push_back(argument);
    } else {
      fprintf(stderr,
              "usage: %s [check] [layout] [bench] [bench-small] [fused] [--seconds S] [--cusparselt PATH] "
              "[--without KERNEL]\n",
              arguments[0]);
      return 100;
    }
  }
  if (parts.empty()) parts = {"check", "layout", "bench", "bench-small"};
  int worst = 0;
  for (const std::string& part : parts) {
    fflush(stdout);
    const pid_t child = fork();  // before any call of CUDA in this process
    if (child == 0) _exit(run_part(part, path, start + seconds));
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) {
      printf("FAIL %s: no process\n", part.c_str());
      worst = 99;
    } else if (!WIFEXITED(status)) {
      printf("FAIL %s: ended by signal %d\n", part.c_str(), WTERMSIG(status));
      worst = 99;
    } else {
      worst = std::max(worst, WEXITSTATUS(status));
    }
  }
  printf("%s, %.1f s\n", worst == 0 ? "PASS" : "FAIL", now() - start);
  return worst;
}
