#include <algorithm>
#include <cstring>

#include "integer.h"
#include "integer_block.h"
#include "threads.h"

namespace pymllm::integer {
namespace {

// Four codes at a time go to the lines of a block, which are 64 bytes apart.
void pack_words(const std::uint8_t *from, std::int64_t words, std::uint8_t *to) {
  for (std::int64_t j = 0; j < words; ++j) std::memcpy(to + 64 * j, from + 4 * j, 4);
}

// The codes of the first half of a group become low nibbles, those of the second half high ones.
void pack_nibbles(const std::uint8_t *from, std::int64_t half, std::uint8_t *to) {
  for (std::int64_t j = 0; j < half; j += 4) {
    std::uint32_t low, high;
    std::memcpy(&low, from + j, 4);
    std::memcpy(&high, from + half + j, 4);
    const std::uint32_t both = (low & 0x0f0f0f0fu) | (high << 4 & 0xf0f0f0f0u);
    std::memcpy(to + 16 * j, &both, 4);
  }
}

} // namespace

void pack(const Weights &shape, const Stored &stored, std::uint8_t *blocks, int threads) {
  const Format &format = shape.format;
  const std::int64_t groups = shape.groups(), group = shape.group, half = group / 2;
  const std::int64_t stored_groups = (stored.inputs + stored.group - 1) / stored.group;
  const std::int64_t scale_bytes = format.scale_bytes(), zero_bytes = format.zeros == Zeros::offsets ? 4 : 1;
  const std::int64_t bytes = shape.row_blocks() * groups * shape.block_bytes();
  // Packing takes long enough to wake threads that sleep, so the pool is not told of how few bytes.
  const Team team{worthwhile_threads(bytes, threads).threads};
  parallel_for(shape.row_blocks(), team, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row_block = first; row_block < last; ++row_block) {
      const std::int64_t outputs = std::min(kBlockRows, shape.out_features - row_block * kBlockRows);
      for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t inputs = std::min(group, stored.inputs - g * group);
        const bool whole = outputs == kBlockRows && inputs == group;
        std::uint8_t *block = blocks + (row_block * groups + g) * shape.block_bytes();
        std::memset(block, 0, static_cast<std::size_t>(whole ? format.header_bytes() : shape.block_bytes()));
        for (std::int64_t r = 0; r < outputs; ++r) {
          const std::int64_t output = row_block * kBlockRows + r;
          const std::int64_t at = output * stored_groups + g * group / stored.group;
          std::memcpy(block + r * scale_bytes, stored.scales + at * scale_bytes, static_cast<std::size_t>(scale_bytes));
          if (format.zeros != Zeros::same) {
            std::uint8_t *zero = block + format.zeros_offset() + r * zero_bytes;
            if (stored.zeros != nullptr)
              std::memcpy(zero, stored.zeros + at * zero_bytes, static_cast<std::size_t>(zero_bytes));
            else
              *zero = static_cast<std::uint8_t>(format.zero);
          }
          const std::uint8_t *from = stored.codes + output * stored.inputs + g * group;
          std::uint8_t *to = block + format.header_bytes() + 4 * r;
          if (format.codes == Codes::bytes && inputs % 4 == 0)
            pack_words(from, inputs / 4, to);
          else if (format.codes == Codes::bytes)
            for (std::int64_t k = 0; k < inputs; ++k) to[k / 4 * 64 + k % 4] = from[k];
          else if (inputs == group)
            pack_nibbles(from, half, to);
          else
            for (std::int64_t k = 0; k < inputs; ++k) {
              std::uint8_t &byte = to[k % half / 4 * 64 + k % half % 4];
              byte = static_cast<std::uint8_t>(byte | (from[k] & 15) << (k < half ? 0 : 4));
            }
        }
      }
    }
  });
}

void unpack(const Weights &weights, const Stored &stored, int threads) {
  const Format &format = weights.format;
  const std::int64_t groups = weights.groups(), group = weights.group;
  const std::int64_t stored_groups = (stored.inputs + stored.group - 1) / stored.group;
  const std::int64_t scale_bytes = format.scale_bytes(), zero_bytes = format.zeros == Zeros::offsets ? 4 : 1;
  const std::int64_t bytes = weights.row_blocks() * groups * weights.block_bytes();
  parallel_for(weights.out_features, worthwhile_threads(bytes, threads), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t output = first; output < last; ++output) {
      const std::int64_t r = output % kBlockRows;
      for (std::int64_t g = 0; g < groups; ++g) {
        const std::uint8_t *block = weights.block(output / kBlockRows, g);
        const std::int64_t inputs = std::min(group, stored.inputs - g * group);
        const std::int64_t at = output * stored_groups + g * group / stored.group;
        std::memcpy(stored.scales + at * scale_bytes, block + r * scale_bytes, static_cast<std::size_t>(scale_bytes));
        if (stored.zeros != nullptr)
          std::memcpy(stored.zeros + at * zero_bytes, block + format.zeros_offset() + r * zero_bytes,
                      static_cast<std::size_t>(zero_bytes));
        std::uint8_t *to = stored.codes + output * stored.inputs + g * group;
        for (std::int64_t k = 0; k < inputs; ++k) to[k] = read_code(format, group, block, r, k);
      }
    }
  });
}

void gather(const Weights &weights, std::int64_t inputs, const std::int64_t *ids, std::int64_t count, FloatType dtype,
            void *rows, int threads) {
  const Format &format = weights.format;
  const std::int64_t group = weights.group;
  // A row's bytes lie 4 in 64: reading one costs about as much as reading its block.
  const std::int64_t bytes = count * weights.groups() * weights.block_bytes();
  parallel_for(count, worthwhile_threads(bytes, threads), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t output = ids[i], r = output % kBlockRows;
      const float factor = weights.row_factors == nullptr ? 1.0f : weights.row_factors[output];
      for (std::int64_t g = 0; g * group < inputs; ++g) {
        const std::uint8_t *block = weights.block(output / kBlockRows, g);
        const float scale = read_scale(format.scales, block, r) * factor;
        const float zero = static_cast<float>(read_zero(format, block, r)), offset = read_offset(format, block, r);
        const std::int64_t end = std::min(group, inputs - g * group);
        for (std::int64_t k = 0; k < end; ++k) {
          const auto value = static_cast<float>(value_of(format, read_code(format, group, block, r, k)));
          // Two roundings, not one: this file is compiled without contraction (sources.cmake).
          const float product = (value - zero) * scale;
          write_float(format.zeros == Zeros::offsets ? product + offset : product, rows, dtype,
                      i * inputs + g * group + k);
        }
      }
    }
  });
}

} // namespace pymllm::integer
