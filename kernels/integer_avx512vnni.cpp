// The integer linear with AVX-512 VNNI. Compiled with -mavx512*: see isa.h for what such a file must not contain.
//
// One kernel for every number of tokens (integer_avx512vnni_kernel.h): a group of 2 or 4 row blocks is applied to up to
// 8 rows of activations. The commonest 4-bit codes (Format::fused, and those of a table with 8-bit scales) are unpacked in
// registers, and again for the next rows, which costs nothing: three instructions beside 32 products, on other ports.
// Bytes are taken as they lie. Other 4-bit codes, and all other headers, are decoded into the L1 cache once a group.
#include <immintrin.h>

#include "integer.h"
#include "integer_avx512vnni_kernel.h"
#include "integer_demand.h"
#include "integer_scale.h"

#define PYMLLM_INLINE static inline __attribute__((always_inline))

namespace pymllm::integer {
namespace {

PYMLLM_INLINE __m512 load_floats(Dtype dtype, const void *data, std::int64_t i, __mmask16 mask = 0xffff) {
  if (dtype == Dtype::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(data) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const std::uint16_t *>(data) + i);
  if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

PYMLLM_INLINE void store_floats(Dtype dtype, void *data, std::int64_t i, __m512 value, __mmask16 mask) {
  if (dtype == Dtype::f32) return _mm512_mask_storeu_ps(static_cast<float *>(data) + i, mask, value);
  __m256i half;
  if (dtype == Dtype::f16) {
    half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i word = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i nan = _mm512_or_si512(word, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(even, is_nan, nan), 16));
  }
  _mm256_mask_storeu_epi16(static_cast<std::uint16_t *>(data) + i, mask, half);
}

// ------------------------------------------------------------------------------------------------------ activations

template <int kGroup>
void quantise_groups(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
                     std::int64_t last) {
  constexpr int kVectors = kGroup / 16;
  for (std::int64_t g = first; g < last; ++g) {
    for (std::int64_t token = 0; token < floats.tokens; ++token) {
      __m512 values[kVectors];
      __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        values[i] = load_floats(floats.dtype, floats.x, token * weights.in_features + g * kGroup + 16 * i);
        // As integers, magnitudes keep their order, and NaN is above infinity.
        largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(values[i])));
      }
      GroupScale scale = group_scale(static_cast<std::uint32_t>(_mm512_reduce_max_epi32(largest)), out.slices);
      const __m512 inverse = _mm512_set1_ps(scale.inverse), ratio = _mm512_set1_ps(kSliceRatio);
      const __mmask16 keep = scale.inverse != 0 ? 0xffff : 0;  // NaN times 0 is no code
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) values[i] = _mm512_maskz_mul_ps(keep, values[i], inverse);
      for (int slice = 0; slice < out.slices; ++slice) {
        const std::int64_t row = g * out.rows + token * out.slices + slice;
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
          const __m512i code = _mm512_cvtps_epi32(values[i]);
          sum = _mm512_add_epi32(sum, code);
          values[i] = _mm512_mul_ps(_mm512_sub_ps(values[i], _mm512_cvtepi32_ps(code)), ratio);
          _mm_storeu_si128(reinterpret_cast<__m128i *>(out.codes + row * kGroup + 16 * i), _mm512_cvtepi32_epi8(code));
        }
        out.scales[row] = scale.scale;
        out.negative_sums[row] = -_mm512_reduce_add_epi32(sum);
        scale.scale *= 1.0f / kSliceRatio;
      }
    }
  }
}

void quantise(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
              std::int64_t last) {
  if (weights.group == 128) return quantise_groups<128>(floats, weights, out, first, last);
  if (weights.group == 64) return quantise_groups<64>(floats, weights, out, first, last);
  if (weights.group == 32) return quantise_groups<32>(floats, weights, out, first, last);
  quantise_groups<16>(floats, weights, out, first, last);
}

// ----------------------------------------------------------------------------------------------------------- output

// sums: the slices of a token `stride` floats apart. Adds them, the smallest first, and the bias.
PYMLLM_INLINE void finish(const float *sums, std::int64_t stride, int slices, const Floats &floats,
                          const Weights &weights, std::int64_t token, std::int64_t row_block) {
  const std::int64_t output = row_block * kBlockRows, left = weights.out_features - output;
  const __mmask16 mask = left >= kBlockRows ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  __m512 sum = _mm512_loadu_ps(sums + (slices - 1) * stride);
  for (int slice = slices - 1; slice-- > 0;) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + slice * stride));
  if (weights.row_factors != nullptr)
    sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(mask, weights.row_factors + output));
  if (floats.bias != nullptr) sum = _mm512_add_ps(sum, load_floats(floats.dtype, floats.bias, output, mask));
  store_floats(floats.dtype, floats.y, token * weights.out_features + output, sum, mask);
}

// ---------------------------------------------------------------------------------------------------------- products

