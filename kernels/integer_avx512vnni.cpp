// The integer linear with AVX-512 VNNI. Compiled with -mavx512*: see isa.h for what such a file must not contain.
//
// One kernel for every number of tokens (integer_avx512vnni_kernel.h): a group of 2 or 4 row blocks is applied to up to
// 8 rows of activations. The commonest 4-bit codes (Format::fused, and those of a table) are unpacked in
// registers, and again for the next rows, which costs nothing: three instructions beside 32 products, on other ports.
// Bytes are taken as they lie. Other 4-bit codes, and all other headers, are decoded into the L1 cache once a group.
#include "integer.h"
#include "integer_avx512vnni_kernel.h"
#include "integer_block.h"
#include "integer_scale.h"
#include "vector_avx512.h"

namespace pymllm::integer {
namespace {

struct V : Lanes {
  static Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  template <int N>
  static std::uint32_t largest_bits(const Vec (&v)[N]) {
    __m512i largest = _mm512_setzero_si512();
    PYMLLM_UNROLL
    for (int i = 0; i < N; ++i) largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(v[i])));
    return static_cast<std::uint32_t>(_mm512_reduce_max_epi32(largest));
  }
  static void store_codes(std::int8_t *codes, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(codes), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  static void widen(const std::uint8_t *bytes, std::int32_t *to) {
    _mm512_storeu_si512(to, _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes))));
  }
};

#include "integer_kernel.h"

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

// 4-bit codes to lines of values, through a table of 16.
PYMLLM_INLINE void decode_lines(const std::uint8_t *lines, std::int64_t group, __m512i table, std::uint8_t *values) {
  constexpr std::int64_t ahead = 2176;  // bytes, as in the kernel
  const __m512i nibble = _mm512_set1_epi8(15);
  const std::int64_t half = group * 8;
  for (std::int64_t at = 0; at < half; at += 64) {
    const __m512i both = _mm512_loadu_si512(lines + at);
    prefetch_line(lines + at + ahead);
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
    decode_header(format, blocks[b], header.zeros[b], header.scales[b], header.offsets[b]);
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
  if (format.zeros == Zeros::offsets) add_offsets<kBlocks * kBlockRows>(header.offsets[0], x, g, sums);
}

template <int kBlocks>
PYMLLM_INLINE void multiply_group(const std::uint8_t *const *blocks, const Weights &weights, const Activations &x,
                                  std::int64_t g, float *sums) {
  const Format &format = weights.format;
  if (format.codes == Codes::nibbles && format.table != nullptr && format.zeros == Zeros::same &&
      format.scales != Scales::bf16) {
    CodeTable table;
    _mm_storeu_si128(reinterpret_cast<__m128i *>(table.values),
                     _mm_loadu_si128(reinterpret_cast<const __m128i *>(format.table)));
    table.zero = format.zero;
    if (format.scales == Scales::f32)
      multiply_lines<kBlocks, Lines::table_f32>(blocks, nullptr, &table, weights, x, g, sums);
    else if (format.scales == Scales::f16)
      multiply_lines<kBlocks, Lines::table_f16>(blocks, nullptr, &table, weights, x, g, sums);
    else if (format.scales == Scales::e4m3)
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
