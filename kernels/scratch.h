// Memory of a thread that kernels use for intermediate results. For files without instruction set flags (isa.h).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace pymllm {

// Grows and is kept, one a thread: decoding calls with the same sizes thousands of times a second.
class Scratch {
public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { std::free(memory_); }

  float *at_least(std::int64_t floats) {
    if (floats > floats_) {
      std::free(memory_);
      floats_ = 0;
      memory_ = std::malloc(static_cast<std::size_t>(floats) * sizeof(float) + 64);
      if (memory_ == nullptr) throw std::bad_alloc();
      floats_ = floats;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory_);
    return reinterpret_cast<float *>((address + 63) & ~std::uintptr_t{63});
  }

private:
  void *memory_ = nullptr;
  std::int64_t floats_ = 0;
};

} // namespace pymllm
