// int8 activations as a checkpoint demands them, with the roundings of compressed-tensors: scale = largest / 127.5,
// code = clamp(round(x / scale)), where quotients are rounded to x's own dtype. Loops that any compiler vectorises.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "integer.h"
#include "integer_block.h"

namespace pymllm::integer {
namespace {

constexpr std::int64_t kChunk = 512;

// Without a branch, so that loops over it become vectors; NaN does not come here.
float as_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

float rounded(float value, Dtype dtype) {
  if (dtype == Dtype::f32) return value;
  return dtype == Dtype::bf16 ? as_bf16(value) : from_f16(to_f16(value));
}

void load_chunk(const Floats &floats, std::int64_t at, std::int64_t count, float *values) {
  if (floats.dtype == Dtype::f32) {
    std::memcpy(values, static_cast<const float *>(floats.x) + at, static_cast<std::size_t>(count) * sizeof(float));
  } else {
    const auto *halves = static_cast<const std::uint16_t *>(floats.x) + at;
    if (floats.dtype == Dtype::bf16)
      for (std::int64_t i = 0; i < count; ++i) values[i] = from_bf16(halves[i]);
    else
      for (std::int64_t i = 0; i < count; ++i) values[i] = from_f16(halves[i]);
  }
}

// The bits of the largest |x| of [at, at + count): as integers, magnitudes keep their order, and NaN is the largest.
float largest_of(const Floats &floats, std::int64_t at, std::int64_t count) {
  float values[kChunk];
  std::int32_t largest = 0;
  for (std::int64_t done = 0; done < count; done += kChunk) {
    const std::int64_t some = std::min(kChunk, count - done);
    load_chunk(floats, at + done, some, values);
    for (std::int64_t i = 0; i < some; ++i)
      largest = std::max(largest, static_cast<std::int32_t>(bits_of(values[i]) & 0x7fffffffu));
  }
  return float_of(static_cast<std::uint32_t>(largest));
}

// Up to kMaxGroup codes; returns their sum. Adding 1.5 * 2^23 rounds to integers, to even.
template <class Round>
std::int32_t quantise_chunk(const float *values, std::int64_t count, float scale, std::int8_t *codes,
                            const Round &round_quotient) {
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float quotient = round_quotient(values[i] / scale);
    const float clamped = std::min(std::max(quotient, -128.0f), 127.0f);
    const auto code = static_cast<std::int32_t>(bits_of(clamped + 12582912.0f)) - 0x4b400000;
    codes[i] = static_cast<std::int8_t>(code);
    sum += code;
  }
  return sum;
}

} // namespace

float largest_magnitude(const Floats &floats, std::int64_t elements) { return largest_of(floats, 0, elements); }

float demanded_scale(float largest, Dtype dtype) {
  if (!std::isfinite(largest)) return std::numeric_limits<float>::quiet_NaN();
  const float smallest = dtype == Dtype::f16 ? 0x1p-14f : 0x1p-126f;
  return std::max(rounded(largest / 127.5f, dtype), smallest);
}

void quantise_as_demanded(const Floats &floats, const Weights &weights, const Quantisation &quantisation,
                          float tensor_scale, const Activations &out, std::int64_t first, std::int64_t last) {
  const std::int64_t inputs = weights.in_features, group = weights.group;
  const Demand demand = quantisation.demand;
  for (std::int64_t token = first; token < last; ++token) {
    float scale = tensor_scale;
    const float largest = demand == Demand::group ? 0.0f : largest_of(floats, token * inputs, inputs);
    if (demand == Demand::token) scale = demanded_scale(largest, floats.dtype);
    if (std::isnan(largest)) scale = largest;
    for (std::int64_t g = 0; g < weights.groups(); ++g) {
      const std::int64_t at = token * inputs + g * group;
      if (demand == Demand::group && g * group % quantisation.group == 0)
        scale = demanded_scale(largest_of(floats, at, std::min(quantisation.group, inputs - g * group)), floats.dtype);
      const std::int64_t row = g * out.rows + token;
      float values[kMaxGroup];
      load_chunk(floats, at, group, values);
      std::int8_t *codes = out.codes + row * group;
      std::int32_t sum = 0;
      if (std::isnan(scale))
        std::memset(codes, 0, static_cast<std::size_t>(group));
      else if (floats.dtype == Dtype::f32)
        sum = quantise_chunk(values, group, scale, codes, [](float quotient) { return quotient; });
      else if (floats.dtype == Dtype::bf16)
        sum = quantise_chunk(values, group, scale, codes, [](float quotient) { return as_bf16(quotient); });
      else
        sum = quantise_chunk(values, group, scale, codes, [](float quotient) { return from_f16(to_f16(quotient)); });
      out.scales[row] = scale;
      out.negative_sums[row] = -sum;
    }
  }
}

} // namespace pymllm::integer
