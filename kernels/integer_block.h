// Reading a packed block, one value at a time. `static`: one copy per file, see isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "float_scalar.h"
#include "integer.h"

namespace pymllm::integer {

// e4m3 without infinities, as in float8_e4m3fn.
static inline float from_e4m3(std::uint8_t byte) {
  const std::uint32_t sign = (byte & 0x80u) << 24, magnitude = byte & 0x7fu;
  if (magnitude == 0x7f) return float_of(sign | 0x7fc00000u);
  if (magnitude < 8) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-9f));
  return float_of(sign | ((magnitude << 20) + (120u << 23)));
}

static inline float from_e8m0(std::uint8_t byte) {
  return float_of(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : static_cast<std::uint32_t>(byte) << 23);
}

static inline float read_scale(Scales kind, const std::uint8_t *scales, std::int64_t i) {
  if (kind == Scales::e4m3) return from_e4m3(scales[i]);
  if (kind == Scales::e8m0) return from_e8m0(scales[i]);
  if (kind == Scales::f32) {
    float scale;
    std::memcpy(&scale, scales + 4 * i, 4);
    return scale;
  }
  std::uint16_t half;
  std::memcpy(&half, scales + 2 * i, 2);
  return kind == Scales::f16 ? from_f16(half) : from_bf16(half);
}

static inline std::int32_t read_zero(const Format &format, const std::uint8_t *block, std::int64_t r) {
  if (format.zeros == Zeros::same) return format.zero;
  return format.zeros == Zeros::each ? block[format.zeros_offset() + r] : 0;
}

static inline float read_offset(const Format &format, const std::uint8_t *block, std::int64_t r) {
  float offset = 0;
  if (format.zeros == Zeros::offsets) std::memcpy(&offset, block + format.zeros_offset() + 4 * r, 4);
  return offset;
}

// The code of output r and input k of the block.
static inline std::uint8_t read_code(const Format &format, std::int64_t group, const std::uint8_t *block,
                                     std::int64_t r, std::int64_t k) {
  const std::uint8_t *lines = block + format.header_bytes() + 4 * r;
  if (format.codes == Codes::bytes) return lines[k / 4 * 64 + k % 4];
  const std::int64_t half = group / 2, at = k < half ? k : k - half;
  const std::uint8_t byte = lines[at / 4 * 64 + at % 4];
  return static_cast<std::uint8_t>(k < half ? byte & 15 : byte >> 4);
}

static inline std::uint8_t value_of(const Format &format, std::uint8_t code) {
  return format.table == nullptr ? code : format.table[code];
}

} // namespace pymllm::integer
