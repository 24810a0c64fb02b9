// bf16, f16 and float32, one value at a time.
//
// Static, not merely inline: files with different compiler flags include this, and each must keep its own copy (isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "float_linear.h"

namespace pymllm {

static inline std::int64_t bytes_of(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

static inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float from_bf16(std::uint16_t bits) { return float_of(static_cast<std::uint32_t>(bits) << 16); }

static inline std::uint16_t to_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Exact; subnormals by the difference of two normal numbers, so also where subnormals are flushed to zero.
static inline float from_f16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x0400u) {
    const float value = float_of(0x38800000u | magnitude << 13) - float_of(0x38800000u); // 2^-14 (1 + m) - 2^-14
    return float_of(sign | bits_of(value));
  }
  return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

// Round to nearest even.
static inline std::uint16_t to_f16(float value) {
  const std::uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u); // 65520 and above
  if (magnitude < 0x38800000u) { // subnormal: let the adder round at 2^-24
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float read_float(const void *p, FloatType type, std::int64_t i) {
  if (type == FloatType::f32) return static_cast<const float *>(p)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t *>(p)[i];
  return type == FloatType::bf16 ? from_bf16(bits) : from_f16(bits);
}

static inline void write_float(float value, void *p, FloatType type, std::int64_t i) {
  if (type == FloatType::f32) static_cast<float *>(p)[i] = value;
  else static_cast<std::uint16_t *>(p)[i] = type == FloatType::bf16 ? to_bf16(value) : to_f16(value);
}

} // namespace pymllm
