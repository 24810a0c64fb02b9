// Small operations of a decoder layer, each one pass over memory with float32 arithmetic, for f32, bf16 and f16.
//
// Rounding follows the torch code that these stand in for (pymllm/layers/), step by step: where that code rounds to the
// tensor's type between two operations, so do these.
#pragma once

#include <cstdint>

#include "float_linear.h"

namespace pymllm {

// y = (x / sqrt(mean(x²) + epsilon)) * weight over rows of `size`. With a residual, x + residual stands for x, and goes
// to `sum` too. weight may be null. y may be x, and sum may be x or residual.
void rms_norm(const void *x, const void *residual, const void *weight, void *y, void *sum, FloatType type,
              std::int64_t rows, std::int64_t size, float epsilon, Isa isa, int threads);

// x: [rows, 2 size], gate first. y: [rows, size] = silu(gate) * up.
void silu_and_mul(const void *x, void *y, FloatType type, std::int64_t rows, std::int64_t size, Isa isa, int threads);

// What experts compute between their products, in float32. act: gate * sigmoid(gate), gelu's approximation by tanh, or
// swiglu, whose gate is cut off above `limit`, and its up beyond it on either side: gate * sigmoid(alpha gate) * (up + 1).
struct Gate {
  enum Kind { silu, gelu_tanh, swiglu } kind;
  float alpha, limit;
};
void gate_and_multiply(const float *x, float *y, const Gate &gate, std::int64_t rows, std::int64_t size, Isa isa,
                       int threads);

// Rotate the first rotary_size of each head, halves paired; the rest passes bit for bit. x: [tokens, heads, head_size],
// tokens token_stride elements apart. cos, sin: [tokens, rotary_size / 2]. y: the same shape, contiguous; y may be x
// where that is contiguous too.
void rotate(const void *x, void *y, const float *cos, const float *sin, FloatType type, std::int64_t tokens,
            std::int64_t heads, std::int64_t head_size, std::int64_t rotary_size, std::int64_t token_stride,
            Isa isa, int threads);

// y[i] = x[i] as float32.
void widen(const void *x, float *y, FloatType type, std::int64_t count, Isa isa, int threads);

// Rows `ids` of a table, row_bytes each, one after another; negative ids count from the end. Every row must be there.
void copy_rows(const void *table, std::int64_t rows, std::int64_t row_bytes, const std::int64_t *ids,
               std::int64_t count, void *y);

// A piece of each, in a file for each instruction set.
struct ElementwisePath {
  void (*rms_norm)(const void *x, const void *residual, const void *weight, void *y, void *sum, FloatType type,
                   std::int64_t begin, std::int64_t end, std::int64_t size, float epsilon);
  void (*silu_and_mul)(const void *x, void *y, FloatType type, std::int64_t begin, std::int64_t end, std::int64_t size);
  void (*gate_and_multiply)(const float *x, float *y, const Gate &gate, std::int64_t begin, std::int64_t end,
                            std::int64_t size);
  void (*rotate)(const void *x, void *y, const float *cos, const float *sin, FloatType type, std::int64_t begin,
                 std::int64_t end, std::int64_t heads, std::int64_t head_size, std::int64_t rotary_size,
                 std::int64_t token_stride);
  void (*widen)(const void *x, float *y, FloatType type, std::int64_t begin, std::int64_t end);
};

const ElementwisePath &elementwise_portable();
#if defined(__x86_64__) || defined(_M_X64)
const ElementwisePath &elementwise_avx2();
const ElementwisePath &elementwise_avx512();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
const ElementwisePath &elementwise_neon();
#endif

} // namespace pymllm
