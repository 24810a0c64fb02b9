// What bindings look at, at every call, before a kernel reads or writes: the numbers that say where. A step's tensors may
// hold others than when Python last looked, and a tape makes its calls without Python. That a tensor has the memory which
// its shape promises, pymllm/kernels/native/addresses.py has seen to.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

namespace pymllm {

// A call that cannot be made as it is: pymllm.errors.ConfigError in Python, and IndicesError where it is for an index.
class Refusal : public std::exception {
public:
  Refusal(std::string message, std::string expected, std::string found, bool index = false)
      : message(std::move(message)), expected(std::move(expected)), found(std::move(found)), index(index) {}
  const char *what() const noexcept override { return message.c_str(); }

  std::string message, expected, found;
  bool index;
};

// Throws, out of the way of calls that are in order.
[[noreturn]] void refuse_number(const char *name, std::int64_t least, std::int64_t most, std::int64_t found);
[[noreturn]] void refuse_address(const char *name);
[[noreturn]] void refuse_index(const char *name, std::int64_t least, std::int64_t end, std::int64_t found, std::int64_t place);

// A number of the call itself: from `least` to `most`.
inline void check_number(const char *name, std::int64_t found, std::int64_t least, std::int64_t most) {
  if (found < least || found > most) refuse_number(name, least, most, found);
}

// A side of a tensor: no memory has more elements than the largest.
constexpr std::int64_t kLargestSide = std::int64_t{1} << 47;
inline void check_side(const char *name, std::int64_t found, std::int64_t least = 0) {
  check_number(name, found, least, kLargestSide);
}

// A tensor on another device than the CPU, or without memory, lies nowhere.
inline void check_address(const char *name, const void *address, bool read = true) {
  if (read && address == nullptr) refuse_address(name);
}

// Indices, each from `least` up to below `end`.
template <class Index>
void check_indices(const char *name, const Index *indices, std::int64_t count, std::int64_t least, std::int64_t end) {
  bool outside = false;
  for (std::int64_t i = 0; i < count; ++i) outside |= indices[i] < least || indices[i] >= end;
  if (!outside) return;
  for (std::int64_t i = 0; i < count; ++i)
    if (indices[i] < least || indices[i] >= end) refuse_index(name, least, end, indices[i], i);
}

// starts: [requests + 1], where the new tokens of each begin, up to `tokens`.  lengths: [requests], those and what was
// before.
void check_requests(const std::int32_t *starts, const std::int32_t *lengths, std::int64_t requests, std::int64_t tokens);

// Without pages, all tokens of each request are new.
void check_all_new(const std::int32_t *starts, const std::int32_t *lengths, std::int64_t requests);

// pages: [requests, columns]; those that hold a request's tokens, page_size each, must be below `count`.
void check_pages(const std::int32_t *pages, std::int64_t columns, std::int64_t page_size, std::int64_t count,
                 const std::int32_t *lengths, std::int64_t requests);

// slots: [requests], below `count`, and none twice; below 0: none.
void check_states(const std::int64_t *slots, std::int64_t requests, std::int64_t count);

} // namespace pymllm
