// The integer linear with AVX2, and with AVX2 + AVX-VNNI: integer_avx2vnni.cpp compiles this file again for the latter.
// See isa.h for what such a file must not contain.
#include "integer.h"
#include "integer_block.h"
#include "integer_scale.h"
#include "vector_avx2.h"

namespace pymllm::integer {
namespace {

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

struct V : Lanes {
  static Vec round(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  template <int N>
  static std::uint32_t largest_bits(const Vec (&v)[N]) {
    __m256i largest = _mm256_setzero_si256();
    PYMLLM_UNROLL
    for (int i = 0; i < N; ++i)
      largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v[i]), _mm256_set1_epi32(0x7fffffff)));
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
  }
  static void store_codes(std::int8_t *codes, Vec v) {
    const __m256i code = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(codes), _mm_packs_epi16(words, words));
  }
  static void widen(const std::uint8_t *bytes, std::int32_t *to) {
    const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes)));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), words);
  }

  PYMLLM_INLINE const std::uint8_t *decode_lines(const Format &format, const std::uint8_t *lines, std::int64_t group,
                                                 std::uint8_t *decoded) {
    constexpr std::int64_t ahead = 1088;  // bytes
    if (format.codes == Codes::bytes) {
      for (std::int64_t at = 0; at < group * kBlockRows; at += 64) prefetch_line(lines + at + ahead);
      return lines;
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    const bool mapped = format.table != nullptr;
    __m256i table = nibble;
    if (mapped) table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(format.table)));
    const std::int64_t half = group * 8;
    for (std::int64_t at = 0; at < half; at += 32) {
      const __m256i both = load_bytes(lines + at);
      if (at % 64 == 0) prefetch_line(lines + at + ahead);
      __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
      if (mapped) low = _mm256_shuffle_epi8(table, low), high = _mm256_shuffle_epi8(table, high);
      _mm256_store_si256(reinterpret_cast<__m256i *>(decoded + at), low);
      _mm256_store_si256(reinterpret_cast<__m256i *>(decoded + half + at), high);
    }
    return decoded;
  }

  template <int R, bool kLarge>
  PYMLLM_INLINE void dots(const std::uint8_t *values, const std::int32_t *zeros, const std::int8_t *codes,
                          const std::int32_t *negative_sums, int group, Vec (&out)[R][2]) {
    __m256i acc[R][2];
    PYMLLM_UNROLL
    for (int m = 0; m < R; ++m)
      PYMLLM_UNROLL
      for (int v = 0; v < 2; ++v)
        acc[m][v] = _mm256_mullo_epi32(load_bytes(zeros + kLanes * v), _mm256_set1_epi32(negative_sums[m]));
    for (int k = 0; k < group; k += 4) {
      const __m256i weight0 = load_bytes(values + 16 * k), weight1 = load_bytes(values + 16 * k + 32);
      PYMLLM_UNROLL
      for (int m = 0; m < R; ++m) {
        std::int32_t quad;
        std::memcpy(&quad, codes + m * group + k, 4);
        const __m256i quads = _mm256_set1_epi32(quad);
        acc[m][0] = dot<kLarge>(acc[m][0], weight0, quads);
        acc[m][1] = dot<kLarge>(acc[m][1], weight1, quads);
      }
    }
    PYMLLM_UNROLL
    for (int m = 0; m < R; ++m)
      PYMLLM_UNROLL
      for (int v = 0; v < 2; ++v) out[m][v] = _mm256_cvtepi32_ps(acc[m][v]);
  }
};

#include "integer_kernel.h"
#include "integer_tiles.h"

} // namespace

#if defined(PYMLLM_AVX_VNNI)
const Kernels kAvx2Vnni{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};
#else
const Kernels kAvx2{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};
#endif

} // namespace pymllm::integer
