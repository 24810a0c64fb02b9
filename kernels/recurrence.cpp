#include "recurrence.h"

#include <algorithm>
#include <cmath>

#include "float_scalar.h"
#include "scratch.h"
#include "vector_portable.h"

namespace pymllm {
namespace {

inline float square_root(float v) { return std::sqrt(v); }

#include "recurrence_kernel.h"

const RecurrencePath &path_of(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == Isa::avx512_vnni) return recurrence_avx512();
  if (isa == Isa::avx2 || isa == Isa::avx2_vnni) return recurrence_avx2();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
  if (isa == Isa::neon_dotprod) return recurrence_neon();
#endif
  (void)isa;
  return recurrence_portable();
}

std::int64_t longest(const Requests &requests) {
  std::int64_t most = 0;
  for (std::int64_t i = 0; i < requests.count; ++i)
    most = std::max<std::int64_t>(most, requests.starts[i + 1] - requests.starts[i]);
  return most;
}

// body(item, span, scratch) for each of `items` items of each request that has new tokens. state_floats: of one slot;
// item_floats: of an item. work: bytes, or 16 multiply-adds for a byte, of a token of an item.
template <class Body>
void run_items(const Requests &requests, float *state, std::int64_t state_floats, std::int64_t items,
               std::int64_t item_floats, std::int64_t work, std::int64_t scratch_floats, int threads, const Body &body) {
  if (requests.count == 0) return;
  const std::int64_t tokens = requests.starts[requests.count];
  const std::int64_t bytes = items * (requests.count * item_floats * 8 + tokens * work);
  run_with_scratch(requests.count * items, scratch_floats, worthwhile_threads(bytes, threads),
                   [&](std::int64_t i, float *scratch) {
                     const std::int64_t request = i / items, item = i % items;
                     Span span{requests.starts[request], requests.starts[request + 1], nullptr, false};
                     if (span.begin == span.end) return;
                     span.fresh = requests.lengths[request] == span.end - span.begin;
                     if (state != nullptr && requests.slots != nullptr && requests.slots[request] >= 0)
                       span.state = state + requests.slots[request] * state_floats + item * item_floats;
                     body(item, span, scratch);
                   });
}

// In float64: a decay near 1 is taken to a high power by a long prompt, and so is its error.
inline double softplus(double v) { return v > 40.0 ? v : std::log1p(std::exp(v)); }

} // namespace

const RecurrencePath &recurrence_portable() { return kRecurrence; }

std::int64_t gated_delta_scratch(const GatedDelta &problem, std::int64_t columns) {
  const std::int64_t size = round_up(problem.key_dim, 16), width = round_up(problem.value_dim, columns);
  return kWindow * (4 * size + 2 * width + 1) + problem.key_dim * width;
}

std::int64_t mamba2_scan_scratch(const Mamba2Scan &problem) {
  const std::int64_t size = round_up(problem.state_size, 16), width = round_up(problem.head_dim, kRows);
  return kWindow * (2 * size + 3 * width) + width * size;
}

std::int64_t causal_conv_scratch(const CausalConv &problem) {
  return kChannels * (3 * problem.kernel + kWindow + 1);
}

void gated_delta(const GatedDelta &problem, Isa isa, int threads) {
  const RecurrencePath &path = path_of(isa);
  const std::int64_t most = round_up(longest(problem.requests), 16);
  const std::int64_t head_floats = problem.key_dim * problem.value_dim;
  run_items(problem.requests, problem.state, problem.value_heads * head_floats, problem.value_heads, head_floats,
            head_floats / 4, 2 * most + gated_delta_scratch(problem, path.columns), threads,
            [&](std::int64_t head, const Span &span, float *scratch) {
              float *decay = scratch, *beta = scratch + most;
              for (std::int64_t token = span.begin; token < span.end; ++token) {
                if (!problem.channel_decay) {
                  const double g = read_float(problem.g.data, problem.g.type, token * problem.g.stride + head);
                  decay[token - span.begin] = static_cast<float>(std::exp(g));
                }
                beta[token - span.begin] =
                    read_float(problem.beta.data, problem.beta.type, token * problem.beta.stride + head);
              }
              path.gated_delta(problem, head, span, decay, beta, scratch + 2 * most);
            });
}

void mamba2_scan(const Mamba2Scan &problem, Isa isa, int threads) {
  const RecurrencePath &path = path_of(isa);
  const std::int64_t most = round_up(longest(problem.requests), 16);
  const std::int64_t head_floats = problem.head_dim * problem.state_size;
  run_items(problem.requests, problem.state, problem.heads * head_floats, problem.heads, head_floats, head_floats / 4,
            2 * most + mamba2_scan_scratch(problem), threads,
            [&](std::int64_t head, const Span &span, float *scratch) {
              float *decay = scratch, *dt = scratch + most;
              const double bias = read_float(problem.dt_bias.data, problem.dt_bias.type, head);
              const double a = read_float(problem.a.data, problem.a.type, head);
              for (std::int64_t token = span.begin; token < span.end; ++token) {
                double step = softplus(read_float(problem.dt.data, problem.dt.type, token * problem.dt.stride + head) + bias);
                step = step < problem.least_dt ? problem.least_dt : step > problem.most_dt ? problem.most_dt : step;
                decay[token - span.begin] = static_cast<float>(std::exp(step * a));
                dt[token - span.begin] = static_cast<float>(step);
              }
              path.mamba2_scan(problem, head, span, decay, dt, scratch + 2 * most);
            });
}

void causal_conv(const CausalConv &problem, Isa isa, int threads) {
  const RecurrencePath &path = path_of(isa);
  const std::int64_t past = problem.kernel - 1, blocks = (problem.channels + kChannels - 1) / kChannels;
  const std::int64_t bytes_a_token = kChannels * (2 * bytes_of(problem.x.type) + problem.kernel);
  // The state of a block of channels begins where that of its first channel does.
  run_items(problem.requests, problem.state, problem.channels * past, blocks, 0, bytes_a_token,
            causal_conv_scratch(problem), threads, [&](std::int64_t block, const Span &span, float *scratch) {
              path.causal_conv(problem, block * kChannels, span, scratch);
            });
}

} // namespace pymllm
