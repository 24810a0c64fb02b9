// How one group of activations is scaled: shared by all instruction sets. `static`: one copy per file, see isa.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace pymllm::integer {

struct GroupScale {
  float scale;    // of the first slice: code * scale is near x
  float inverse;  // x * inverse is within [-127, 127]; 0: all codes are 0
};

constexpr float kSliceRatio = 254.0f;  // a remainder is at most half a code: times 254 it is within [-127, 127] again

// magnitude: the largest |x| of the group, as the bits of a float; those of infinities and NaNs are the largest.
// One slice: largest = 127 * scale. More: the scale is a power of two, so that x * inverse loses no bit.
static inline GroupScale group_scale(std::uint32_t magnitude, int slices) {
  const auto as_float = [](std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const std::uint32_t exponent = magnitude >> 23;
  if (exponent >= 255) return {as_float(0x7fc00000u), 0.0f};
  if (exponent < 127 - 100) return {0.0f, 0.0f};
  const float largest = as_float(magnitude);
  if (slices == 1) return {largest * (1.0f / 127.0f), 127.0f / largest};
  // largest * 2^-(e-6) is within [64, 128); above 127, halve once more.
  const std::uint32_t e = exponent - 6 + ((magnitude & 0x7fffffu) > 0x7e0000u ? 1 : 0);
  return {as_float(e << 23), as_float((254 - e) << 23)};
}

} // namespace pymllm::integer
