// The integer linear with AVX2, and with AVX2 + AVX-VNNI: integer_avx2vnni.cpp compiles this file again for the latter.
// See isa.h for what such a file must not contain.
//
// One group of one row block is decoded into the L1 cache (bytes are taken as they lie), then multiplied with all rows,
// four at a time.
#include <immintrin.h>

#include <cstring>

#include "integer.h"
#include "integer_block.h"
#include "integer_demand.h"
#include "integer_scale.h"

#if defined(__GNUC__)
#define PYMLLM_INLINE static inline __attribute__((always_inline))
#else
#define PYMLLM_INLINE static __forceinline
#endif

namespace pymllm::integer {
namespace {

constexpr int kLanes = 8;

// acc += four u8 x s8 products in each lane. kLarge: u8 may exceed 127, so that pairs of products need not fit in 16
// bits: the even and the odd bytes apart.
template <bool kLarge>
PYMLLM_INLINE __m256i dot(__m256i acc, __m256i u8, __m256i s8) {
#if defined(PYMLLM_AVX_VNNI)
  return _mm256_dpbusd_avx_epi32(acc, u8, s8);
#else
  if (kLarge) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u8, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
#endif
}

PYMLLM_INLINE __m256i load_bytes(const void *data) { return _mm256_loadu_si256(static_cast<const __m256i *>(data)); }

PYMLLM_INLINE __m256 load_floats(Dtype dtype, const void *data, std::int64_t i) {
  if (dtype == Dtype::f32) return _mm256_loadu_ps(static_cast<const float *>(data) + i);
  const auto *halves = reinterpret_cast<const __m128i *>(static_cast<const std::uint16_t *>(data) + i);
  const __m128i half = _mm_loadu_si128(halves);
  if (dtype == Dtype::f16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

PYMLLM_INLINE void store_floats(Dtype dtype, void *data, std::int64_t i, __m256 value) {
  if (dtype == Dtype::f32) return _mm256_storeu_ps(static_cast<float *>(data) + i, value);
  __m128i half;
  if (dtype == Dtype::f16) {
    half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m256i word = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(word, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_srli_epi32(_mm256_blendv_epi8(even, nan, is_nan), 16);
    half = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i *>(static_cast<std::uint16_t *>(data) + i), half);
}

// ------------------------------------------------------------------------------------------------------ activations

PYMLLM_INLINE std::int32_t add_lanes(__m256i value) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

PYMLLM_INLINE std::uint32_t largest_lane(__m256i value) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
}

void quantise(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
              std::int64_t last) {
  const int group = static_cast<int>(weights.group), vectors = group / kLanes;
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  for (std::int64_t g = first; g < last; ++g) {
    for (std::int64_t token = 0; token < floats.tokens; ++token) {
      __m256 values[kMaxGroup / kLanes];
      __m256i largest = _mm256_setzero_si256();
      for (int i = 0; i < vectors; ++i) {
        values[i] = load_floats(floats.dtype, floats.x, token * weights.in_features + g * group + kLanes * i);
        // As integers, magnitudes keep their order, and NaN is above infinity.
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(values[i]), magnitude_bits));
      }
      GroupScale scale = group_scale(largest_lane(largest), out.slices);
      const __m256 inverse = _mm256_set1_ps(scale.inverse), ratio = _mm256_set1_ps(kSliceRatio);
      // NaN times 0 is no code.
      const __m256 keep = _mm256_castsi256_ps(_mm256_set1_epi32(scale.inverse != 0 ? -1 : 0));
      for (int i = 0; i < vectors; ++i) values[i] = _mm256_and_ps(keep, _mm256_mul_ps(values[i], inverse));
      for (int slice = 0; slice < out.slices; ++slice) {
        const std::int64_t row = g * out.rows + token * out.slices + slice;
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < vectors; ++i) {
          const __m256i code = _mm256_cvtps_epi32(values[i]);
          sum = _mm256_add_epi32(sum, code);
          values[i] = _mm256_mul_ps(_mm256_sub_ps(values[i], _mm256_cvtepi32_ps(code)), ratio);
          const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
          _mm_storel_epi64(reinterpret_cast<__m128i *>(out.codes + row * group + kLanes * i),
                           _mm_packs_epi16(words, words));
        }
        out.scales[row] = scale.scale;
        out.negative_sums[row] = -add_lanes(sum);
        scale.scale *= 1.0f / kSliceRatio;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- weights

struct Tile {
  const std::uint8_t *values;  // [G/4 quads][64]
  alignas(32) std::int32_t zeros[kBlockRows];
  alignas(32) float scales[kBlockRows];
  alignas(32) float offsets[kBlockRows];
  alignas(32) std::uint8_t decoded[kMaxGroup * kBlockRows];
};

PYMLLM_INLINE __m256 decode_scales(Scales kind, const std::uint8_t *scales) {
  switch (kind) {
  case Scales::f16: return load_floats(Dtype::f16, scales, 0);
  case Scales::bf16: return load_floats(Dtype::bf16, scales, 0);
  case Scales::f32: return load_floats(Dtype::f32, scales, 0);
  default: {
    alignas(32) float decoded[kLanes];
    for (int i = 0; i < kLanes; ++i) decoded[i] = read_scale(kind, scales, i);
    return _mm256_load_ps(decoded);
  }
  }
}

void decode_header(const Format &format, const std::uint8_t *block, Tile &tile) {
  const std::int64_t scale_bytes = format.scale_bytes();
  const std::uint8_t *stored = block + format.zeros_offset();
  for (int r = 0; r < kBlockRows; r += kLanes) {
    _mm256_store_ps(tile.scales + r, decode_scales(format.scales, block + r * scale_bytes));
    __m256i zeros = _mm256_setzero_si256();
    if (format.zeros == Zeros::same) zeros = _mm256_set1_epi32(format.zero);
    else if (format.zeros == Zeros::each)
      zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(stored + r)));
    else
      _mm256_store_ps(tile.offsets + r, load_floats(Dtype::f32, stored, r));
    _mm256_store_si256(reinterpret_cast<__m256i *>(tile.zeros + r), zeros);
  }
}

void decode_tile(const Format &format, const std::uint8_t *block, std::int64_t group, Tile &tile) {
  decode_header(format, block, tile);
  const std::uint8_t *lines = block + format.header_bytes();
  constexpr std::int64_t ahead = 1088;  // bytes
  if (format.codes == Codes::bytes) {
    tile.values = lines;
    for (std::int64_t at = 0; at < group * kBlockRows; at += 64)
      _mm_prefetch(reinterpret_cast<const char *>(lines + at + ahead), _MM_HINT_T0);
    return;
  }
  const __m256i nibble = _mm256_set1_epi8(15);
  const bool mapped = format.table != nullptr;
  __m256i table = nibble;
  if (mapped) table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(format.table)));
  const std::int64_t half = group * 8;
  for (std::int64_t at = 0; at < half; at += 32) {
    const __m256i both = load_bytes(lines + at);
    if (at % 64 == 0) _mm_prefetch(reinterpret_cast<const char *>(lines + at + ahead), _MM_HINT_T0);
    __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    if (mapped) low = _mm256_shuffle_epi8(table, low), high = _mm256_shuffle_epi8(table, high);
    _mm256_store_si256(reinterpret_cast<__m256i *>(tile.decoded + at), low);
    _mm256_store_si256(reinterpret_cast<__m256i *>(tile.decoded + half + at), high);
  }
  tile.values = tile.decoded;
}

// One group for R rows from `at` = group * rows + row on; adds to sums [R][16].
template <int R, bool kLarge>
void tile_rows(const Tile &tile, const Activations &x, std::int64_t at, int group, float *sums) {
  const std::int8_t *codes = x.codes + at * group;
  __m256i acc[R][2];
#pragma GCC unroll 4
  for (int m = 0; m < R; ++m) {
    const __m256i negative_sum = _mm256_set1_epi32(x.negative_sums[at + m]);
    acc[m][0] = _mm256_mullo_epi32(load_bytes(tile.zeros), negative_sum);
    acc[m][1] = _mm256_mullo_epi32(load_bytes(tile.zeros + kLanes), negative_sum);
  }
  for (int k = 0; k < group; k += 4) {
    const __m256i weight0 = load_bytes(tile.values + 16 * k), weight1 = load_bytes(tile.values + 16 * k + 32);
#pragma GCC unroll 4
    for (int m = 0; m < R; ++m) {
      std::int32_t quad;
      std::memcpy(&quad, codes + m * group + k, 4);
      const __m256i quads = _mm256_set1_epi32(quad);
      acc[m][0] = dot<kLarge>(acc[m][0], weight0, quads);
      acc[m][1] = dot<kLarge>(acc[m][1], weight1, quads);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < R; ++m) {
    const __m256 scale = _mm256_set1_ps(x.scales[at + m]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float *sum = sums + m * kBlockRows + kLanes * half;
      const __m256 scales = _mm256_load_ps(tile.scales + kLanes * half);
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[m][half]), scales);
      _mm256_storeu_ps(sum, _mm256_fmadd_ps(scaled, scale, _mm256_loadu_ps(sum)));
    }
  }
}

