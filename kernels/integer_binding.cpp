// pymllm._native.integer_*: addresses as integers, checked by pymllm/kernels/native/integer.py. nb::ndarray would check
// them here, at 4 us a tensor.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "integer.h"
#include "integer_experts.h"
#include "roofline.h"
#include "released.h"
#include "tape.h"

namespace nb = nanobind;

namespace pymllm {
namespace {

template <class T>
T *pointer(std::uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

// The integers of codebooks, by their numbers in pymllm/kernels/codebooks.py, less the smallest of them, which is their
// zero point. A test compares the two. Those above 127 are told from `large`.
struct Table {
  std::uint8_t values[16];
  bool large;
};
constexpr Table kTables[] = {
    {{12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}, false},                          // e2m1, doubled
    {{0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240}, true},             // iq4
    {{66, 74, 82, 90, 98, 106, 114, 124, 58, 50, 42, 34, 26, 18, 10, 0}, false},                   // iq3_xxs
    {{16, 18, 20, 22, 24, 26, 28, 30, 14, 12, 10, 8, 6, 4, 2, 0}, false},                          // iq3_s
    {{51, 68, 86, 43, 43, 43, 43, 43, 35, 18, 0, 43, 43, 43, 43, 43}, false},                      // iq2
    {{2, 10, 18, 9, 9, 9, 9, 9, 0, 8, 16, 9, 9, 9, 9, 9}, false},                                  // iq1, times 8
};

// How weights are packed. format: codes, scales and zeros, 4 bits each, then the table (0: none); zero: see Format.
integer::Weights weights_of(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features,
                            std::int64_t group, int format, int zero, std::uintptr_t row_factors) {
  const auto codes = static_cast<integer::Codes>(format & 15);
  const Table *table = format >> 12 == 0 ? nullptr : &kTables[(format >> 12) - 1];
  return {pointer<const std::uint8_t>(blocks), out_features, in_features, group,
          {codes, static_cast<integer::Scales>(format >> 4 & 15), static_cast<integer::Zeros>(format >> 8 & 15), zero,
           table == nullptr ? nullptr : table->values,
           codes == integer::Codes::bytes || (table != nullptr && table->large)},
          pointer<const float>(row_factors)};
}

void linear(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features, std::int64_t group, int format,
            int zero, std::uintptr_t row_factors, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y,
            std::int64_t tokens, int dtype, int slices, int demand, std::int64_t demanded_group, float demanded_scale,
            int threads, int isa) {
  const integer::Floats floats{static_cast<FloatType>(dtype), tokens, pointer<const void>(x),
                               pointer<const void>(bias), pointer<void>(y)};
  const integer::Quantisation quantisation{slices, static_cast<integer::Demand>(demand), demanded_group,
                                           demanded_scale};
  integer::linear(weights_of(blocks, out_features, in_features, group, format, zero, row_factors), floats,
                  quantisation, threads, static_cast<Isa>(isa));
}

void pack(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features, std::int64_t group, int format,
          int zero, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, std::int64_t inputs,
          std::int64_t stored_group, int threads) {
  integer::pack(weights_of(0, out_features, in_features, group, format, zero, 0),
                {pointer<std::uint8_t>(codes), pointer<std::uint8_t>(scales), pointer<std::uint8_t>(zeros), inputs,
                 stored_group},
                pointer<std::uint8_t>(blocks), threads);
}

void unpack(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features, std::int64_t group, int format,
            int zero, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, std::int64_t inputs,
            std::int64_t stored_group, int threads) {
  integer::unpack(weights_of(blocks, out_features, in_features, group, format, zero, 0),
                  {pointer<std::uint8_t>(codes), pointer<std::uint8_t>(scales), pointer<std::uint8_t>(zeros), inputs,
                   stored_group},
                  threads);
}

void gather(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features, std::int64_t group, int format,
            int zero, std::uintptr_t row_factors, std::int64_t inputs, std::uintptr_t ids, std::int64_t count,
            int dtype, std::uintptr_t rows, int threads) {
  const auto *first = pointer<const std::int64_t>(ids);
  if (count > 0) {
    const auto [least, most] = std::minmax_element(first, first + count);
    if (*least < 0 || *most >= out_features) throw nb::index_error("an id is outside the table");
  }
  integer::gather(weights_of(blocks, out_features, in_features, group, format, zero, row_factors), inputs, first,
                  count, static_cast<FloatType>(dtype), pointer<void>(rows), threads);
}

// Each product: (blocks, outputs, inputs, group, format, zero, row factors, biases).
using ProductTuple =
    std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, int, int, std::uintptr_t, std::uintptr_t>;

integer::Product product_of(const ProductTuple &t, int bias_dtype) {
  return {weights_of(std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t), std::get<5>(t),
                     std::get<6>(t)),
          pointer<const void>(std::get<7>(t)), static_cast<FloatType>(bias_dtype)};
}

void experts(const ProductTuple &gate_up, const ProductTuple &down, std::int64_t count, int gate, float alpha,
             float limit, int bias_dtype, std::uintptr_t x, std::uintptr_t ids, std::uintptr_t weights,
             std::uintptr_t y, std::int64_t tokens, std::int64_t top_k, int dtype, std::int64_t exact_tokens,
             int exact_slices, int threads, int isa) {
  const integer::Routing routing{pointer<const std::int64_t>(ids), pointer<const float>(weights), tokens, top_k};
  for (std::int64_t i = 0; i < tokens * top_k; ++i)
    if (routing.ids[i] >= count) throw nb::index_error("a token is routed to an expert that there is not");
  integer::experts({product_of(gate_up, bias_dtype), product_of(down, bias_dtype), count,
                    {static_cast<Gate::Kind>(gate), alpha, limit}},
                   routing, static_cast<FloatType>(dtype), pointer<const void>(x), pointer<void>(y),
                   {exact_tokens, exact_slices}, threads, static_cast<Isa>(isa));
}

double roofline_read(std::uintptr_t data, std::int64_t bytes, int streams, int threads) {
  return roofline::read_seconds(pointer<const void>(data), bytes, streams, threads);
}

void roofline_pages(std::uintptr_t data, std::int64_t bytes, bool huge) {
  roofline::advise_pages(pointer<void>(data), bytes, huge);
}

} // namespace

void register_integer(nb::module_ &m) {
  const auto released = nb::call_guard<Released>();
  m.def("isa_code",
        [](const std::string &name) { return static_cast<int>(name.empty() ? chosen_isa() : isa_named(name)); },
        "The number of a kernel path, of the chosen one for an empty name; ValueError if this CPU cannot run it.");
  m.def("integer_linear", &Recorded<&linear>::call, released, "See kernels/integer.h.");
  m.def("integer_pack", &pack, released, "See kernels/integer.h.");
  m.def("integer_unpack", &unpack, released, "See kernels/integer.h.");
  m.def("integer_gather", &Recorded<&gather>::call, released, "See kernels/integer.h.");
  m.def("integer_experts", &Recorded<&experts>::call, released, "See kernels/integer_experts.h.");
  m.def("roofline_read", &roofline_read, "Seconds to read (address, bytes) once.");
  m.def("roofline_pages", &roofline_pages, "Ask for huge pages, or for none, in untouched memory.");
  m.def("roofline_f32", &roofline::f32_peak, "Operations a second of fused multiply-adds.");
  m.def("roofline_int8", &roofline::int8_peak, "Operations a second of u8 x s8 products.");
}

} // namespace pymllm
