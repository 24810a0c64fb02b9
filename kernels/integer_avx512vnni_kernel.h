// One group of 2 or 4 row blocks times up to 8 rows of activations, in registers: the inner loop of the AVX-512 path.
// It reads 4-bit codes from the packed blocks, or values that are bytes, from the blocks or from the L1 cache.
//
// Written in asm because gcc 12 spills accumulators and weights although it has registers left: on a Zen 5 the same
// loop in C++ reaches 55 % of the VNNI peak from the L1 cache, this one 97 %. Registers:
//   0-15   accumulators: row m, block b is m * kBlocks + b
//   16-19  weights of the low nibbles, one register a block; 20-23 of the high ones
//   24     four activations of one row in every lane; its scale in the epilogue
//   25     0x0f in every byte; 26, 27 the table and its zero
#pragma once

#include <cstdint>

#include "integer.h"

namespace pymllm::integer {
namespace {

// What the lines hold: 4-bit codes, behind a header with 16-bit scales and zeros; 4-bit codes of a table, behind scales
// alone (table_f16, table_f32, e4m3, e8m0); values, read from memory, or from a cache. The header of values is apart,
// decoded.
enum class Lines { f16, bf16, table_f16, table_f32, e4m3, e8m0, streamed, cached };

struct Header {
  std::int32_t zeros[4][kBlockRows];
  float scales[4][kBlockRows];  // 256 bytes from the start: LOAD_streamed
  float offsets[4][kBlockRows];
};

// What a kernel over codes of a table needs, in one place: every operand takes a register. Offsets: TABLE_KERNEL.
struct CodeTable {
  std::uint8_t values[16];
  std::int32_t zero;  // of all codes
  std::uint32_t nibbles = 0x0f0f0f0f;
  std::uint32_t least_e8m0 = 0x00400000;  // 2^-127, what code 0 means, has no exponent to be shifted to
  std::uint32_t e4m3_bits = 0xbf80bf80;
  float e4m3_unit = 256.0f;
};

// What a kernel reads: codes [R][group], negative_sums [R], scales [R]; it adds to sums [R][kBlocks][16].
struct KernelArguments {
  const std::uint8_t *const *blocks;  // of values: their lines
  const Header *header;               // of values
  const CodeTable *table;             // of codes of a table
  std::int64_t group;
  const std::int8_t *codes;
  const std::int32_t *negative_sums;
  const float *scales;
  float *sums;
};

constexpr std::uint32_t kNibbles = 0x0f0f0f0f;

// Ahead in each stream, in bytes: two blocks of group 128. Of the memory limit of a Zen 5 (39 GB/s a core) one token
// reaches 0.98 with it, 0.84 with one block, 0.92 with three. Slower memory is content with less, and loses nothing.
#define AHEAD "2176"

#define EACH2(step) step("0", "16", "20") step("1", "17", "21")
#define EACH4(step) EACH2(step) step("2", "18", "22") step("3", "19", "23")

// step(accumulators of the row, "" or "4" for the pointer that it is near, index from there, bytes to its scale)
#define ROWS2_1(step) step(("0", "1"), "", "", "0")
#define ROWS2_2(step) ROWS2_1(step) step(("2", "3"), "", ",%[stride]", "4")
#define ROWS2_3(step) ROWS2_2(step) step(("4", "5"), "", ",%[stride],2", "8")
#define ROWS2_4(step) ROWS2_3(step) step(("6", "7"), "", ",%[stride3]", "12")
#define ROWS2_5(step) ROWS2_4(step) step(("8", "9"), "4", "", "16")
#define ROWS2_6(step) ROWS2_5(step) step(("10", "11"), "4", ",%[stride]", "20")
#define ROWS2_7(step) ROWS2_6(step) step(("12", "13"), "4", ",%[stride],2", "24")
#define ROWS2_8(step) ROWS2_7(step) step(("14", "15"), "4", ",%[stride3]", "28")
#define ROWS4_1(step) step(("0", "1", "2", "3"), "", "", "0")
#define ROWS4_2(step) ROWS4_1(step) step(("4", "5", "6", "7"), "", ",%[stride]", "4")
#define ROWS4_3(step) ROWS4_2(step) step(("8", "9", "10", "11"), "", ",%[stride],2", "8")
#define ROWS4_4(step) ROWS4_3(step) step(("12", "13", "14", "15"), "", ",%[stride3]", "12")

// Before the loop: the zero points, as 32-bit lanes whose upper half is 0, times the negative sum.
#define LOAD_ZEROS(b, low, high) "vpmovzxbd 32(%[block" b "]),%%zmm" low "\n"
#define LOAD_SAME_ZEROS(b, low, high) "vmovdqa64 %%zmm27,%%zmm" low "\n"
#define LOAD_DECODED_ZEROS(b, low, high) "vmovdqu64 64*" b "(%[header]),%%zmm" low "\n"
#define START(acc, low, offset)                           \
  "vpxor %%xmm" acc ",%%xmm" acc ",%%xmm" acc "\n"        \
  "vpdpwssd " offset "(%[negative_sums])%{1to16%},%%zmm" low ",%%zmm" acc "\n"
#define START_ROW2(accs, near, index, offset) START2_(offset, STRIP accs)
#define START_ROW4(accs, near, index, offset) START4_(offset, STRIP accs)
#define START2_(offset, ...) START2(offset, __VA_ARGS__)
#define START4_(offset, ...) START4(offset, __VA_ARGS__)
#define START2(offset, a, b) START(a, "16", offset) START(b, "17", offset)
#define START4(offset, a, b, c, d) START2(offset, a, b) START(c, "18", offset) START(d, "19", offset)

// In the loop: one line of each block, then its low nibbles with one quad of every row, and its high ones.
#define UNPACK(b, low, high) UNPACK_AT("64", b, low, high)
#define UNPACK_e4m3(b, low, high) UNPACK_TABLE("16", b, low, high)
#define UNPACK_e8m0 UNPACK_e4m3
#define UNPACK_table_f16(b, low, high) UNPACK_TABLE("32", b, low, high)
#define UNPACK_table_f32(b, low, high) UNPACK_TABLE("64", b, low, high)
#define UNPACK_TABLE(lines, b, low, high)                 \
  UNPACK_AT(lines, b, low, high)                          \
  "vpshufb %%zmm" low ",%%zmm26,%%zmm" low "\n"           \
  "vpshufb %%zmm" high ",%%zmm26,%%zmm" high "\n"
#define UNPACK_AT(lines, b, low, high)                              \
  "vmovdqu64 " lines "(%[block" b "],%[at]),%%zmm" high "\n"        \
  "prefetcht0 " AHEAD "(%[block" b "],%[at])\n"                     \
  "vpandd %%zmm25,%%zmm" high ",%%zmm" low "\n"                     \
  "vpsrlw $4,%%zmm" high ",%%zmm" high "\n"                         \
  "vpandd %%zmm25,%%zmm" high ",%%zmm" high "\n"
#define LINE_cached(b, low, high) "vmovdqu64 (%[block" b "],%[at]),%%zmm" low "\n"
#define LINE_streamed(b, low, high) LINE_cached(b, low, high) "prefetcht0 " AHEAD "(%[block" b "],%[at])\n"
#define DOT(acc, weight) "vpdpbusd %%zmm24,%%zmm" weight ",%%zmm" acc "\n"
#define LOW_ROW2(accs, near, index, offset) \
  "vpbroadcastd (%[low" near "]" index "),%%zmm24\n" DOT2_("16", "17", STRIP accs)
#define HIGH_ROW2(accs, near, index, offset) \
  "vpbroadcastd (%[high" near "]" index "),%%zmm24\n" DOT2_("20", "21", STRIP accs)
#define LOW_ROW4(accs, near, index, offset) \
  "vpbroadcastd (%[low" near "]" index "),%%zmm24\n" DOT4_("16", "17", "18", "19", STRIP accs)
#define HIGH_ROW4(accs, near, index, offset) \
  "vpbroadcastd (%[high" near "]" index "),%%zmm24\n" DOT4_("20", "21", "22", "23", STRIP accs)
#define DOT2_(...) DOT2(__VA_ARGS__)
#define DOT4_(...) DOT4(__VA_ARGS__)
#define DOT2(w0, w1, a, b) DOT(a, w0) DOT(b, w1)
#define DOT4(w0, w1, w2, w3, a, b, c, d) DOT(a, w0) DOT(b, w1) DOT(c, w2) DOT(d, w3)

// After the loop: sums += accumulator * scale of the weights * scale of the activations.
#define LOAD_f16(b, low, high) \
  "vcvtph2ps (%[block" b "]),%%zmm" low "\n" \
  "prefetcht0 " AHEAD "(%[block" b "],%[at])\n"
#define LOAD_bf16(b, low, high)                                                  \
  "vpmovzxwd (%[block" b "]),%%zmm" low "\nvpslld $16,%%zmm" low ",%%zmm" low "\n" \
  "prefetcht0 " AHEAD "(%[block" b "],%[at])\n"
// seee emmm -> f16 s0ee eemm m000 0000, which is that divided by 256. Neither has NaN: NativeFp4 packs none.
#define LOAD_e4m3(b, low, high)                            \
  "vpmovzxbw (%[block" b "]),%%ymm" low "\n"               \
  "vpsllw $8,%%ymm" low ",%%ymm" low "\n"                  \
  "vpsraw $1,%%ymm" low ",%%ymm" low "\n"                  \
  "vpandd 28(%[table])%{1to8%},%%ymm" low ",%%ymm" low "\n" \
  "vcvtph2ps %%ymm" low ",%%zmm" low "\n"                  \
  "vmulps 32(%[table])%{1to16%},%%zmm" low ",%%zmm" low "\n"
#define LOAD_e8m0(b, low, high)              \
  "vpmovzxbd (%[block" b "]),%%zmm" low "\n" \
  "vpslld $23,%%zmm" low ",%%zmm" low "\n"   \
  "vpmaxud 24(%[table])%{1to16%},%%zmm" low ",%%zmm" low "\n"
#define LOAD_table_f16 LOAD_f16
#define LOAD_table_f32(b, low, high) \
  "vmovups (%[block" b "]),%%zmm" low "\n" \
  "prefetcht0 " AHEAD "(%[block" b "],%[at])\n"
#define LOAD_cached(b, low, high) "vmovups 256+64*" b "(%[header]),%%zmm" low "\n"
#define LOAD_streamed LOAD_cached
#define FINISH(acc, low)                                          \
  "vcvtdq2ps %%zmm" acc ",%%zmm" acc "\n"                         \
  "vmulps %%zmm" low ",%%zmm" acc ",%%zmm" acc "\n"               \
  "vfmadd213ps 64*" acc "(%[sums]),%%zmm24,%%zmm" acc "\n"        \
  "vmovups %%zmm" acc ",64*" acc "(%[sums])\n"
#define FINISH_ROW2(accs, near, index, offset) "vbroadcastss " offset "(%[scales]),%%zmm24\n" FINISH2_(STRIP accs)
#define FINISH_ROW4(accs, near, index, offset) "vbroadcastss " offset "(%[scales]),%%zmm24\n" FINISH4_(STRIP accs)
#define FINISH2_(...) FINISH2(__VA_ARGS__)
#define FINISH4_(...) FINISH4(__VA_ARGS__)
#define FINISH2(a, b) FINISH(a, "16") FINISH(b, "17")
#define FINISH4(a, b, c, d) FINISH2(a, b) FINISH(c, "18") FINISH(d, "19")

#define STRIP(...) __VA_ARGS__

// NEAR: up to 4 rows, addressed from one pointer; FAR: more, the others from a second one.
#define STEP_NEAR "add $4,%[low]\n"
#define STEP_FAR STEP_NEAR "add $4,%[low4]\n"
#define STEP_HIGH_NEAR "add $4,%[high]\n"
#define STEP_HIGH_FAR STEP_HIGH_NEAR "add $4,%[high4]\n"
#define OUTPUTS_NEAR [at] "+r"(at), [low] "+r"(low)
#define OUTPUTS_FAR OUTPUTS_NEAR, [low4] "+r"(low4)
#define OUTPUTS_HIGH_NEAR [high] "+r"(high)
#define OUTPUTS_HIGH_FAR OUTPUTS_HIGH_NEAR, [high4] "+r"(high4)
#define INPUTS2 [block0] "r"(k.blocks[0]), [block1] "r"(k.blocks[1])
#define INPUTS4 INPUTS2, [block2] "r"(k.blocks[2]), [block3] "r"(k.blocks[3])
#define INPUTS [lines] "r"(lines), INPUTS_BUT_LINES
#define INPUTS_BUT_LINES                                                                                          \
  [stride] "r"(stride), [stride3] "r"(3 * stride), [negative_sums] "r"(k.negative_sums), [scales] "r"(k.scales), \
      [sums] "r"(k.sums)
#define CLOBBERED                                                                                                \
  "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
      "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",   \
      "xmm24", "xmm25", "xmm26", "xmm27"

#define CODES_KERNEL(BLOCKS, COUNT, REACH, LINES)                                                                 \
  template <>                                                                                                     \
  void multiply_tile<BLOCKS, COUNT, Lines::LINES>(const KernelArguments &k) {                                      \
    const std::int8_t *low = k.codes, *high = k.codes + k.group / 2;                                              \
    [[maybe_unused]] const std::int8_t *low4 = low + 4 * k.group, *high4 = high + 4 * k.group;                    \
    const std::int64_t lines = k.group * 8, stride = k.group;                                                     \
    std::int64_t at = 0;                                                                                          \
    __asm__ volatile(EACH##BLOCKS(LOAD_ZEROS) ROWS##BLOCKS##_##COUNT(START_ROW##BLOCKS)                           \
                     "vpbroadcastd %[nibbles],%%zmm25\n"                                                          \
                     ".p2align 5\n"                                                                               \
                     "1:\n" EACH##BLOCKS(UNPACK) ROWS##BLOCKS##_##COUNT(LOW_ROW##BLOCKS)                          \
                         ROWS##BLOCKS##_##COUNT(HIGH_ROW##BLOCKS) STEP_##REACH STEP_HIGH_##REACH                  \
                     "add $64,%[at]\n"                                                                            \
                     "cmp %[lines],%[at]\n"                                                                       \
                     "jne 1b\n" EACH##BLOCKS(LOAD_##LINES) ROWS##BLOCKS##_##COUNT(FINISH_ROW##BLOCKS)             \
                     : OUTPUTS_##REACH, OUTPUTS_HIGH_##REACH                                                      \
                     : INPUTS##BLOCKS, INPUTS, [nibbles] "m"(kNibbles)                                            \
                     : CLOBBERED);                                                                                \
  }

#define TABLE_KERNEL(BLOCKS, COUNT, REACH, LINES)                                                                 \
  template <>                                                                                                     \
  void multiply_tile<BLOCKS, COUNT, Lines::LINES>(const KernelArguments &k) {                                      \
    const std::int8_t *low = k.codes, *high = k.codes + k.group / 2;                                              \
    [[maybe_unused]] const std::int8_t *low4 = low + 4 * k.group, *high4 = high + 4 * k.group;                    \
    const std::int64_t lines = k.group * 8, stride = k.group;                                                     \
    std::int64_t at = 0;                                                                                          \
    __asm__ volatile("vbroadcasti32x4 (%[table]),%%zmm26\n"                                                       \
                     "vpbroadcastd 16(%[table]),%%zmm27\n" EACH##BLOCKS(LOAD_SAME_ZEROS)                               \
                         ROWS##BLOCKS##_##COUNT(START_ROW##BLOCKS)                                                \
                     "vpbroadcastd 20(%[table]),%%zmm25\n"                                                        \
                     ".p2align 5\n"                                                                               \
                     "1:\n" EACH##BLOCKS(UNPACK_##LINES) ROWS##BLOCKS##_##COUNT(LOW_ROW##BLOCKS)                  \
                         ROWS##BLOCKS##_##COUNT(HIGH_ROW##BLOCKS) STEP_##REACH STEP_HIGH_##REACH                  \
                     "add $64,%[at]\n"                                                                            \
                     "cmp %[lines],%[at]\n"                                                                       \
                     "jne 1b\n" EACH##BLOCKS(LOAD_##LINES) ROWS##BLOCKS##_##COUNT(FINISH_ROW##BLOCKS)             \
                     : OUTPUTS_##REACH, OUTPUTS_HIGH_##REACH                                                      \
                     : INPUTS##BLOCKS, INPUTS_BUT_LINES, [lines] "m"(lines), [table] "r"(k.table)                \
                     : CLOBBERED);                                                                                \
  }

#define VALUES_KERNEL(BLOCKS, COUNT, REACH, LINES)                                                              \
  template <>                                                                                                   \
  void multiply_tile<BLOCKS, COUNT, Lines::LINES>(const KernelArguments &k) {                                   \
    const std::int8_t *low = k.codes;                                                                           \
    [[maybe_unused]] const std::int8_t *low4 = low + 4 * k.group;                                               \
    const std::int64_t lines = k.group * 16, stride = k.group;                                                  \
    std::int64_t at = 0;                                                                                        \
    __asm__ volatile(EACH##BLOCKS(LOAD_DECODED_ZEROS) ROWS##BLOCKS##_##COUNT(START_ROW##BLOCKS)                 \
                     ".p2align 5\n"                                                                             \
                     "1:\n" EACH##BLOCKS(LINE_##LINES) ROWS##BLOCKS##_##COUNT(LOW_ROW##BLOCKS) STEP_##REACH     \
                     "add $64,%[at]\n"                                                                          \
                     "cmp %[lines],%[at]\n"                                                                     \
                     "jne 1b\n" EACH##BLOCKS(LOAD_##LINES) ROWS##BLOCKS##_##COUNT(FINISH_ROW##BLOCKS)           \
                     : OUTPUTS_##REACH                                                                          \
                     : INPUTS##BLOCKS, INPUTS, [header] "r"(k.header)                                           \
                     : CLOBBERED);                                                                              \
  }

template <int kBlocks, int R, Lines kLines>
void multiply_tile(const KernelArguments &k);

#define KERNELS(KIND, LINES) \
  KIND(2, 1, NEAR, LINES)    \
  KIND(2, 2, NEAR, LINES)    \
  KIND(2, 3, NEAR, LINES)    \
  KIND(2, 4, NEAR, LINES)    \
  KIND(2, 5, FAR, LINES)     \
  KIND(2, 6, FAR, LINES)     \
  KIND(2, 7, FAR, LINES)     \
  KIND(2, 8, FAR, LINES)     \
  KIND(4, 1, NEAR, LINES)    \
  KIND(4, 2, NEAR, LINES)    \
  KIND(4, 3, NEAR, LINES)    \
  KIND(4, 4, NEAR, LINES)

KERNELS(CODES_KERNEL, f16)
KERNELS(CODES_KERNEL, bf16)
KERNELS(TABLE_KERNEL, table_f16)
KERNELS(TABLE_KERNEL, table_f32)
KERNELS(TABLE_KERNEL, e4m3)
KERNELS(TABLE_KERNEL, e8m0)
KERNELS(VALUES_KERNEL, streamed)
KERNELS(VALUES_KERNEL, cached)

#undef KERNELS
#undef CODES_KERNEL
#undef TABLE_KERNEL
#undef VALUES_KERNEL
#undef AHEAD
#undef DOT
#undef START
#undef FINISH
#undef STRIP
#undef INPUTS
#undef INPUTS_BUT_LINES
#undef CLOBBERED

template <int kBlocks>
constexpr std::int64_t kTileRows = kBlocks == 4 ? 4 : 8;  // 16 accumulators

// rows: 1 to kTileRows<kBlocks>.
template <int kBlocks, Lines kLines>
void multiply_rows(std::int64_t rows, const KernelArguments &k) {
  switch (rows) {
  case 1: return multiply_tile<kBlocks, 1, kLines>(k);
  case 2: return multiply_tile<kBlocks, 2, kLines>(k);
  case 3: return multiply_tile<kBlocks, 3, kLines>(k);
  case 4: return multiply_tile<kBlocks, 4, kLines>(k);
  }
  if constexpr (kTileRows<kBlocks> == 8) switch (rows) {
    case 5: return multiply_tile<kBlocks, 5, kLines>(k);
    case 6: return multiply_tile<kBlocks, 6, kLines>(k);
    case 7: return multiply_tile<kBlocks, 7, kLines>(k);
    default: return multiply_tile<kBlocks, 8, kLines>(k);
    }
}

} // namespace
} // namespace pymllm::integer
