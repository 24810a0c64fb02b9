// Group-wise int4 linear on the CPU: y = x Wᵀ + bias, W = (code - zero) * scale. Plain C++17: no Python, no torch.
//
// T tokens, O out_features, I in_features, G group of a block (32, 64 or 128), R rows: tokens times slices
//
// Packed weights: [ceil(O/16)][I/G] blocks of 16 outputs by G inputs, each
//   16 f16 scales | 16 u8 zeros | 16 unused bytes | G/8 lines of 64 bytes.
// Byte 4*r + t of line j holds, of output r, input 4*j + t in the low nibble and input G/2 + 4*j + t in the high one:
// a line is two operands of an instruction that adds four u8 x s8 products into each of 16 int32. Everything a group
// needs is in one stream. Outputs past O have scale 0. Larger groups (256, a whole row) repeat their scale and zero.
//
// Activations become int8 codes with a scale for every token and group; the zero points are a correction,
// -zero * (sum of codes). In exact mode a token is 2 or 3 such rows, "slices", each holding what the one before has
// rounded away, and the finish adds them up: same weights, same kernels, float32 accuracy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace pymllm::int4 {

constexpr std::int64_t kBlockRows = 16;
constexpr std::int64_t kHeaderBytes = 64;
constexpr std::int64_t kZerosOffset = 32;

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

struct Weights {
  const std::uint8_t *blocks;
  std::int64_t out_features, in_features;
  std::int64_t group;

  std::int64_t groups() const { return in_features / group; }
  std::int64_t row_blocks() const { return (out_features + kBlockRows - 1) / kBlockRows; }
  std::int64_t block_bytes() const { return kHeaderBytes + group * kBlockRows / 2; }
  const std::uint8_t *block(std::int64_t row_block, std::int64_t g) const {
    return blocks + (row_block * groups() + g) * block_bytes();
  }
};

// x: [tokens, I] contiguous. y: [tokens, O] contiguous, bias: [O] or null; all of `dtype`.
struct Floats {
  Dtype dtype;
  std::int64_t tokens;
  const void *x;
  const void *bias;
  void *y;
};

// A group whose largest |x| is below 2^-100 counts as zero; a token with an infinity or NaN gives NaN outputs.
struct Activations {
  std::int64_t rows;
  int slices;
  std::int8_t *codes;           // [I/G][R][G]
  float *scales;                // [I/G][R]
  std::int32_t *negative_sums;  // [I/G][R]: minus the sum of the codes
};

// What one instruction set provides. No function allocates or throws.
struct Kernels {
  // Groups [first, last) of all tokens.
  void (*quantise)(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
                   std::int64_t last);
  // Row blocks [first, last) of y. scratch: scratch_bytes(...) bytes, 64-byte aligned, one per thread.
  void (*multiply)(const Weights &weights, const Activations &x, const Floats &floats, std::int64_t first,
                   std::int64_t last, void *scratch);
  std::size_t (*scratch_bytes)(const Weights &weights, std::int64_t rows, std::int64_t row_blocks);
};

extern const Kernels kPortable;
extern const Kernels kAvx2;
extern const Kernels kAvx2Vnni;
extern const Kernels kAvx512Vnni;

// slices: 1 (int8 activations), 2 (relative error 2e-5) or 3 (1e-7). Results do not depend on `threads`.
void linear(const Weights &weights, const Floats &floats, int slices, int threads, Isa isa);

// group: of the scales and zeros, a multiple of weights.group. codes: [O, I] u8 0..15; scales: [O, I/group] f16 bits;
// zeros: [O, I/group] u8 or null (8 everywhere). `blocks` may be fresh pages: asks for huge ones before touching them.
void pack(const Weights &shape, std::int64_t group, const std::uint8_t *codes, const std::uint16_t *scales,
          const std::uint8_t *zeros, std::uint8_t *blocks, int threads);
void unpack(const Weights &weights, std::int64_t group, std::uint8_t *codes, std::uint16_t *scales,
            std::uint8_t *zeros, int threads);

} // namespace pymllm::int4
