// The Python face of sampling. Tensors come checked by pymllm/kernels/native/sampling.py; what they hold is checked here.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "isa.h"
#include "released.h"
#include "sampling.h"

namespace nb = nanobind;

namespace pymllm {
namespace {

template <class T> T *at(std::uintptr_t address) { return reinterpret_cast<T *>(address); }

void check_tokens(const std::int64_t *tokens, std::int64_t count, std::int64_t vocabulary) {
  check_address("the tokens", tokens, count > 0);
  check_indices("a token lies outside the vocabulary", tokens, count, 0, vocabulary);
}

// Where each row begins must rise from 0 to the number of tokens.
void check_rows(const std::int64_t *starts, std::int64_t rows, const std::int64_t *tokens, std::int64_t count,
                std::int64_t vocabulary) {
  check_address("where rows begin", starts);
  if (starts[0] != 0 || starts[rows] != count || !std::is_sorted(starts, starts + rows + 1))
    throw Refusal("the starts of rows do not rise from 0 to the number of tokens", "0 to " + std::to_string(count),
                  std::to_string(starts[0]) + " to " + std::to_string(starts[rows]), true);
  check_tokens(tokens, count, vocabulary);
}

void check_logits(const float *logits, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride) {
  check_side("the number of rows", rows);
  check_side("the vocabulary", vocabulary, 1);
  check_side("the stride of rows", stride);
  check_address("the logits", logits, rows > 0);
}

void sample_tokens(std::uintptr_t logits, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride,
                   std::uintptr_t settings, std::int64_t biases, std::uintptr_t bias_starts,
                   std::uintptr_t bias_tokens, std::uintptr_t bias_values, std::int64_t seen,
                   std::uintptr_t seen_starts, std::uintptr_t seen_tokens, std::uintptr_t seen_counts,
                   std::uintptr_t tokens, std::uintptr_t chances, int isa, int threads) {
  check_logits(at<const float>(logits), rows, vocabulary, stride);
  check_address("the settings", at<const double>(settings), rows > 0);
  SamplingBatch batch;
  batch.logits = at<const float>(logits);
  batch.rows = rows;
  batch.vocabulary = vocabulary;
  batch.stride = stride;
  batch.settings = at<const RowSettings>(settings);
  batch.bias_starts = at<const std::int64_t>(bias_starts);
  batch.bias_tokens = at<const std::int64_t>(bias_tokens);
  batch.bias_values = at<const float>(bias_values);
  batch.seen_starts = at<const std::int64_t>(seen_starts);
  batch.seen_tokens = at<const std::int64_t>(seen_tokens);
  batch.seen_counts = at<const float>(seen_counts);
  check_rows(batch.bias_starts, rows, batch.bias_tokens, biases, vocabulary);
  check_rows(batch.seen_starts, rows, batch.seen_tokens, seen, vocabulary);
  choose_tokens(batch, at<std::int64_t>(tokens), at<double>(chances), static_cast<Isa>(isa), threads);
}

void log_probabilities_(std::uintptr_t logits, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride,
                        std::uintptr_t tokens, std::int64_t count, std::uintptr_t chosen, std::uintptr_t best,
                        std::uintptr_t values, int isa, int threads) {
  check_logits(at<const float>(logits), rows, vocabulary, stride);
  check_number("the number of the likeliest tokens", count, 0, vocabulary);
  check_tokens(at<const std::int64_t>(tokens), rows, vocabulary);
  log_probabilities(at<const float>(logits), rows, vocabulary, stride, at<const std::int64_t>(tokens), count,
                    at<float>(chosen), at<std::int64_t>(best), at<float>(values), static_cast<Isa>(isa), threads);
}

} // namespace

void register_sampling(nb::module_ &m) {
  const auto released = nb::call_guard<Released>();
  m.def("sample_tokens", &sample_tokens, released, "See kernels/sampling.h.");
  m.def("log_probabilities", &log_probabilities_, released, "See kernels/sampling.h.");
}

} // namespace pymllm