void add_offsets(const Tile &tile, const Activations &x, std::int64_t g, float *sums) {
  for (std::int64_t row = 0; row < x.rows; ++row) {
    const std::int64_t at = g * x.rows + row;
    const __m256 sum = _mm256_set1_ps(static_cast<float>(-x.negative_sums[at]) * x.scales[at]);
    for (int r = 0; r < kBlockRows; r += kLanes) {
      float *to = sums + row * kBlockRows + r;
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_load_ps(tile.offsets + r), sum, _mm256_loadu_ps(to)));
    }
  }
}

// sums: the slices of one token, 16 floats apart. Adds them, the smallest first, and the bias.
void finish(const float *sums, int slices, const Floats &floats, const Weights &weights, std::int64_t token,
            std::int64_t row_block) {
  const std::int64_t output = row_block * kBlockRows, left = weights.out_features - output;
  const std::size_t element = floats.dtype == Dtype::f32 ? 4 : 2;
  const std::size_t bytes = element * static_cast<std::size_t>(left < kBlockRows ? left : kBlockRows);
  alignas(32) std::uint8_t bias[64] = {}, result[64];
  alignas(32) float factors[kBlockRows] = {};
  if (weights.row_factors != nullptr)
    std::memcpy(factors, weights.row_factors + output,
                sizeof(float) * static_cast<std::size_t>(left < kBlockRows ? left : kBlockRows));
  if (floats.bias != nullptr)
    std::memcpy(bias, static_cast<const std::uint8_t *>(floats.bias) + output * element, bytes);
  for (int i = 0; i < kBlockRows; i += kLanes) {
    __m256 sum = _mm256_loadu_ps(sums + (slices - 1) * kBlockRows + i);
    for (int slice = slices - 1; slice-- > 0;) sum = _mm256_add_ps(sum, _mm256_loadu_ps(sums + slice * kBlockRows + i));
    if (weights.row_factors != nullptr) sum = _mm256_mul_ps(sum, _mm256_load_ps(factors + i));
    store_floats(floats.dtype, result, i, _mm256_add_ps(sum, load_floats(floats.dtype, bias, i)));
  }
  std::memcpy(static_cast<std::uint8_t *>(floats.y) + (token * weights.out_features + output) * element, result, bytes);
}

#include "integer_tiles.h"

} // namespace

#if defined(PYMLLM_AVX_VNNI)
const Kernels kAvx2Vnni{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};
#else
const Kernels kAvx2{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};
#endif

} // namespace pymllm::integer
