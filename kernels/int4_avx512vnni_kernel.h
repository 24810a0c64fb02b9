// One group of 2 or 4 row blocks times up to 8 rows of activations, in registers: the inner loop of the AVX-512 path.
//
// Written in asm because gcc 12 spills accumulators and weights although it has registers left: on a Zen 5 the same
// loop in C++ reaches 55 % of the VNNI peak from the L1 cache, this one 97 %. Registers:
//   0-15   accumulators: row m, block b is m * kBlocks + b
//   16-19  weights of the low nibbles, one register a block; 20-23 of the high ones
//   24     four activations of one row in every lane; its scale in the epilogue
//   25     0x0f in every byte
#pragma once

#include <cstdint>

#include "int4.h"

namespace pymllm::int4 {
namespace {

// What a kernel reads: codes [R][group], negative_sums [R], scales [R]; it adds to sums [R][kBlocks][16].
struct KernelArguments {
  const std::uint8_t *const *blocks;
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
#define UNPACK(b, low, high)                                        \
  "vmovdqu64 64(%[block" b "],%[at]),%%zmm" high "\n"               \
  "prefetcht0 " AHEAD "(%[block" b "],%[at])\n"                     \
  "vpandd %%zmm25,%%zmm" high ",%%zmm" low "\n"                     \
  "vpsrlw $4,%%zmm" high ",%%zmm" high "\n"                         \
  "vpandd %%zmm25,%%zmm" high ",%%zmm" high "\n"
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
#define LOAD_SCALES(b, low, high) \
  "vcvtph2ps (%[block" b "]),%%zmm" low "\n" \
  "prefetcht0 " AHEAD "(%[block" b "],%[at])\n"
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
#define STEP_NEAR "add $4,%[low]\nadd $4,%[high]\n"
#define STEP_FAR STEP_NEAR "add $4,%[low4]\nadd $4,%[high4]\n"
#define OUTPUTS_NEAR [at] "+r"(at), [low] "+r"(low), [high] "+r"(high)
#define OUTPUTS_FAR OUTPUTS_NEAR, [low4] "+r"(low4), [high4] "+r"(high4)
#define INPUTS2 [block0] "r"(k.blocks[0]), [block1] "r"(k.blocks[1])
#define INPUTS4 INPUTS2, [block2] "r"(k.blocks[2]), [block3] "r"(k.blocks[3])

#define KERNEL(BLOCKS, COUNT, REACH)                                                                                  \
  template <>                                                                                                         \
  void multiply_tile<BLOCKS, COUNT>(const KernelArguments &k) {                                                        \
    const std::int8_t *low = k.codes, *high = k.codes + k.group / 2;                                                  \
    [[maybe_unused]] const std::int8_t *low4 = low + 4 * k.group, *high4 = high + 4 * k.group;                        \
    const std::int64_t lines = k.group * 8, stride = k.group, stride3 = 3 * k.group;                                  \
    std::int64_t at = 0;                                                                                              \
    __asm__ volatile(EACH##BLOCKS(LOAD_ZEROS) ROWS##BLOCKS##_##COUNT(START_ROW##BLOCKS)                                \
                     "vpbroadcastd %[nibbles],%%zmm25\n"                                                              \
                     ".p2align 5\n"                                                                                   \
                     "1:\n" EACH##BLOCKS(UNPACK) ROWS##BLOCKS##_##COUNT(LOW_ROW##BLOCKS)                               \
                         ROWS##BLOCKS##_##COUNT(HIGH_ROW##BLOCKS) STEP_##REACH                                         \
                     "add $64,%[at]\n"                                                                                \
                     "cmp %[lines],%[at]\n"                                                                           \
                     "jne 1b\n" EACH##BLOCKS(LOAD_SCALES) ROWS##BLOCKS##_##COUNT(FINISH_ROW##BLOCKS)                   \
                     : OUTPUTS_##REACH                                                                                \
                     : INPUTS##BLOCKS, [nibbles] "m"(kNibbles), [lines] "r"(lines), [stride] "r"(stride),             \
                       [stride3] "r"(stride3), [negative_sums] "r"(k.negative_sums), [scales] "r"(k.scales),          \
                       [sums] "r"(k.sums)                                                                             \
                     : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",        \
                       "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",       \
                       "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25");                                \
  }

template <int kBlocks, int R>
void multiply_tile(const KernelArguments &k);

KERNEL(2, 1, NEAR)
KERNEL(2, 2, NEAR)
KERNEL(2, 3, NEAR)
KERNEL(2, 4, NEAR)
KERNEL(2, 5, FAR)
KERNEL(2, 6, FAR)
KERNEL(2, 7, FAR)
KERNEL(2, 8, FAR)
KERNEL(4, 1, NEAR)
KERNEL(4, 2, NEAR)
KERNEL(4, 3, NEAR)
KERNEL(4, 4, NEAR)

#undef KERNEL
#undef AHEAD
#undef DOT
#undef START
#undef FINISH
#undef STRIP

template <int kBlocks>
constexpr std::int64_t kTileRows = kBlocks == 4 ? 4 : 8;  // 16 accumulators

// rows: 1 to kTileRows<kBlocks>.
template <int kBlocks>
void multiply_rows(std::int64_t rows, const KernelArguments &k) {
  switch (rows) {
  case 1: return multiply_tile<kBlocks, 1>(k);
  case 2: return multiply_tile<kBlocks, 2>(k);
  case 3: return multiply_tile<kBlocks, 3>(k);
  case 4: return multiply_tile<kBlocks, 4>(k);
  }
  if constexpr (kTileRows<kBlocks> == 8) switch (rows) {
    case 5: return multiply_tile<kBlocks, 5>(k);
    case 6: return multiply_tile<kBlocks, 6>(k);
    case 7: return multiply_tile<kBlocks, 7>(k);
    default: return multiply_tile<kBlocks, 8>(k);
    }
}

} // namespace
} // namespace pymllm::int4
