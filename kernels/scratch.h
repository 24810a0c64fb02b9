// Memory of a thread for intermediate results, which outlives a call: decoding makes the same calls thousands of times a
// second. For files without instruction set flags (isa.h).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "threads.h"

namespace pymllm {

// Lives as long as its thread, and only grows. 64-byte aligned.
class Scratch {
public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { release(); }

  std::uint8_t *at_least(std::size_t bytes) {
    if (bytes > capacity_) {
      release();
      data_ = ::operator new(bytes, kAlignment);
      capacity_ = bytes;
    }
    return static_cast<std::uint8_t *>(data_);
  }

  float *floats(std::int64_t count) {
    return reinterpret_cast<float *>(at_least(static_cast<std::size_t>(count) * sizeof(float)));
  }

private:
  static constexpr std::align_val_t kAlignment{64};
  void release() {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
    data_ = nullptr;
    capacity_ = 0;
  }
  void *data_ = nullptr;
  std::size_t capacity_ = 0;
};

// body(i, scratch) for each i below count, on up to team.threads threads as they come free, each with scratch of its own.
template <class Body>
void run_with_scratch(std::int64_t count, std::int64_t scratch_floats, Team team, const Body &body) {
  thread_local Scratch all;
  team.threads = static_cast<int>(std::min<std::int64_t>(team.threads, count));
  float *scratch = all.floats(std::max(team.threads, 1) * scratch_floats); // the caller's, so that it outlives the threads
  parallel_for(
      count, team,
      [&](std::int64_t begin, std::int64_t end, int thread) {
        for (std::int64_t i = begin; i < end; ++i) body(i, scratch + thread * scratch_floats);
      },
      1);
}

} // namespace pymllm
