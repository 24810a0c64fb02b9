// float_linear with AVX-512 (F, BW, DQ, VL).
#include <cstdint>
#include <cstring>

#include "float_linear.h"
#include "float_scalar.h"
#include "vector_avx512.h"

namespace pymllm {
namespace {

struct V : Lanes {
  static constexpr int kTokens = 6; // 24 sums, 4 weights and an activation in 32 registers
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
  static int span_e4m3(int vector) { return vector % 2; }

  // 16 values in one register; a permutation looks at the low four bits of its lanes only.
  struct Table {
    Vec values;
  };
  static Table load_table(const float *p) { return {_mm512_loadu_ps(p)}; }
  static Table scaled(const Table &table, Vec scale) { return {_mm512_mul_ps(table.values, scale)}; }
  // 16 words of four codes: the first codes of all words, then their second, ...
  static void decode_codebook(const std::uint8_t *p, int part, const Table &table, Vec *out) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    for (int i = 0; i < 2; ++i) {
      const auto shift = static_cast<unsigned>(4 * (2 * part + i));
      out[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, shift), table.values);
    }
  }
  static int order_codebook(int lane) { return lane % 16 * 4 + lane / 16; }
};

#include "float_linear_kernel.h"

} // namespace

const FloatLinearPath &float_linear_avx512() { return kPath; }

} // namespace pymllm