constexpr std::int64_t kStreams = 4;             // row blocks read side by side: 10-15 % over one, while memory-bound
constexpr std::int64_t kStreamRows = 32;         // above so many rows, 2: their sums shall stay in the L1 cache
constexpr std::int64_t kCodesInL2 = 448 * 1024;  // bytes of activations that are read again for every row block

// How a thread goes through its row blocks: as `streams` long streams, `length` blocks each, so that what is prefetched
// past the end of a block is what the stream reads next. A pass takes `groups` groups of all of them.
struct Plan {
  std::int64_t streams, length, groups;
  bool one_pass;

  Plan(const Weights &weights, std::int64_t rows, std::int64_t row_blocks) {
    streams = rows <= kStreamRows ? kStreams : 2;
    length = (row_blocks + streams - 1) / streams;
    groups = kCodesInL2 / (rows * weights.group);
    if (groups < 8) groups = 8;
    one_pass = groups >= weights.groups();
    if (one_pass) groups = weights.groups();
  }
};

// One pass keeps the sums of the row blocks that advance together, several those of all row blocks of the thread.
std::size_t scratch_bytes(const Weights &weights, std::int64_t rows, std::int64_t row_blocks) {
  const Plan plan(weights, rows, row_blocks);
  const std::int64_t steps = plan.one_pass ? 1 : plan.length;
  return static_cast<std::size_t>(steps * plan.streams * rows * kBlockRows) * sizeof(float);
}

// One group of kBlocks row blocks, for all rows; adds to sums [R][kBlocks][16].
template <int kBlocks, Lines kLines>
PYMLLM_INLINE void multiply_lines(const std::uint8_t *const *blocks, const Header *header, const CodeTable *table,
                                  const Weights &weights, const Activations &x, std::int64_t g, float *sums) {
  const std::int64_t tiles = (x.rows + kTileRows<kBlocks> - 1) / kTileRows<kBlocks>;
  std::int64_t row = 0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t next = x.rows * (tile + 1) / tiles;  // even tiles: 9 rows are 4 and 5, not 8 and 1
    const std::int64_t at = g * x.rows + row;
    multiply_rows<kBlocks, kLines>(next - row, {blocks, header, table, weights.group, x.codes + at * weights.group,
                                                x.negative_sums + at, x.scales + at, sums + row * kBlocks * kBlockRows});
    row = next;
  }
}

PYMLLM_INLINE __m512 decode_scales(Scales kind, const std::uint8_t *scales) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(scales));
  switch (kind) {
  case Scales::f16: return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(scales)));
  case Scales::bf16: {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(scales));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  case Scales::f32: return _mm512_loadu_ps(scales);
  case Scales::e4m3: {  // seee emmm -> f16 s0ee eemm m000 0000, which is that divided by 256
    const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
    const __m256i halves = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xbf80)));
    const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0f));
    const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(bytes, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
    return _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  }
  default: {
    __m512i words = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
    words = _mm512_mask_mov_epi32(words, _mm512_cmpeq_epi32_mask(words, _mm512_setzero_si512()),
                                  _mm512_set1_epi32(0x00400000));
    words = _mm512_mask_mov_epi32(words, _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(-1)), _mm512_set1_epi32(0x7fc00000));
    return _mm512_castsi512_ps(words);
  }
  }
}

PYMLLM_INLINE void decode_header(const Format &format, const std::uint8_t *block, int b, Header &header) {
  _mm512_storeu_ps(header.scales[b], decode_scales(format.scales, block));
  __m512i zeros = _mm512_setzero_si512();
  if (format.zeros == Zeros::same) zeros = _mm512_set1_epi32(format.zero);
  else if (format.zeros == Zeros::each)
    zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(block + format.zeros_offset())));
  else
    _mm512_storeu_ps(header.offsets[b], _mm512_loadu_ps(block + format.zeros_offset()));
  _mm512_storeu_si512(header.zeros[b], zeros);
}

// 4-bit codes to lines of values, through a table of 16.
PYMLLM_INLINE void decode_lines(const std::uint8_t *lines, std::int64_t group, __m512i table, std::uint8_t *values) {
  constexpr std::int64_t ahead = 2176;  // bytes, as in the kernel
  const __m512i nibble = _mm512_set1_epi8(15);
  const std::int64_t half = group * 8;
  for (std::int64_t at = 0; at < half; at += 64) {
    const __m512i both = _mm512_loadu_si512(lines + at);
    _mm_prefetch(reinterpret_cast<const char *>(lines + at + ahead), _MM_HINT_T0);
    const __m512i low = _mm512_and_si512(both, nibble), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    _mm512_store_si512(values + at, _mm512_shuffle_epi8(table, low));
    _mm512_store_si512(values + half + at, _mm512_shuffle_epi8(table, high));
  }
}

