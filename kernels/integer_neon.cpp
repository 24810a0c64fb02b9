// The integer linear with the dot products of ARMv8.2 (sdot). See isa.h for what such a file must not contain.
//
// One group of one row block is decoded into the L1 cache (bytes are taken as they lie), then multiplied with all rows,
// four at a time: 16 accumulators, and 16 activations of a row in each of four registers, taken lane by lane.
//
// The instruction multiplies signed by signed bytes. Values above 127 are taken less 128, and so are their zero points,
// so that the sums are the same integers.
#include <arm_neon.h>

#include <cstring>

#include "integer.h"
#include "integer_block.h"
#include "integer_demand.h"
#include "integer_scale.h"

#define PYMLLM_INLINE static inline __attribute__((always_inline))

namespace pymllm::integer {
namespace {

constexpr int kLanes = 4;
constexpr int kVectors = 4;  // of 4 outputs, or of 4 inputs of each: 64 bytes

PYMLLM_INLINE float32x4_t load_floats(Dtype dtype, const void *data, std::int64_t i) {
  if (dtype == Dtype::f32) return vld1q_f32(static_cast<const float *>(data) + i);
  const uint16x4_t half = vld1_u16(static_cast<const std::uint16_t *>(data) + i);
  if (dtype == Dtype::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
  return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

PYMLLM_INLINE void store_floats(Dtype dtype, void *data, std::int64_t i, float32x4_t value) {
  if (dtype == Dtype::f32) return vst1q_f32(static_cast<float *>(data) + i, value);
  uint16x4_t half;
  if (dtype == Dtype::f16) {
    half = vreinterpret_u16_f16(vcvt_f16_f32(value));
  } else {
    const uint32x4_t word = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(word, 16), vdupq_n_u32(1));
    const uint32x4_t even = vaddq_u32(vaddq_u32(word, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t nan = vorrq_u32(word, vdupq_n_u32(0x400000));
    half = vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), even, nan), 16);
  }
  vst1_u16(static_cast<std::uint16_t *>(data) + i, half);
}

// ------------------------------------------------------------------------------------------------------ activations

void quantise(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
              std::int64_t last) {
  const int group = static_cast<int>(weights.group), vectors = group / kLanes;
  for (std::int64_t g = first; g < last; ++g) {
    for (std::int64_t token = 0; token < floats.tokens; ++token) {
      float32x4_t values[kMaxGroup / kLanes];
      uint32x4_t largest = vdupq_n_u32(0);
      for (int i = 0; i < vectors; ++i) {
        values[i] = load_floats(floats.dtype, floats.x, token * weights.in_features + g * group + kLanes * i);
        // As integers, magnitudes keep their order, and NaN is above infinity.
        largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(values[i]), vdupq_n_u32(0x7fffffff)));
      }
      GroupScale scale = group_scale(vmaxvq_u32(largest), out.slices);
      const float32x4_t inverse = vdupq_n_f32(scale.inverse), ratio = vdupq_n_f32(kSliceRatio);
      for (int i = 0; i < vectors; ++i) values[i] = vmulq_f32(values[i], inverse);
      for (int slice = 0; slice < out.slices; ++slice) {
        const std::int64_t row = g * out.rows + token * out.slices + slice;
        std::int8_t *codes = out.codes + row * group;
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < vectors; i += 2) {
          int32x4_t pair[2];
          for (int j = 0; j < 2; ++j) {
            pair[j] = vcvtnq_s32_f32(values[i + j]);  // to even; NaN, an infinity times 0, becomes 0
            sum = vaddq_s32(sum, pair[j]);
            values[i + j] = vmulq_f32(vsubq_f32(values[i + j], vcvtq_f32_s32(pair[j])), ratio);
          }
          vst1_s8(codes + kLanes * i, vmovn_s16(vcombine_s16(vmovn_s32(pair[0]), vmovn_s32(pair[1]))));
        }
        out.scales[row] = scale.scale;
        out.negative_sums[row] = -vaddvq_s32(sum);
        scale.scale *= 1.0f / kSliceRatio;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- weights

struct Tile {
  const std::uint8_t *values;  // [G/4 quads][64]
  int32x4_t zeros[kVectors];   // of what the instruction multiplies: less 128 where the values are
  float32x4_t scales[kVectors];
  float32x4_t offsets[kVectors];
  alignas(64) std::uint8_t decoded[kMaxGroup * kBlockRows];
};

PYMLLM_INLINE float32x4_t decode_scales(Scales kind, const std::uint8_t *scales) {
  switch (kind) {
  case Scales::f16: return load_floats(Dtype::f16, scales, 0);
  case Scales::bf16: return load_floats(Dtype::bf16, scales, 0);
  case Scales::f32: return load_floats(Dtype::f32, scales, 0);
  default: {
    float decoded[kLanes];
    for (int i = 0; i < kLanes; ++i) decoded[i] = read_scale(kind, scales, i);
    return vld1q_f32(decoded);
  }
  }
}

void decode_header(const Format &format, const std::uint8_t *block, Tile &tile) {
  const std::int64_t scale_bytes = format.scale_bytes();
  const std::uint8_t *stored = block + format.zeros_offset();
  std::int32_t zeros[kBlockRows];
  for (int r = 0; r < kBlockRows; ++r) zeros[r] = read_zero(format, block, r) - (format.large_values ? 128 : 0);
  for (int v = 0; v < kVectors; ++v) {
    tile.scales[v] = decode_scales(format.scales, block + v * kLanes * scale_bytes);
    tile.zeros[v] = vld1q_s32(zeros + v * kLanes);
    if (format.zeros == Zeros::offsets) tile.offsets[v] = load_floats(Dtype::f32, stored, v * kLanes);
  }
}

void decode_tile(const Format &format, const std::uint8_t *block, std::int64_t group, Tile &tile) {
  decode_header(format, block, tile);
  const std::uint8_t *lines = block + format.header_bytes();
  if (format.codes == Codes::bytes) {
    tile.values = lines;
    return;
  }
  const bool mapped = format.table != nullptr;
  const uint8x16_t nibble = vdupq_n_u8(15), table = mapped ? vld1q_u8(format.table) : nibble;
  const std::int64_t half = group * 8;
  for (std::int64_t at = 0; at < half; at += 16) {
    const uint8x16_t both = vld1q_u8(lines + at);
    uint8x16_t low = vandq_u8(both, nibble), high = vshrq_n_u8(both, 4);
    if (mapped) low = vqtbl1q_u8(table, low), high = vqtbl1q_u8(table, high);
    vst1q_u8(tile.decoded + at, low);
    vst1q_u8(tile.decoded + half + at, high);
  }
  tile.values = tile.decoded;
}

// One line: a quad of inputs, the kQuad-th of those in `codes`, for 16 outputs. kLarge: values may exceed 127.
template <int R, bool kLarge, int kQuad>
PYMLLM_INLINE void multiply_line(const std::uint8_t *line, const int8x16_t (&codes)[R], int32x4_t (&acc)[R][kVectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    uint8x16_t values = vld1q_u8(line + 16 * v);
    if (kLarge) values = veorq_u8(values, vdupq_n_u8(128));
    const int8x16_t weight = vreinterpretq_s8_u8(values);
#pragma GCC unroll 4
    for (int m = 0; m < R; ++m) acc[m][v] = vdotq_laneq_s32(acc[m][v], weight, codes[m], kQuad);
  }
}

// One group for R rows from `at` = group * rows + row on; adds to sums [R][16].
template <int R, bool kLarge>
void tile_rows(const Tile &tile, const Activations &x, std::int64_t at, int group, float *sums) {
  const std::int8_t *rows = x.codes + at * group;
  int32x4_t acc[R][kVectors];
#pragma GCC unroll 4
  for (int m = 0; m < R; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[m][v] = vmulq_n_s32(tile.zeros[v], x.negative_sums[at + m]);
  for (int k = 0; k < group; k += 16) {
    const std::uint8_t *lines = tile.values + 16 * k;
    int8x16_t codes[R];
#pragma GCC unroll 4
    for (int m = 0; m < R; ++m) codes[m] = vld1q_s8(rows + m * group + k);
    multiply_line<R, kLarge, 0>(lines, codes, acc);
    multiply_line<R, kLarge, 1>(lines + 64, codes, acc);
    multiply_line<R, kLarge, 2>(lines + 128, codes, acc);
    multiply_line<R, kLarge, 3>(lines + 192, codes, acc);
  }
#pragma GCC unroll 4
  for (int m = 0; m < R; ++m) {
    const float32x4_t scale = vdupq_n_f32(x.scales[at + m]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float *sum = sums + m * kBlockRows + kLanes * v;
      const float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(acc[m][v]), tile.scales[v]);
      vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), scaled, scale));
    }
  }
}

