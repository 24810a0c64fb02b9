// float_linear with AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "float_linear.h"
#include "float_scalar.h"

#if defined(__GNUC__) && !defined(__clang__)
#define PYMLLM_UNROLL _Pragma("GCC unroll 8")
#else
#define PYMLLM_UNROLL
#endif

namespace pymllm {
namespace {

using Vec = __m512;

struct V {
  static constexpr int kLanes = 16;
  static constexpr int kTokens = 6; // 24 sums, 4 weights and an activation in 32 registers
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float f) { return _mm512_set1_ps(f); }
  static Vec load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

  static void fold4(Vec a, Vec b, Vec c, Vec d, float *out) {
    const auto half = [](Vec v) {
      return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    };
    const auto quarter = [](__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
    __m128 p = quarter(half(a)), q = quarter(half(b)), r = quarter(half(c)), s = quarter(half(d));
    _MM_TRANSPOSE4_PS(p, q, r, s);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(p, q), _mm_add_ps(r, s)));
  }

  // 32 words: the even ones, then the odd ones.
  static void decode_bf16(const std::uint8_t *p, int part, Vec *out) {
    const __m512i words = _mm512_loadu_si512(p);
    const __m512i widened =
        part == 0 ? _mm512_slli_epi32(words, 16)
                  : _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    out[0] = _mm512_castsi512_ps(widened);
  }
  static int order_bf16(int lane) { return lane % 16 * 2 + lane / 16; }

  static void decode_f16(const std::uint8_t *p, int part, Vec *out) {
    out[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 32 * part)));
  }

  // seee emmm -> f16 s0ee eemm m000 0000: exact, subnormals too, and divided by 256 (the biases are 7 and 15).
  // 64 bytes: the even ones below 32, from 32, then the odd ones.
  static void decode_e4m3(const std::uint8_t *p, int part, Vec *out) {
    const __m512i bytes = _mm512_loadu_si512(p), keep = _mm512_set1_epi16(static_cast<short>(0xbf80));
    const __m512i high = part == 0 ? _mm512_slli_epi16(bytes, 8) : bytes;
    const __m512i halves = _mm512_and_si512(_mm512_srai_epi16(high, 1), keep);
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  }
  static int order_e4m3(int lane) { return lane % 32 * 2 + lane / 32; }
};

#include "float_linear_kernel.h"

} // namespace

const FloatLinearPath &float_linear_avx512() { return kPath; }

} // namespace pymllm
