// The integer linear with the dot products of ARMv8.2 (sdot). See isa.h for what such a file must not contain.
//
// The instruction multiplies signed by signed bytes. Values above 127 are taken less 128, and so are their zero points,
// so that the sums are the same integers.
#include "integer.h"
#include "integer_block.h"
#include "integer_scale.h"
#include "vector_neon.h"

namespace pymllm::integer {
namespace {

// One line: a quad of inputs, the kQuad-th of those in `codes`, for 16 outputs. kLarge: values may exceed 127.
template <int R, bool kLarge, int kQuad>
PYMLLM_INLINE void multiply_line(const std::uint8_t *line, const int8x16_t (&codes)[R], int32x4_t (&acc)[R][4]) {
  PYMLLM_UNROLL
  for (int v = 0; v < 4; ++v) {
    uint8x16_t values = vld1q_u8(line + 16 * v);
    if (kLarge) values = veorq_u8(values, vdupq_n_u8(128));
    const int8x16_t weight = vreinterpretq_s8_u8(values);
    PYMLLM_UNROLL
    for (int m = 0; m < R; ++m) acc[m][v] = vdotq_laneq_s32(acc[m][v], weight, codes[m], kQuad);
  }
}

struct V : Lanes {
  static Vec round(Vec v) { return vrndnq_f32(v); }
  template <int N>
  static std::uint32_t largest_bits(const Vec (&v)[N]) {
    uint32x4_t largest = vdupq_n_u32(0);
    PYMLLM_UNROLL
    for (int i = 0; i < N; ++i)
      largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(v[i]), vdupq_n_u32(0x7fffffff)));
    return vmaxvq_u32(largest);
  }
  static void store_codes(std::int8_t *codes, Vec v) {
    const int16x4_t words = vmovn_s32(vcvtq_s32_f32(v));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    const std::int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    std::memcpy(codes, &four, 4);
  }
  static void widen(const std::uint8_t *bytes, std::int32_t *to) {
    for (int i = 0; i < kLanes; ++i) to[i] = bytes[i];
  }

  PYMLLM_INLINE const std::uint8_t *decode_lines(const Format &format, const std::uint8_t *lines, std::int64_t group,
                                                 std::uint8_t *decoded) {
    if (format.codes == Codes::bytes) return lines;
    const bool mapped = format.table != nullptr;
    const uint8x16_t nibble = vdupq_n_u8(15), table = mapped ? vld1q_u8(format.table) : nibble;
    const std::int64_t half = group * 8;
    for (std::int64_t at = 0; at < half; at += 16) {
      const uint8x16_t both = vld1q_u8(lines + at);
      uint8x16_t low = vandq_u8(both, nibble), high = vshrq_n_u8(both, 4);
      if (mapped) low = vqtbl1q_u8(table, low), high = vqtbl1q_u8(table, high);
      vst1q_u8(decoded + at, low);
      vst1q_u8(decoded + half + at, high);
    }
    return decoded;
  }

  // 16 accumulators, and 16 activations of a row in each of four registers, taken lane by lane.
  template <int R, bool kLarge>
  PYMLLM_INLINE void dots(const std::uint8_t *values, const std::int32_t *zeros, const std::int8_t *codes,
                          const std::int32_t *negative_sums, int group, Vec (&out)[R][4]) {
    int32x4_t acc[R][4];
    PYMLLM_UNROLL
    for (int v = 0; v < 4; ++v) {
      const int32x4_t zero = vsubq_s32(vld1q_s32(zeros + 4 * v), vdupq_n_s32(kLarge ? 128 : 0));
      PYMLLM_UNROLL
      for (int m = 0; m < R; ++m) acc[m][v] = vmulq_n_s32(zero, negative_sums[m]);
    }
    for (int k = 0; k < group; k += 16) {
      const std::uint8_t *lines = values + 16 * k;
      int8x16_t row[R];
      PYMLLM_UNROLL
      for (int m = 0; m < R; ++m) row[m] = vld1q_s8(codes + m * group + k);
      multiply_line<R, kLarge, 0>(lines, row, acc);
      multiply_line<R, kLarge, 1>(lines + 64, row, acc);
      multiply_line<R, kLarge, 2>(lines + 128, row, acc);
      multiply_line<R, kLarge, 3>(lines + 192, row, acc);
    }
    PYMLLM_UNROLL
    for (int m = 0; m < R; ++m)
      PYMLLM_UNROLL
      for (int v = 0; v < 4; ++v) out[m][v] = vcvtq_f32_s32(acc[m][v]);
  }
};

#include "integer_kernel.h"
#include "integer_tiles.h"

} // namespace

const Kernels kNeonDotprod{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};

} // namespace pymllm::integer
