// y = x Wᵀ + bias over weights kept as bf16, f16, fp8 e4m3 or 4-bit codes of a codebook, with float32 arithmetic.
//
// Rows of W stay as the checkpoint has them, [O, I] and row-major. A row's sum is taken lane by lane over ascending
// inputs and folded once at the end, in the same order in every regime: a token's result depends neither on the number
// of threads, nor on the tokens beside it.
//
// Three regimes, told apart by the tokens M and the tokens a register tile holds, T (float_linear_kernel.h):
//   M <= T   four streams of rows; weights become float32 in registers and meet every token there
//   M <= 32  a block of rows becomes float32 in L2 chunk by chunk; register tiles of 4 rows x T tokens; the tiles
//            prefetch the next chunk
//   above    the same in panels of at most kPanel tokens
#pragma once

#include <cstdint>

#include "isa.h"

namespace pymllm {

enum class FloatType { f32 = 0, bf16 = 1, f16 = 2 };
enum class WeightType { bf16 = 0, f16 = 1, e4m3 = 2, codebook = 3 };

struct FloatLinear {
  const void *x;  // [M, I], contiguous
  FloatType type; // of x, bias and y
  const void *weight; // [O, I], contiguous; codes of a codebook two a byte, the even input in the low nibble, I even
  WeightType weight_type;
  // e4m3 and codebook only. scales: [ceil(O / block_out), ceil(I / block_in)]; a block side of 0 is the whole axis, and block_in is
  // otherwise a multiple of 64; of e4m3 it may be 32.
  const float *scales = nullptr;
  std::int64_t block_out = 0, block_in = 0;
  // e4m3 only, [O]: 0, or NaN for a row that holds a NaN code (its every product is NaN). The kernels read the NaN
  // codes as 480.
  const float *row_nan = nullptr;
  const float *table = nullptr; // codebook only: 16 values
  const void *bias = nullptr; // [O]
  void *y = nullptr;          // [M, O]
  std::int64_t tokens = 0, out_features = 0, in_features = 0;
};

void float_linear(const FloatLinear &problem, Isa isa, int threads);

// What one instruction set brings; each in a file of its own (float_linear_avx512.cpp, ...).
constexpr std::int64_t kPanel = 96;                  // tokens whose sums are held at a time
constexpr std::int64_t kRowBlock = 32, kChunk = 1024; // rows and inputs made float32 at a time
constexpr std::int64_t kFewTokens = 32, kFewRows = 8, kFewChunk = 512; // the same for fewer tokens

struct FloatLinearPath {
  // x as float32, zero-padded to `stride`, in the order in which the path's lanes meet the weights.
  void (*prepare)(const FloatLinear &problem, std::int64_t first_token, std::int64_t tokens, float *prepared,
                  std::int64_t stride);
  // Rows [begin, end) for a panel of tokens.
  void (*rows)(const FloatLinear &problem, const float *prepared, std::int64_t stride, std::int64_t first_token,
               std::int64_t tokens, std::int64_t begin, std::int64_t end, float *scratch);
  std::int64_t direct_tokens;  // T: up to so many tokens need no scratch
  std::int64_t scratch_floats; // of a thread, above that
};

const FloatLinearPath &float_linear_portable();
#if defined(__x86_64__) || defined(_M_X64)
const FloatLinearPath &float_linear_avx2();
const FloatLinearPath &float_linear_avx512();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
const FloatLinearPath &float_linear_neon();
#endif

} // namespace pymllm
