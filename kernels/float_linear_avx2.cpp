// float_linear with AVX2, FMA and F16C.
#include <cstdint>
#include <cstring>

#include "float_linear.h"
#include "float_scalar.h"
#include "vector_avx2.h"

namespace pymllm {
namespace {

struct V : Lanes {
  static constexpr int kTokens = 3; // 12 sums, 3 activations and a weight in 16 registers
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
  static int span_e4m3(int) { return 0; }

  // Eight values in each of two registers: the codes' low three bits permute, the fourth chooses.
  struct Table {
    Vec low, high;
  };
  static Table load_table(const float *p) { return {load(p), load(p + 8)}; }
  static Table scaled(const Table &table, Vec scale) { return {mul(table.low, scale), mul(table.high, scale)}; }
  // 8 words of four codes: the first codes of all words, then their second, ...
  static void decode_codebook(const std::uint8_t *p, int part, const Table &table, Vec *out) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    for (int i = 0; i < 2; ++i) {
      const int shift = 4 * (2 * part + i);
      const __m256i codes = _mm256_srli_epi32(words, shift);
      const Vec low = _mm256_permutevar8x32_ps(table.low, codes), high = _mm256_permutevar8x32_ps(table.high, codes);
      out[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
  }
  static int order_codebook(int lane) { return lane % 8 * 4 + lane / 8; }
};

#include "float_linear_kernel.h"

} // namespace

const FloatLinearPath &float_linear_avx2() { return kPath; }

} // namespace pymllm
