// The int4 linear without any instruction set: what every other path is checked against.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "int4.h"
#include "int4_scale.h"

namespace pymllm::int4 {
namespace {

constexpr std::int64_t kMaxGroup = 128;

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

float from_f16(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023u;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float tiny = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal, or zero
  return bits<float>(sign | bits<std::uint32_t>(tiny));
}

std::uint16_t to_f16(float value) {
  const std::uint32_t word = bits<std::uint32_t>(value), sign = (word >> 16) & 0x8000u, magnitude = word & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u)  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24, to even
    return static_cast<std::uint16_t>(sign | (bits<std::uint32_t>(bits<float>(magnitude) + 0.5f) & 0xffffu));
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

std::uint16_t to_bf16(float value) {
  const std::uint32_t word = bits<std::uint32_t>(value);
  if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((word >> 16) | 0x40u);
  return static_cast<std::uint16_t>((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
}

float load(Dtype dtype, const void *data, std::int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float *>(data)[i];
  const std::uint16_t half = static_cast<const std::uint16_t *>(data)[i];
  return dtype == Dtype::f16 ? from_f16(half) : bits<float>(static_cast<std::uint32_t>(half) << 16);
}

void store(Dtype dtype, void *data, std::int64_t i, float value) {
  if (dtype == Dtype::f32)
    static_cast<float *>(data)[i] = value;
  else
    static_cast<std::uint16_t *>(data)[i] = dtype == Dtype::f16 ? to_f16(value) : to_bf16(value);
}

void quantise(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
              std::int64_t last) {
  const std::int64_t group = weights.group;
  for (std::int64_t g = first; g < last; ++g) {
    for (std::int64_t token = 0; token < floats.tokens; ++token) {
      float values[kMaxGroup];
      std::uint32_t magnitude = 0;
      for (std::int64_t k = 0; k < group; ++k) {
        values[k] = load(floats.dtype, floats.x, token * weights.in_features + g * group + k);
        magnitude = std::max(magnitude, bits<std::uint32_t>(values[k]) & 0x7fffffffu);
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
  float *sums = static_cast<float *>(scratch);  // [R][16]
  for (std::int64_t n = first; n < last; ++n) {
    std::fill(sums, sums + x.rows * kBlockRows, 0.0f);
    for (std::int64_t g = 0; g < weights.groups(); ++g) {
      const std::uint8_t *block = weights.block(n, g), *zeros = block + kZerosOffset;
      std::int8_t codes[kMaxGroup][kBlockRows];
      for (std::int64_t k = 0; k < group / 2; ++k)
        for (std::int64_t r = 0; r < kBlockRows; ++r) {
          const std::uint8_t byte = block[kHeaderBytes + k / 4 * 64 + 4 * r + k % 4];
          codes[k][r] = static_cast<std::int8_t>(byte & 15);
          codes[group / 2 + k][r] = static_cast<std::int8_t>(byte >> 4);
        }
      for (std::int64_t row = 0; row < x.rows; ++row) {
        const std::int64_t at = g * x.rows + row;
        std::int32_t dots[kBlockRows];
        for (std::int64_t r = 0; r < kBlockRows; ++r) dots[r] = zeros[r] * x.negative_sums[at];
        for (std::int64_t k = 0; k < group; ++k)
          for (std::int64_t r = 0; r < kBlockRows; ++r) dots[r] += x.codes[at * group + k] * codes[k][r];
        for (std::int64_t r = 0; r < kBlockRows; ++r) {
          std::uint16_t scale;
          std::memcpy(&scale, block + 2 * r, 2);
          sums[row * kBlockRows + r] += static_cast<float>(dots[r]) * from_f16(scale) * x.scales[at];
        }
      }
    }
    const std::int64_t outputs = std::min(kBlockRows, weights.out_features - n * kBlockRows);
    for (std::int64_t token = 0; token < floats.tokens; ++token)
      for (std::int64_t r = 0; r < outputs; ++r) {
        float sum = 0.0f;
        for (int slice = x.slices; slice-- > 0;) sum += sums[(token * x.slices + slice) * kBlockRows + r];
        const std::int64_t output = n * kBlockRows + r;
        if (floats.bias != nullptr) sum += load(floats.dtype, floats.bias, output);
        store(floats.dtype, floats.y, token * weights.out_features + output, sum);
      }
  }
}

} // namespace

const Kernels kPortable{quantise, multiply, scratch_bytes};

} // namespace pymllm::int4
