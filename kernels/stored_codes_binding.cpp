// pymllm._native.split_*: addresses as integers, of tensors that pymllm/kernels/native/stored_codes.py has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>

#include "checks.h"
#include "released.h"
#include "stored_codes.h"

namespace nb = nanobind;

namespace pymllm {
namespace {

template <class T>
T *at(std::uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

void check_matrix(std::uintptr_t from, std::uintptr_t codes, std::int64_t rows, std::int64_t columns,
                  std::int64_t stride) {
  check_side("rows", rows);
  check_side("columns", columns);
  check_number("the stride of rows", stride, rows > 1 ? columns : 0, kLargestSide);
  check_address("what is stored", at<const void>(from), rows * columns > 0);
  check_address("codes", at<const void>(codes), rows * columns > 0);
}

void check_bits(int bits, int least, int most) {
  check_number("bits of a field", bits, least, most);
  check_number("bits of a byte that fields leave over", 8 % bits, 0, 0);
}

void split_fields(std::uintptr_t bytes, std::int64_t rows, std::int64_t n, std::int64_t stride, int bits, bool planes,
                  std::uintptr_t codes, int threads) {
  check_matrix(bytes, codes, rows, n, stride);
  check_bits(bits, 1, 4);
  stored_codes::split_fields(at<const std::uint8_t>(bytes), rows, n, stride, bits, planes, at<std::uint8_t>(codes),
                             threads);
}

void split_rows(std::uintptr_t words, std::int64_t rows, std::int64_t columns, std::int64_t stride, int bits,
                std::uintptr_t codes, int threads) {
  check_matrix(words, codes, rows, columns, stride);
  check_bits(bits, 2, 8);
  stored_codes::split_rows(at<const std::uint32_t>(words), rows, columns, stride, bits, at<std::uint8_t>(codes),
                           threads);
}

void split_columns(std::uintptr_t words, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                   const std::array<int, 8> &order, std::uintptr_t codes, int threads) {
  check_matrix(words, codes, rows, columns, stride);
  int found = 0;
  for (const int place : order) {
    check_number("a field's place", place, 0, 7);
    found |= 1 << place;
  }
  check_number("the places of eight fields", found, 255, 255);
  stored_codes::split_columns(at<const std::uint32_t>(words), rows, columns, stride, order.data(),
                              at<std::uint8_t>(codes), threads);
}

} // namespace

void register_stored_codes(nb::module_ &m) {
  const auto released = nb::call_guard<Released>();
  m.def("split_fields", &split_fields, released, "See kernels/stored_codes.h.");
  m.def("split_rows", &split_rows, released, "See kernels/stored_codes.h.");
  m.def("split_columns", &split_columns, released, "See kernels/stored_codes.h.");
}

} // namespace pymllm
