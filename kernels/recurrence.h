// What layers with a state a request compute over a step: the gated delta rule, the scan of Mamba 2 and a causal
// convolution. pymllm/kernels/recurrence.py says what each is.
//
// The tokens of a request are taken one after the other, in float32, and each head (or block of channels) of a request
// on its own: a result depends neither on the number of threads, nor on the requests beside it, nor on how a prompt was
// cut into steps. The files are compiled without contraction of products and sums, so that the same holds for what the
// compiler makes of a loop twice.
#pragma once

#include <cstdint>

#include "float_linear.h"

namespace pymllm {

// A tensor of any float type with a row a token.
struct TokenRows {
  const void *data = nullptr;
  FloatType type = FloatType::f32;
  std::int64_t stride = 0; // elements between tokens
};

struct Requests {
  const std::int32_t *starts = nullptr;  // [count + 1], of new tokens
  const std::int32_t *lengths = nullptr; // [count], new tokens included
  const std::int64_t *slots = nullptr;   // [count]; null, or below 0: nothing is kept
  std::int64_t count = 0;
};

struct GatedDelta {
  TokenRows q, k, v, g, beta; // [T, Hk, Dk] twice, [T, Hv, Dv], [T, Hv] twice; q, k and v of y's type
  bool channel_decay = false; // g is [T, Hv, Dk]
  void *y = nullptr;          // [T, Hv, Dv], contiguous
  float *state = nullptr;     // [S, Hv, Dk, Dv]
  Requests requests;
  std::int64_t key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0;
  float normalise_eps = -1.0f; // below 0: q and k come as they are
};

struct Mamba2Scan {
  TokenRows x, dt, b, c;    // [T, H, P], [T, H], [T, G, N] twice; x, b and c of y's type
  TokenRows a, d, dt_bias;  // [H]; no strides
  void *y = nullptr;        // [T, H, P], contiguous
  float *state = nullptr;   // [S, H, P, N]
  Requests requests;
  std::int64_t heads = 0, groups = 0, head_dim = 0, state_size = 0;
  double least_dt = 0.0, most_dt = 0.0;
};

struct CausalConv {
  TokenRows x, weight, bias; // [T, C], [C, K] and [C] without strides; bias.data may be null
  void *y = nullptr;         // [T, C], contiguous, of x's type
  float *state = nullptr;    // [S, C, K - 1]
  Requests requests;
  std::int64_t channels = 0, kernel = 0;
  bool silu = false;
};

void gated_delta(const GatedDelta &problem, Isa isa, int threads);
void mamba2_scan(const Mamba2Scan &problem, Isa isa, int threads);
void causal_conv(const CausalConv &problem, Isa isa, int threads);

// New tokens [begin, end) of one request, and its state: null, where it begins with zeros and nothing is kept; of a
// fresh request what it holds does not count.
struct Span {
  std::int64_t begin, end;
  float *state;
  bool fresh;
};

constexpr std::int64_t kWindow = 32;           // tokens that are made float32 at a time
constexpr std::int64_t kChannels = 256;        // of a convolution, at a time

// A piece of each, in a file for each instruction set. Numbers a token of the span come as float32.
struct RecurrencePath {
  void (*gated_delta)(const GatedDelta &problem, std::int64_t head, const Span &span, const float *decay,
                      const float *beta, float *scratch); // decay: not of channels
  void (*mamba2_scan)(const Mamba2Scan &problem, std::int64_t head, const Span &span, const float *decay,
                      const float *dt, float *scratch);
  void (*causal_conv)(const CausalConv &problem, std::int64_t first_channel, const Span &span, float *scratch);
  std::int64_t columns; // of a gated delta's state that are taken together
};

std::int64_t gated_delta_scratch(const GatedDelta &problem, std::int64_t columns); // floats, of a thread
std::int64_t mamba2_scan_scratch(const Mamba2Scan &problem);
std::int64_t causal_conv_scratch(const CausalConv &problem);

const RecurrencePath &recurrence_portable();
#if defined(__x86_64__) || defined(_M_X64)
const RecurrencePath &recurrence_avx2();
const RecurrencePath &recurrence_avx512();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
const RecurrencePath &recurrence_neon();
#endif

} // namespace pymllm
