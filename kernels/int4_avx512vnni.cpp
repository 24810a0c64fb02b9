// The int4 linear with AVX-512 VNNI. Compiled with -mavx512*: see isa.h for what such a file must not contain.
//
// One kernel for every number of tokens (int4_avx512vnni_kernel.h): a group of 2 or 4 row blocks is unpacked in
// registers and applied to up to 8 rows of activations. Unpacking it again for the next rows costs nothing: three
// instructions beside 32 products, on other ports.
#include <immintrin.h>

#include "int4.h"
#include "int4_avx512vnni_kernel.h"
#include "int4_scale.h"

#define PYMLLM_INLINE static inline __attribute__((always_inline))

namespace pymllm::int4 {
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
  quantise_groups<32>(floats, weights, out, first, last);
}

// ----------------------------------------------------------------------------------------------------------- output

// sums: the slices of a token `stride` floats apart. Adds them, the smallest first, and the bias.
PYMLLM_INLINE void finish(const float *sums, std::int64_t stride, int slices, const Floats &floats,
                          const Weights &weights, std::int64_t token, std::int64_t row_block) {
  const std::int64_t output = row_block * kBlockRows, left = weights.out_features - output;
  const __mmask16 mask = left >= kBlockRows ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  __m512 sum = _mm512_loadu_ps(sums + (slices - 1) * stride);
  for (int slice = slices - 1; slice-- > 0;) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + slice * stride));
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

// Groups [begin, end) of kBlocks row blocks, for all rows; adds to sums [R][kBlocks][16].
template <int kBlocks>
PYMLLM_INLINE void multiply_group(const std::uint8_t *const *blocks, const Weights &weights, const Activations &x,
                                  std::int64_t g, float *sums) {
  const std::int64_t tiles = (x.rows + kTileRows<kBlocks> - 1) / kTileRows<kBlocks>;
  std::int64_t row = 0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t next = x.rows * (tile + 1) / tiles;  // even tiles: 9 rows are 4 and 5, not 8 and 1
    const std::int64_t at = g * x.rows + row;
    multiply_rows<kBlocks>(next - row, {blocks, weights.group, x.codes + at * weights.group, x.negative_sums + at,
                                        x.scales + at, sums + row * kBlocks * kBlockRows});
    row = next;
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

const Kernels kAvx512Vnni{quantise, multiply, scratch_bytes};

} // namespace pymllm::int4
