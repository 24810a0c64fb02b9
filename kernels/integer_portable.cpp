// The integer linear without any instruction set: what every other path is checked against.
#include <cmath>

#include "integer.h"
#include "integer_block.h"
#include "integer_scale.h"
#include "vector_portable.h"

namespace pymllm::integer {
namespace {

struct V : Lanes {
  static Vec round(Vec v) {
    for (float &lane : v.lane) lane = std::nearbyint(lane);
    return v;
  }
  template <int N>
  static std::uint32_t largest_bits(const Vec (&v)[N]) {
    std::uint32_t largest = 0;
    for (const Vec &some : v)
      for (const float lane : some.lane) {
        const std::uint32_t magnitude = bits_of(lane) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
    return largest;
  }
  static void store_codes(std::int8_t *codes, Vec v) {
    for (int i = 0; i < 4; ++i) codes[i] = static_cast<std::int8_t>(v.lane[i]);
  }
  static void widen(const std::uint8_t *bytes, std::int32_t *to) {
    for (int i = 0; i < kLanes; ++i) to[i] = bytes[i];
  }

  // Input by input, 16 outputs each.
  static const std::uint8_t *decode_lines(const Format &format, const std::uint8_t *lines, std::int64_t group,
                                          std::uint8_t *decoded) {
    const std::uint8_t *block = lines - format.header_bytes();
    for (std::int64_t k = 0; k < group; ++k)
      for (std::int64_t r = 0; r < kBlockRows; ++r)
        decoded[k * kBlockRows + r] = value_of(format, read_code(format, group, block, r, k));
    return decoded;
  }

  template <int R, bool kLarge>
  static void dots(const std::uint8_t *values, const std::int32_t *zeros, const std::int8_t *codes,
                   const std::int32_t *negative_sums, int group, Vec (&out)[R][4]) {
    for (int m = 0; m < R; ++m) {
      std::int32_t sums[kBlockRows];
      for (int r = 0; r < kBlockRows; ++r) sums[r] = zeros[r] * negative_sums[m];
      for (int k = 0; k < group; ++k)
        for (int r = 0; r < kBlockRows; ++r) sums[r] += codes[m * group + k] * values[k * kBlockRows + r];
      for (int r = 0; r < kBlockRows; ++r) out[m][r / 4].lane[r % 4] = static_cast<float>(sums[r]);
    }
  }
};

#include "integer_kernel.h"
#include "integer_tiles.h"

} // namespace

const Kernels kPortable{quantise, quantise_as_demanded, demanded_tensor_scale, multiply, scratch_bytes};

} // namespace pymllm::integer
