// Sums by which a file that is read again is known to be the one that was written.
#include "lane_sums.h"

#include <cstring>

namespace pymllm {

LaneSums lane_sums(const unsigned char *bytes, std::size_t count) {
  LaneSums sums{};
  std::uint64_t plain[kSumLanes] = {}, weighted[kSumLanes] = {};
  constexpr std::size_t row = kSumLanes * sizeof(std::uint64_t);
  std::uint64_t words[kSumLanes];
  std::size_t at = 0;
  for (; at + row <= count; at += row) {
    std::memcpy(words, bytes + at, row);
    for (int lane = 0; lane < kSumLanes; ++lane) {
      plain[lane] += words[lane];
      weighted[lane] += plain[lane];
    }
  }
  if (at < count) {
    std::memset(words, 0, row);
    std::memcpy(words, bytes + at, count - at);
    for (int lane = 0; lane < kSumLanes; ++lane) {
      plain[lane] += words[lane];
      weighted[lane] += plain[lane];
    }
  }
  std::memcpy(sums.data(), plain, row);
  std::memcpy(sums.data() + kSumLanes, weighted, row);
  return sums;
}

} // namespace pymllm
