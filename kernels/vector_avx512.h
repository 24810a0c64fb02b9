// A vector of floats for AVX-512 (F, BW, DQ, VL).
//
// In an anonymous namespace: each file that includes this keeps its own copy, compiled with its own flags (isa.h).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "float_scalar.h"

namespace pymllm {
namespace {

using Vec = __m512;

struct Lanes {
  static constexpr int kLanes = 16;
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float f) { return _mm512_set1_ps(f); }
  static Vec load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec load_bf16(const std::uint16_t *p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  static Vec load_f16(const std::uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }
  static void store_f16(std::uint16_t *p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

  static void fold4(Vec a, Vec b, Vec c, Vec d, float *out) {
    const auto half = [](Vec v) {
      return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    };
    const auto quarter = [](__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
    __m128 p = quarter(half(a)), q = quarter(half(b)), r = quarter(half(c)), s = quarter(half(d));
    _MM_TRANSPOSE4_PS(p, q, r, s);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(p, q), _mm_add_ps(r, s)));
  }
  static float largest(Vec v) { return _mm512_reduce_max_ps(v); }
  static float total(Vec v) { return _mm512_reduce_add_ps(v); }

  // The sums of 16 vectors, side by side.
  static Vec fold(const Vec (&v)[16]) {
    Vec pairs[8], fours[4];
    PYMLLM_UNROLL_LANES
    for (int i = 0; i < 8; ++i)
      pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    PYMLLM_UNROLL_LANES
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
      fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto halves = [](Vec a, Vec b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const Vec low = halves(fours[0], fours[1]), high = halves(fours[2], fours[3]);
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
};

} // namespace
} // namespace pymllm
