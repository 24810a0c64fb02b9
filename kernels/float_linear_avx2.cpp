// float_linear with AVX2, FMA and F16C.
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

using Vec = __m256;

struct V {
  static constexpr int kLanes = 8;
  static constexpr int kTokens = 3; // 12 sums, 3 activations and a weight in 16 registers
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float f) { return _mm256_set1_ps(f); }
  static Vec load(const float *p) { return _mm256_loadu_ps(p); }
  static void store(float *p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

  static void fold4(Vec a, Vec b, Vec c, Vec d, float *out) {
    const auto half = [](Vec v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
    __m128 p = half(a), q = half(b), r = half(c), s = half(d);
    _MM_TRANSPOSE4_PS(p, q, r, s);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(p, q), _mm_add_ps(r, s)));
  }

  // 16 words: the even ones, then the odd ones.
  static void decode_bf16(const std::uint8_t *p, int part, Vec *out) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    const __m256i widened =
        part == 0 ? _mm256_slli_epi32(words, 16)
                  : _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    out[0] = _mm256_castsi256_ps(widened);
  }
  static int order_bf16(int lane) { return lane % 8 * 2 + lane / 8; }

  static void decode_f16(const std::uint8_t *p, int part, Vec *out) {
    out[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 16 * part)));
  }

  // As float_linear_avx512.cpp does it. 32 bytes: the even ones below 16, from 16, then the odd ones.
  static void decode_e4m3(const std::uint8_t *p, int part, Vec *out) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    const __m256i high = part == 0 ? _mm256_slli_epi16(bytes, 8) : bytes;
    const __m256i halves =
        _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }
  static int order_e4m3(int lane) { return lane % 16 * 2 + lane / 16; }
};

#include "float_linear_kernel.h"

} // namespace

const FloatLinearPath &float_linear_avx2() { return kPath; }

} // namespace pymllm
