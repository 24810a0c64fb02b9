// The integer linear without any instruction set: what every other path is checked against.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "integer.h"
#include "integer_block.h"
#include "integer_demand.h"
#include "integer_scale.h"

namespace pymllm::integer {
namespace {

void quantise(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
              std::int64_t last) {
  const std::int64_t group = weights.group;
  for (std::int64_t g = first; g < last; ++g) {
    for (std::int64_t token = 0; token < floats.tokens; ++token) {
      float values[kMaxGroup];
      std::uint32_t magnitude = 0;
      for (std::int64_t k = 0; k < group; ++k) {
        values[k] = load_float(floats.dtype, floats.x, token * weights.in_features + g * group + k);
        magnitude = std::max(magnitude, bits_of(values[k]) & 0x7fffffffu);
      }
      GroupScale scale = group_scale(magnitude, out.slices);
      for (std::int64_t k = 0; k < group; ++k) values[k] = scale.inverse == 0 ? 0.0f : values[k] * scale.inverse;
      for (int slice = 0; slice < out.slices; ++slice) {
        const std::int64_t row = g * out.rows + token * out.slices + slice;
        std::int8_t *codes = out.codes + row * group;
        std::int32_t sum = 0;
        for (std::int64_t k = 0; k < group; ++k) {
          const float code = std::nearbyint(values[k]);
          codes[k] = static_cast<std::int8_t>(code);
          sum += codes[k];
          values[k] = (values[k] - code) * kSliceRatio;
        }
        out.scales[row] = scale.scale;
        out.negative_sums[row] = -sum;
        scale.scale *= 1.0f / kSliceRatio;
      }
    }
  }
}

std::size_t scratch_bytes(const Weights &, std::int64_t rows, std::int64_t) {
  return static_cast<std::size_t>(rows * kBlockRows) * sizeof(float);
}

void multiply(const Weights &weights, const Activations &x, const Floats &floats, std::int64_t first,
              std::int64_t last, void *scratch) {
  const std::int64_t group = weights.group;
  const Format &format = weights.format;
  float *sums = static_cast<float *>(scratch);  // [R][16]
  for (std::int64_t n = first; n < last; ++n) {
    std::fill(sums, sums + x.rows * kBlockRows, 0.0f);
    for (std::int64_t g = 0; g < weights.groups(); ++g) {
      const std::uint8_t *block = weights.block(n, g);
      std::uint8_t values[kMaxGroup][kBlockRows];
      std::int32_t zeros[kBlockRows];
      float scales[kBlockRows], offsets[kBlockRows];
      for (std::int64_t r = 0; r < kBlockRows; ++r) {
        scales[r] = read_scale(format.scales, block, r);
        zeros[r] = read_zero(format, block, r);
        offsets[r] = read_offset(format, block, r);
        for (std::int64_t k = 0; k < group; ++k)
          values[k][r] = value_of(format, read_code(format, group, block, r, k));
      }
      for (std::int64_t row = 0; row < x.rows; ++row) {
        const std::int64_t at = g * x.rows + row;
        std::int32_t dots[kBlockRows];
        for (std::int64_t r = 0; r < kBlockRows; ++r) dots[r] = zeros[r] * x.negative_sums[at];
        for (std::int64_t k = 0; k < group; ++k)
          for (std::int64_t r = 0; r < kBlockRows; ++r) dots[r] += x.codes[at * group + k] * values[k][r];
        for (std::int64_t r = 0; r < kBlockRows; ++r)
          sums[row * kBlockRows + r] += static_cast<float>(dots[r]) * scales[r] * x.scales[at];
        if (format.zeros == Zeros::offsets) {
          const float sum = static_cast<float>(-x.negative_sums[at]) * x.scales[at];
          for (std::int64_t r = 0; r < kBlockRows; ++r) sums[row * kBlockRows + r] += offsets[r] * sum;
        }
      }
    }
    const std::int64_t outputs = std::min(kBlockRows, weights.out_features - n * kBlockRows);
    for (std::int64_t token = 0; token < floats.tokens; ++token)
      for (std::int64_t r = 0; r < outputs; ++r) {
        float sum = 0.0f;
        for (int slice = x.slices; slice-- > 0;) sum += sums[(token * x.slices + slice) * kBlockRows + r];
        const std::int64_t output = n * kBlockRows + r;
        if (weights.row_factors != nullptr) sum *= weights.row_factors[output];
        if (floats.bias != nullptr) sum += load_float(floats.dtype, floats.bias, output);
        store_float(floats.dtype, floats.y, token * weights.out_features + output, sum);
      }
  }
}

} // namespace

const Kernels kPortable{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};

} // namespace pymllm::integer