alignas(16) const std::uint8_t kSameValues[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <int kBlocks>
void multiply_values(const std::uint8_t *const *blocks, const Weights &weights, const Activations &x, std::int64_t g,
                     float *sums) {
  const Format &format = weights.format;
  alignas(64) Header header;
  const std::uint8_t *lines[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    decode_header(format, blocks[b], b, header);
    lines[b] = blocks[b] + format.header_bytes();
  }
  if (format.codes == Codes::bytes) {
    multiply_lines<kBlocks, Lines::streamed>(lines, &header, nullptr, weights, x, g, sums);
  } else {
    alignas(64) std::uint8_t values[kBlocks][kMaxGroup * kBlockRows];
    const std::uint8_t *source = format.table == nullptr ? kSameValues : format.table;
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(source)));
    for (int b = 0; b < kBlocks; ++b) {
      decode_lines(lines[b], weights.group, table, values[b]);
      lines[b] = values[b];
    }
    multiply_lines<kBlocks, Lines::cached>(lines, &header, nullptr, weights, x, g, sums);
  }
  if (format.zeros != Zeros::offsets) return;
  for (std::int64_t row = 0; row < x.rows; ++row) {
    const std::int64_t at = g * x.rows + row;
    const __m512 sum = _mm512_set1_ps(static_cast<float>(-x.negative_sums[at]) * x.scales[at]);
    for (int b = 0; b < kBlocks; ++b) {
      float *to = sums + (row * kBlocks + b) * kBlockRows;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(header.offsets[b]), sum, _mm512_loadu_ps(to)));
    }
  }
}

template <int kBlocks>
PYMLLM_INLINE void multiply_group(const std::uint8_t *const *blocks, const Weights &weights, const Activations &x,
                                  std::int64_t g, float *sums) {
  const Format &format = weights.format;
  if (format.codes == Codes::nibbles && format.table != nullptr && format.zeros == Zeros::same &&
      format.scales >= Scales::e4m3) {
    CodeTable table;
    _mm_storeu_si128(reinterpret_cast<__m128i *>(table.values),
                     _mm_loadu_si128(reinterpret_cast<const __m128i *>(format.table)));
    table.zero = format.zero;
    if (format.scales == Scales::e4m3)
      multiply_lines<kBlocks, Lines::e4m3>(blocks, nullptr, &table, weights, x, g, sums);
    else
      multiply_lines<kBlocks, Lines::e8m0>(blocks, nullptr, &table, weights, x, g, sums);
  } else if (!format.fused()) {
    multiply_values<kBlocks>(blocks, weights, x, g, sums);
  } else if (format.scales == Scales::f16) {
    multiply_lines<kBlocks, Lines::f16>(blocks, nullptr, nullptr, weights, x, g, sums);
  } else {
    multiply_lines<kBlocks, Lines::bf16>(blocks, nullptr, nullptr, weights, x, g, sums);
  }
}

template <int kBlocks>
void multiply_blocks(const Weights &weights, const Activations &x, const Floats &floats, std::int64_t first,
                     std::int64_t last, float *scratch) {
  const Plan plan(weights, x.rows, last - first);
  const std::int64_t parts = plan.streams / kBlocks;
  const std::int64_t part = kBlocks * x.rows * kBlockRows;  // floats of the sums of kBlocks row blocks
  for (std::int64_t begin = 0; begin < weights.groups(); begin += plan.groups) {
    const std::int64_t rest = weights.groups() - begin, end = begin + (rest < plan.groups ? rest : plan.groups);
    float *sums = scratch;
    for (std::int64_t n = first; n < first + plan.length; ++n) {
      if (begin == 0)
        for (std::int64_t i = 0; i < parts * part; i += 16) _mm512_storeu_ps(sums + i, _mm512_setzero_ps());
      for (std::int64_t g = begin; g < end; ++g) {
        const std::uint8_t *blocks[kStreams];
        for (std::int64_t s = 0; s < plan.streams; ++s) {
          const std::int64_t row_block = n + s * plan.length;  // past the end: the last one again, to no purpose
          blocks[s] = weights.block(row_block < last ? row_block : last - 1, g);
        }
        for (std::int64_t i = 0; i < parts; ++i)
          multiply_group<kBlocks>(blocks + i * kBlocks, weights, x, g, sums + i * part);
      }
      if (end == weights.groups())
        for (std::int64_t token = 0; token < floats.tokens; ++token)
          for (std::int64_t s = 0; s < plan.streams && n + s * plan.length < last; ++s)
            finish(sums + s / kBlocks * part + (token * x.slices * kBlocks + s % kBlocks) * kBlockRows,
                   kBlocks * kBlockRows, x.slices, floats, weights, token, n + s * plan.length);
      if (!plan.one_pass) sums += parts * part;
    }
  }
}

void multiply(const Weights &weights, const Activations &x, const Floats &floats, std::int64_t first,
              std::int64_t last, void *scratch) {
  if (x.rows <= 4) return multiply_blocks<4>(weights, x, floats, first, last, static_cast<float *>(scratch));
  multiply_blocks<2>(weights, x, floats, first, last, static_cast<float *>(scratch));
}

} // namespace

const Kernels kAvx512Vnni{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};

} // namespace pymllm::integer
