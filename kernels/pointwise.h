// Sums, products and copies of tensors with any strides, as torch computes them, for steps that are played from a tape.
//
// Each result is computed in float32 and rounded once to the tensors' type, which is what torch gives, bit for bit. The
// tensors of a decoding step are small: what torch takes for each of these operations is the way to it.
#pragma once

#include <array>
#include <cstdint>

#include "float_linear.h"

namespace pymllm {

enum class Pointwise { copy = 0, negate = 1, add = 2, subtract = 3, multiply = 4 };
using Sides = std::array<std::int64_t, 4>;

// Strides in elements; 0 repeats a tensor along a dimension. copy and negate read no y.
struct PointwiseProblem {
  Pointwise operation;
  const void *x, *y;
  void *out;
  FloatType type;
  Sides sizes, x_strides, y_strides, out_strides;
};

void pointwise(const PointwiseProblem &problem, int threads);

} // namespace pymllm
