// GELU and its derivative in float, for the fused epilogues and for the bench's separate passes.
//
// Few instructions, because an epilogue runs beside short main loops: 16 and 17 for ErfGelu (32 and 40 with erff()), 8 and 14
// for TanhGelu, two of them on the special function units.
#pragma once

namespace slope::sm90 {

// One instruction each; subnormal results are 0, infinity goes to infinity and 0.
static __device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
static __device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x Phi(x). With h = erfc(|x| / sqrt(2)) / 2, which is Phi(-|x|), it is x h for x < 0 and x - x h otherwise: nothing cancels.
// h is formula 7.1.26 of Abramowitz and Stegun, absolute error 0.75e-7, about that of 0.5f * (1 + erff(x)); its exponential
// is the derivative's, too. Compared with float64 for all bf16 and fp16 numbers below 1e4: gelu 2e-7 (or 8e-8 of |x|), the
// derivative 3e-7.
struct ErfGelu {
  struct Parts {
    float h, density;  // density: exp(-x^2 / 2)
  };
  static __device__ __forceinline__ Parts parts(float x) {
    const float t = fast_reciprocal(fmaf(0.23164189f, fabsf(x), 1.0f));  // 0.3275911 / sqrt(2)
    const float density = fast_exp2(-0.72134752f * x * x);               // log2(e) / 2
    float h = fmaf(0.5307027145f, t, -0.7265760135f);                    // halves of the formula's coefficients
    h = fmaf(h, t, 0.7107068705f);
    h = fmaf(h, t, -0.142248368f);
    h = fmaf(h, t, 0.127414796f);
    return {h * t * density, density};
  }
  static __device__ __forceinline__ float value(float x) {
    const float tail = x * parts(x).h;
    return x > 0.0f ? x - tail : tail;
  }
  static __device__ __forceinline__ float gradient(float x) {  // Phi(x) + x phi(x)
    const Parts p = parts(x);
    return fmaf(0.39894228f * x, p.density, x > 0.0f ? 1.0f - p.h : p.h);
  }
};

// 0.5 x (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): PyTorch's approximate="tanh". Not tanh.approx,
// whose error of 5e-4 is as large as fp16's rounding. Errors against float64 as above: 1e-7, the derivative 2e-6.
struct TanhGelu {
  static __device__ __forceinline__ float sigmoid(float x) {  // of 2 u; the exponent is in units of log2(e)
    return fast_reciprocal(1.0f + fast_exp2(x * fmaf(-0.10294324f, x * x, -2.3022082f)));
  }
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(x); }
  static __device__ __forceinline__ float gradient(float x) {
    const float s = sigmoid(x);
    const float rate = fmaf(0.21406445f, fminf(x * x, 1e6f), 1.5957691f);  // of 2 u; bounded, as 0 times infinity is not 0
    return fmaf(x * s * (1.0f - s), rate, s);
  }
};

}  // namespace slope::sm90
