// float_linear with NEON.
#include <cstdint>
#include <cstring>

#include "float_linear.h"
#include "float_scalar.h"
#include "vector_neon.h"

namespace pymllm {
namespace {

struct V : Lanes {
  static constexpr int kTokens = 4; // 16 sums, 8 weights, 4 scales and an activation in 32 registers

  static void decode_bf16(const std::uint8_t *p, int part, Vec *out) {
    out[0] = vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * part)), 16));
  }
  static int order_bf16(int lane) { return lane; }

  static void decode_f16(const std::uint8_t *p, int part, Vec *out) {
    out[0] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * part)));
  }

  // As float_linear_avx512.cpp does it.
  static void decode_e4m3(const std::uint8_t *p, int part, Vec *out) {
    const int16x8_t high = vreinterpretq_s16_u16(vshll_n_u8(vld1_u8(p + 8 * part), 8));
    const int16x8_t halves = vandq_s16(vshrq_n_s16(high, 1), vdupq_n_s16(static_cast<std::int16_t>(0xbf80)));
    out[0] = vcvt_f32_f16(vreinterpret_f16_s16(vget_low_s16(halves)));
    out[1] = vcvt_f32_f16(vreinterpret_f16_s16(vget_high_s16(halves)));
  }
  static int order_e4m3(int lane) { return lane; }
  static int span_e4m3(int) { return 0; }

  struct Table {
    Vec values[4];
  };
  static Table load_table(const float *p) { return {{load(p), load(p + 4), load(p + 8), load(p + 12)}}; }
  static Table scaled(const Table &table, Vec scale) {
    return {{mul(table.values[0], scale), mul(table.values[1], scale), mul(table.values[2], scale),
             mul(table.values[3], scale)}};
  }
  // 4 bytes of two codes: the first codes of all bytes, then their second. A code's value is 4 bytes of the table.
  static void decode_codebook(const std::uint8_t *p, int part, const Table &table, Vec *out) {
    const uint8x16x4_t bytes = {{vreinterpretq_u8_f32(table.values[0]), vreinterpretq_u8_f32(table.values[1]),
                                 vreinterpretq_u8_f32(table.values[2]), vreinterpretq_u8_f32(table.values[3])}};
    std::uint32_t word;
    std::memcpy(&word, p + 4 * part, 4);
    const uint8x8_t codes = vreinterpret_u8_u32(vdup_n_u32(word)), pairs = vzip1_u8(codes, codes);
    const uint8x16_t fours = vcombine_u8(vzip1_u8(pairs, pairs), vzip2_u8(pairs, pairs));
    const uint8x16_t within = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100)), nibble = vdupq_n_u8(0x3c);
    const uint8x16_t first = vandq_u8(vshlq_n_u8(fours, 2), nibble), second = vandq_u8(vshrq_n_u8(fours, 2), nibble);
    out[0] = vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vorrq_u8(first, within)));
    out[1] = vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vorrq_u8(second, within)));
  }
  static int order_codebook(int lane) { return lane / 8 * 8 + lane % 4 * 2 + lane % 8 / 4; }
};

#include "float_linear_kernel.h"

} // namespace

const FloatLinearPath &float_linear_neon() { return kPath; }

} // namespace pymllm
