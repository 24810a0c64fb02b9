// A vector of floats and float16 conversions for NEON, which every 64-bit ARM has.
//
// In an anonymous namespace: each file that includes this keeps its own copy, compiled with its own flags (isa.h).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "float_scalar.h"

#if defined(__clang__)
#define PYMLLM_UNROLL
#define PYMLLM_UNROLL_LANES
#else
#define PYMLLM_UNROLL _Pragma("GCC unroll 8")
#define PYMLLM_UNROLL_LANES _Pragma("GCC unroll 16")
#endif

namespace pymllm {
namespace {

using Vec = float32x4_t;

struct Lanes {
  static constexpr int kLanes = 4;
  static Vec zero() { return vdupq_n_f32(0.0f); }
  static Vec set1(float f) { return vdupq_n_f32(f); }
  static Vec load(const float *p) { return vld1q_f32(p); }
  static void store(float *p, Vec v) { vst1q_f32(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec max(Vec a, Vec b) { return vmaxnmq_f32(a, b); }
  static void prefetch(const void *p) {
    __builtin_prefetch(p);
    __asm__ volatile("" : : "r"(p)); // GCC drops calls of functions that only prefetch
  }

  static void fold4(Vec a, Vec b, Vec c, Vec d, float *out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
  static float largest(Vec v) { return vmaxnmvq_f32(v); }
  static float total(Vec v) { return vaddvq_f32(v); }

  // The sums of 4 vectors, side by side.
  static Vec fold(const Vec (&v)[4]) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }
};

inline void read_f16(const std::uint16_t *bits, std::int64_t count, float *to) {
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits + i))));
  for (; i < count; ++i) to[i] = from_f16(bits[i]);
}
inline void write_f16(const float *from, std::int64_t count, std::uint16_t *bits) {
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1_u16(bits + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
  for (; i < count; ++i) bits[i] = to_f16(from[i]);
}

} // namespace
} // namespace pymllm
