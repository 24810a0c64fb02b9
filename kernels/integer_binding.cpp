// pymllm._native.integer_*: addresses as integers, of tensors that pymllm/kernels/native/integer.py has checked. nb::ndarray
// would check them here, at 4 us a tensor. What they hold is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <iterator>
#include <tuple>

#include "checks.h"
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
  check_number("the format of the weight", format, 0, static_cast<int>(std::size(kTables)) << 12 | 0xfff);
  const Table *table = format >> 12 == 0 ? nullptr : &kTables[(format >> 12) - 1];
  check_side("out_features", out_features, 1);
  check_side("in_features", in_features, 1);
  check_number("the inputs of a block", group, 16, integer::kMaxGroup);
  check_number("inputs that are left over, in whole blocks", in_features % group, 0, 0);
  check_number("the codes of the weight", format & 15, 0, static_cast<int>(integer::Codes::bytes));
  check_number("the scales of the weight", format >> 4 & 15, 0, static_cast<int>(integer::Scales::e8m0));
  check_number("the zeros of the weight", format >> 8 & 15, 0, static_cast<int>(integer::Zeros::offsets));
  return {pointer<const std::uint8_t>(blocks), out_features, in_features, group,
          {codes, static_cast<integer::Scales>(format >> 4 & 15), static_cast<integer::Zeros>(format >> 8 & 15), zero,
           table == nullptr ? nullptr : table->values,
           codes == integer::Codes::bytes || (table != nullptr && table->large)},
          pointer<const float>(row_factors)};
}

// x and y of a product.
void check_floats(std::uintptr_t blocks, std::uintptr_t x, std::uintptr_t y, std::int64_t tokens, int dtype) {
  check_side("the number of tokens", tokens);
  check_number("the dtype", dtype, 0, static_cast<int>(FloatType::f16));
  check_address("the packed weight", pointer<const void>(blocks));
  check_address("x", pointer<const void>(x), tokens > 0);
  check_address("y", pointer<const void>(y), tokens > 0);
}

void linear(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features, std::int64_t group, int format,
            int zero, std::uintptr_t row_factors, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y,
            std::int64_t tokens, int dtype, int slices, int demand, std::int64_t demanded_group, float demanded_scale,
            int threads, int isa) {
  check_floats(blocks, x, y, tokens, dtype);
  check_number("the number of slices", slices, 1, 3);
  check_number("what is demanded of activations", demand, 0, static_cast<int>(integer::Demand::stored));
  check_side("the group of activations", demanded_group, 1);
  const integer::Floats floats{static_cast<FloatType>(dtype), tokens, pointer<const void>(x),
                               pointer<const void>(bias), pointer<void>(y)};
  const integer::Quantisation quantisation{slices, static_cast<integer::Demand>(demand), demanded_group,
                                           demanded_scale};
  integer::linear(weights_of(blocks, out_features, in_features, group, format, zero, row_factors), floats,
                  quantisation, threads, static_cast<Isa>(isa));
}

void check_stored(std::uintptr_t blocks, std::uintptr_t codes, std::uintptr_t scales, std::int64_t in_features,
                  std::int64_t inputs, std::int64_t stored_group) {
  check_number("inputs", inputs, 1, in_features);
  check_number("the group of scales", stored_group, 1, inputs);
  check_address("the packed weight", pointer<const void>(blocks));
  check_address("codes", pointer<const void>(codes));
  check_address("scales", pointer<const void>(scales));
}

void pack(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features, std::int64_t group, int format,
          int zero, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, std::int64_t inputs,
          std::int64_t stored_group, int threads) {
  check_stored(blocks, codes, scales, in_features, inputs, stored_group);
  integer::pack(weights_of(0, out_features, in_features, group, format, zero, 0),
                {pointer<std::uint8_t>(codes), pointer<std::uint8_t>(scales), pointer<std::uint8_t>(zeros), inputs,
                 stored_group},
                pointer<std::uint8_t>(blocks), threads);
}

void unpack(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features, std::int64_t group, int format,
            int zero, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, std::int64_t inputs,
            std::int64_t stored_group, int threads) {
  check_stored(blocks, codes, scales, in_features, inputs, stored_group);
  integer::unpack(weights_of(blocks, out_features, in_features, group, format, zero, 0),
                  {pointer<std::uint8_t>(codes), pointer<std::uint8_t>(scales), pointer<std::uint8_t>(zeros), inputs,
                   stored_group},
                  threads);
}

void gather(std::uintptr_t blocks, std::int64_t out_features, std::int64_t in_features, std::int64_t group, int format,
            int zero, std::uintptr_t row_factors, std::int64_t inputs, std::uintptr_t ids, std::int64_t count,
            int dtype, std::uintptr_t rows, int threads) {
  const auto *first = pointer<const std::int64_t>(ids);
  check_floats(blocks, ids, rows, count, dtype);
  check_indices("an id is outside the table", first, count, 0, out_features);
  check_number("the width of a row", inputs, 1, in_features);
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
  check_floats(std::get<0>(gate_up), x, y, tokens, dtype);
  check_address("the packed weight", pointer<const void>(std::get<0>(down)));
  check_side("the number of experts", count);
  check_side("the experts of a token", top_k);
  check_address("the experts of tokens", routing.ids, tokens * top_k > 0);
  check_address("the weights of experts", routing.weights, tokens * top_k > 0);
  check_indices("a token is routed to an expert that there is not", routing.ids, tokens * top_k, INT64_MIN, count);
  check_number("the inputs of down", std::get<2>(down), std::get<1>(gate_up) / 2, std::get<1>(gate_up) / 2);
  check_number("the inputs of gate_up", std::get<2>(gate_up), std::get<1>(down), std::get<1>(down));
  check_number("the dtype of biases", bias_dtype, 0, static_cast<int>(FloatType::f16));
  check_number("the number of slices", exact_slices, 1, 3);
  check_number("the activation", gate, 0, Gate::swiglu);
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
