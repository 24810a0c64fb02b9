// The experts of a layer over integer weights: routed tokens in, their weighted sums out.
//
// T tokens, K experts a token, S slots (a token and one of its experts), E experts, H hidden size, I intermediate size
#pragma once

#include "elementwise.h"
#include "integer.h"

namespace pymllm::integer {

// One product of all experts: weights, factors and biases stacked. first: of expert 0.
struct Product {
  Weights first;
  const void *bias;  // [E, O] in `bias_dtype`, or null
  FloatType bias_dtype;

  Weights of(std::int64_t expert) const {
    Weights weights = first;
    weights.blocks += expert * first.row_blocks() * first.groups() * first.block_bytes();
    if (first.row_factors != nullptr) weights.row_factors += expert * first.out_features;
    return weights;
  }
};

struct Experts {
  Product gate_up;  // [2 I, H], the gate's first
  Product down;     // [H, I]
  std::int64_t count;
  Gate gate;
};

struct Routing {
  const std::int64_t *ids;  // [T, K]; below 0: none
  const float *weights;     // [T, K]
  std::int64_t tokens, top_k;
};

// Experts with up to `exact_tokens` rows multiply them in `exact_slices` slices, the others in one.
struct Exactness {
  std::int64_t exact_tokens;
  int exact_slices;
};

// x, y: [T, H] in `dtype`. What stands between the products, and the sums over a token's experts, is float32.
void experts(const Experts &experts, const Routing &routing, FloatType dtype, const void *x, void *y,
             const Exactness &exactness, int threads, Isa isa);

} // namespace pymllm::integer