void add_offsets(const Tile &tile, const Activations &x, std::int64_t g, float *sums) {
  for (std::int64_t row = 0; row < x.rows; ++row) {
    const std::int64_t at = g * x.rows + row;
    const float32x4_t sum = vdupq_n_f32(static_cast<float>(-x.negative_sums[at]) * x.scales[at]);
    for (int v = 0; v < kVectors; ++v) {
      float *to = sums + row * kBlockRows + kLanes * v;
      vst1q_f32(to, vfmaq_f32(vld1q_f32(to), tile.offsets[v], sum));
    }
  }
}

// sums: the slices of one token, 16 floats apart. Adds them, the smallest first, and the bias.
void finish(const float *sums, int slices, const Floats &floats, const Weights &weights, std::int64_t token,
            std::int64_t row_block) {
  const std::int64_t output = row_block * kBlockRows, left = weights.out_features - output;
  const std::size_t outputs = static_cast<std::size_t>(left < kBlockRows ? left : kBlockRows);
  const std::size_t element = floats.dtype == Dtype::f32 ? 4 : 2, bytes = element * outputs;
  alignas(16) std::uint8_t bias[64] = {}, result[64];
  float factors[kBlockRows] = {};
  if (weights.row_factors != nullptr) std::memcpy(factors, weights.row_factors + output, sizeof(float) * outputs);
  if (floats.bias != nullptr)
    std::memcpy(bias, static_cast<const std::uint8_t *>(floats.bias) + output * element, bytes);
  for (int i = 0; i < kBlockRows; i += kLanes) {
    float32x4_t sum = vld1q_f32(sums + (slices - 1) * kBlockRows + i);
    for (int slice = slices - 1; slice-- > 0;) sum = vaddq_f32(sum, vld1q_f32(sums + slice * kBlockRows + i));
    if (weights.row_factors != nullptr) sum = vmulq_f32(sum, vld1q_f32(factors + i));
    store_floats(floats.dtype, result, i, vaddq_f32(sum, load_floats(floats.dtype, bias, i)));
  }
  std::memcpy(static_cast<std::uint8_t *>(floats.y) + (token * weights.out_features + output) * element, result, bytes);
}

#include "integer_tiles.h"

} // namespace

const Kernels kNeonDotprod{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};

} // namespace pymllm::integer
