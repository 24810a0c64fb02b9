// The next token of each row of logits, and log-probabilities, in float32 with sums in double.
//
// What each setting does, and in which order: pymllm/kernels/sampling.py. A row's result depends on nothing beside it.
#pragma once

#include <cstdint>

#include "isa.h"

namespace pymllm {

constexpr std::int64_t kPiece = 64; // values of a row whose maximum and sum are kept, so that whole pieces are skipped

// A row's settings, in the order of SETTINGS in pymllm/kernels/sampling.py.
struct RowSettings {
  double temperature, top_k, top_p, min_p, typical_p, repetition, frequency, presence, number;
};

// Rows are `stride` elements apart. Row r adds bias_values to bias_tokens in [bias_starts[r], bias_starts[r + 1]); what
// its text has stands in seen_tokens, likewise, each token once, with how often the answer has it. Tokens are below
// `vocabulary`.
struct SamplingBatch {
  const float *logits;
  std::int64_t rows, vocabulary, stride;
  const RowSettings *settings;
  const std::int64_t *bias_starts, *bias_tokens;
  const float *bias_values;
  const std::int64_t *seen_starts, *seen_tokens;
  const float *seen_counts;
};

// tokens[r]: the token of row r; -1 where the logits are not numbers or none is left. chances[r], unless null: its
// probability among the tokens that it was chosen from, NaN where there is none.
void choose_tokens(const SamplingBatch &batch, std::int64_t *tokens, double *chances, Isa isa, int threads);

// Of each row: the log-probability of its token, and the `count` likeliest tokens, best first, the lower token of equal
// ones first. A row with NaN or infinity, or of minus infinities alone, gets NaN. count is at most `vocabulary`.
void log_probabilities(const float *logits, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride,
                       const std::int64_t *tokens, std::int64_t count, float *chosen, std::int64_t *best,
                       float *values, Isa isa, int threads);

// The passes over a row, in a file for each instruction set. A weight is exp((value - most) * scale), and 0 below
// kLeastExponent.
constexpr float kLeastExponent = -87.0f;
struct SamplingPath {
  // The largest value of each piece; `copy`, unless null, gets the values. Returns whether any is NaN.
  bool (*maxima)(const float *values, std::int64_t size, float *maxima, float *copy);
  // The sum of the weights of each piece.
  void (*sums)(const float *values, std::int64_t size, float most, float scale, float *sums);
  void (*weigh)(const float *values, std::int64_t size, float most, float scale, float *weights);
};

const SamplingPath &sampling_portable();
#if defined(__x86_64__) || defined(_M_X64)
const SamplingPath &sampling_avx2();
const SamplingPath &sampling_avx512();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
const SamplingPath &sampling_neon();
#endif

} // namespace pymllm
