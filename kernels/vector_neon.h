// A vector of floats for NEON, which every 64-bit ARM has.
//
// In an anonymous namespace: each file that includes this keeps its own copy, compiled with its own flags (isa.h).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "float_scalar.h"

namespace pymllm {
namespace {

using Vec = float32x4_t;

struct Lanes {
  static constexpr int kLanes = 4;
  static Vec zero() { return vdupq_n_f32(0.0f); }
  static Vec set1(float f) { return vdupq_n_f32(f); }
  static Vec load(const float *p) { return vld1q_f32(p); }
  static void store(float *p, Vec v) { vst1q_f32(p, v); }
  static Vec load_bf16(const std::uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static Vec load_f16(const std::uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store_f16(std::uint16_t *p, Vec v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static Vec max(Vec a, Vec b) { return vmaxnmq_f32(a, b); }

  static void fold4(Vec a, Vec b, Vec c, Vec d, float *out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
  static float largest(Vec v) { return vmaxnmvq_f32(v); }
  static float total(Vec v) { return vaddvq_f32(v); }

  // The sums of 4 vectors, side by side.
  static Vec fold(const Vec (&v)[4]) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }
};

} // namespace
} // namespace pymllm
