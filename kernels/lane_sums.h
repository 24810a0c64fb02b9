// Sums by which a file that is read again is known to be the one that was written: pymllm/loading/packed_file.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace pymllm {

constexpr int kSumLanes = 8;
using LaneSums = std::array<std::uint64_t, 2 * kSumLanes>;

// Sums little-endian words of 64 bits in rows of 8 lanes, the last row filled up with zeros, modulo 2^64: of each lane
// the plain sum, then of each lane the sum of its running sums, in which the order of the words counts. Only sums, so
// that memory is the limit on every instruction set.
LaneSums lane_sums(const unsigned char *bytes, std::size_t count);

} // namespace pymllm
