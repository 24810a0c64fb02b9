// pymllm._native.int4_*: addresses as integers, checked by pymllm/kernels/native_int4.py. nb::ndarray would check them
// here, at 4 us a tensor.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>

#include "int4.h"
#include "roofline.h"

namespace nb = nanobind;

namespace pymllm {
namespace {

template <class T>
T *pointer(std::uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

void linear(std::uintptr_t blocks, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y, std::int64_t tokens,
            std::int64_t out_features, std::int64_t in_features, std::int64_t group, int dtype, int slices, int threads,
            int isa) {
  const int4::Weights weights{pointer<const std::uint8_t>(blocks), out_features, in_features, group};
  const int4::Floats floats{static_cast<int4::Dtype>(dtype), tokens, pointer<const void>(x), pointer<const void>(bias),
                            pointer<void>(y)};
  int4::linear(weights, floats, slices, threads, static_cast<Isa>(isa));
}

void pack(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, std::uintptr_t blocks,
          std::int64_t out_features, std::int64_t in_features, std::int64_t stored_group, std::int64_t group,
          int threads) {
  int4::pack({nullptr, out_features, in_features, group}, stored_group, pointer<const std::uint8_t>(codes),
             pointer<const std::uint16_t>(scales), pointer<const std::uint8_t>(zeros), pointer<std::uint8_t>(blocks),
             threads);
}

void unpack(std::uintptr_t blocks, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros,
            std::int64_t out_features, std::int64_t in_features, std::int64_t stored_group, std::int64_t group,
            int threads) {
  int4::unpack({pointer<const std::uint8_t>(blocks), out_features, in_features, group}, stored_group,
               pointer<std::uint8_t>(codes), pointer<std::uint16_t>(scales), pointer<std::uint8_t>(zeros), threads);
}

double roofline_read(std::uintptr_t data, std::int64_t bytes, int streams, int threads) {
  return roofline::read_seconds(pointer<const void>(data), bytes, streams, threads);
}

void roofline_pages(std::uintptr_t data, std::int64_t bytes, bool huge) {
  roofline::advise_pages(pointer<void>(data), bytes, huge);
}

} // namespace

void register_int4(nb::module_ &m) {
  m.def("isa_code",
        [](const std::string &name) { return static_cast<int>(name.empty() ? chosen_isa() : isa_named(name)); },
        "The number of a kernel path, of the chosen one for an empty name; ValueError if this CPU cannot run it.");
  m.def("int4_linear", &linear, nb::call_guard<nb::gil_scoped_release>());
  m.def("int4_pack", &pack, nb::call_guard<nb::gil_scoped_release>());
  m.def("int4_unpack", &unpack, nb::call_guard<nb::gil_scoped_release>());
  m.def("roofline_read", &roofline_read, "Seconds to read (address, bytes) once.");
  m.def("roofline_pages", &roofline_pages, "Ask for huge pages, or for none, in untouched memory.");
  m.def("roofline_f32", &roofline::f32_peak, "Operations a second of fused multiply-adds.");
  m.def("roofline_int8", &roofline::int8_peak, "Operations a second of u8 x s8 products.");
}

} // namespace pymllm
