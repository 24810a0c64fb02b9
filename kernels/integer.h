// Linear layers over integer weights in groups on the CPU: y = x Wᵀ + bias. Plain C++17: no Python, no torch.
//
//   W = (value - zero) * scale, or value * scale + offset,  value = code, or what a table says of a 4-bit code
//
// T tokens, O out_features, I in_features, G group of a block (16, 32, 64 or 128), R rows: tokens times slices
//
// Packed weights: [ceil(O/16)][I/G] blocks of 16 outputs by G inputs, each
//   16 scales, as the checkpoint has them | 16 u8 zeros, or 16 f32 offsets, or nothing | lines of 64 bytes.
// Byte 4*r + t of line j holds, of output r, input 4*j + t: a line is one operand of an instruction that adds four
// u8 x s8 products into each of 16 int32. With 4-bit codes it is two: its low nibbles are as said, its high ones input
// G/2 + 4*j + t. Everything a group needs is in one stream. Larger groups (256, a whole row) repeat their scale and zero.
//
// Activations become int8 codes with a scale for every token and group; the zero points are a correction,
// -zero * (sum of codes). In exact mode a token is 2 or 3 such rows, "slices", each holding what the one before has
// rounded away, and the finish adds them up: same weights, same kernels, float32 accuracy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_linear.h"
#include "isa.h"

namespace pymllm::integer {

constexpr std::int64_t kBlockRows = 16;
constexpr std::int64_t kMaxGroup = 128;

enum class Codes : int { nibbles = 0, bytes = 1 };
enum class Scales : int { f16 = 0, bf16 = 1, f32 = 2, e4m3 = 3, e8m0 = 4 };
enum class Zeros : int { same = 0, each = 1, offsets = 2 };  // same: `zero` everywhere, nothing is stored

struct Format {
  Codes codes;
  Scales scales;
  Zeros zeros;
  std::int32_t zero;          // for Zeros::same
  const std::uint8_t *table;  // 16 values of 4-bit codes; null: the codes are the values
  bool large_values;          // some may exceed 127

  // 4-bit codes with 16-bit scales and zeros: unpacked in registers by the AVX-512 path, which wants lines at 64.
  bool fused() const {
    return codes == Codes::nibbles && table == nullptr && zeros == Zeros::each &&
           (scales == Scales::f16 || scales == Scales::bf16);
  }
  std::int64_t scale_bytes() const { return scales == Scales::f32 ? 4 : scales >= Scales::e4m3 ? 1 : 2; }
  std::int64_t zeros_offset() const { return scale_bytes() * kBlockRows; }
  std::int64_t header_bytes() const {
    const std::int64_t zero_bytes = zeros == Zeros::offsets ? 4 : zeros == Zeros::each ? 1 : 0;
    const std::int64_t bytes = zeros_offset() + zero_bytes * kBlockRows;
    return codes == Codes::bytes || fused() ? (bytes + 63) / 64 * 64 : bytes;
  }
};

struct Weights {
  const std::uint8_t *blocks;
  std::int64_t out_features, in_features;
  std::int64_t group;
  Format format;
  const float *row_factors;  // [O], by which outputs are multiplied before the bias; or null

  std::int64_t groups() const { return in_features / group; }
  std::int64_t row_blocks() const { return (out_features + kBlockRows - 1) / kBlockRows; }
  std::int64_t line_inputs() const { return format.codes == Codes::nibbles ? 8 : 4; }
  std::int64_t block_bytes() const { return format.header_bytes() + group / line_inputs() * 64; }
  const std::uint8_t *block(std::int64_t row_block, std::int64_t g) const {
    return blocks + (row_block * groups() + g) * block_bytes();
  }
};

// x: [tokens, I] contiguous. y: [tokens, O] contiguous, bias: [O] or null; all of `dtype`.
struct Floats {
  FloatType dtype;
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

// What a checkpoint demands of activations: int8 codes with a scale for each token, for all of x, for each group of
// inputs, or as stored. Rounded as compressed-tensors does it, every step in x's dtype.
enum class Demand : int { none = 0, token = 1, tensor = 2, group = 3, stored = 4 };

struct Quantisation {
  int slices;  // of Demand::none: 1 (int8 activations), 2 (relative error 2e-5) or 3 (1e-7)
  Demand demand = Demand::none;
  std::int64_t group = 0;  // for Demand::group
  float scale = 0;         // for Demand::stored and ::tensor, in x's dtype already
};

// What one instruction set provides. No function allocates or throws.
struct Kernels {
  // Groups [first, last) of all tokens.
  void (*quantise)(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
                   std::int64_t last);
  // Tokens [first, last), as a checkpoint demands it; and the scale for Demand::tensor.
  void (*quantise_as_demanded)(const Floats &floats, const Weights &weights, const Quantisation &quantisation,
                               const Activations &out, std::int64_t first, std::int64_t last);
  float (*demanded_tensor_scale)(const Floats &floats, const Weights &weights);
  // Row blocks [first, last) of y. scratch: scratch_bytes(...) bytes, 64-byte aligned, one per thread.
  void (*multiply)(const Weights &weights, const Activations &x, const Floats &floats, std::int64_t first,
                   std::int64_t last, void *scratch);
  std::size_t (*scratch_bytes)(const Weights &weights, std::int64_t rows, std::int64_t row_blocks);
};

extern const Kernels kPortable;
extern const Kernels kNeonDotprod;
extern const Kernels kAvx2;
extern const Kernels kAvx2Vnni;
extern const Kernels kAvx512Vnni;

const Kernels &kernels_of(Isa isa);

constexpr std::int64_t kRowsAtATime = 192;  // 512 at once cost 4 %: their sums and codes leave the L2 cache
constexpr std::int64_t kStepBlocks = 4;     // row blocks that a kernel advances together: threads take whole steps

// Activations of `rows` rows for `weights` take so many bytes, and lie in memory so.
std::size_t activation_bytes(const Weights &weights, std::int64_t rows);
Activations activations_in(std::uint8_t *memory, const Weights &weights, std::int64_t rows, int slices);

// Results do not depend on `threads`.
void linear(const Weights &weights, const Floats &floats, const Quantisation &quantisation, int threads, Isa isa);

// What a checkpoint stores, row by row. group: of the scales and zeros, a multiple of the blocks'.
struct Stored {
  std::uint8_t *codes;   // [O, inputs] u8; inputs that fill up the last block have none
  std::uint8_t *scales;  // [O, ceil(inputs/group)], in the format's type
  std::uint8_t *zeros;   // [O, ceil(inputs/group)] u8, or f32 offsets; null: `zero` everywhere
  std::int64_t inputs, group;
};

// Codes of filled-up inputs are irrelevant, as activations are 0 there.
void pack(const Weights &shape, const Stored &stored, std::uint8_t *blocks, int threads);
void unpack(const Weights &weights, const Stored &stored, int threads);

// Rows `ids` of the weight itself, [count, inputs] in `dtype`: each operation of `W` above in float32, rounded once.
void gather(const Weights &weights, std::int64_t inputs, const std::int64_t *ids, std::int64_t count, FloatType dtype,
            void *rows, int threads);

} // namespace pymllm::integer
