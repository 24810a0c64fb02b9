// The Python face of float_linear, elementwise and pointwise. Tensors come checked by pymllm/kernels/native/.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <cstdint>

#include "checks.h"
#include "elementwise.h"
#include "float_linear.h"
#include "isa.h"
#include "pointwise.h"
#include "released.h"
#include "tape.h"

namespace nb = nanobind;

namespace pymllm {
namespace {

template <class T> const T *in(std::uintptr_t address) { return reinterpret_cast<const T *>(address); }
void *out(std::uintptr_t address) { return reinterpret_cast<void *>(address); }

// x and y of `rows` rows of `size` elements.
void check_rows(std::uintptr_t x, std::uintptr_t y, int type, std::int64_t rows, std::int64_t size) {
  check_number("the dtype", type, 0, static_cast<int>(FloatType::f16));
  check_side("the number of rows", rows);
  check_side("the size of a row", size);
  check_address("x", in<void>(x), rows > 0 && size > 0);
  check_address("y", in<void>(y), rows > 0 && size > 0);
}

void linear(std::uintptr_t x, int type, std::uintptr_t weight, int weight_type, std::uintptr_t scales,
            std::int64_t block_out, std::int64_t block_in, std::uintptr_t row_nan, std::uintptr_t table,
            std::uintptr_t bias, std::uintptr_t y, std::int64_t tokens, std::int64_t out_features, std::int64_t in_features, int isa,
            int threads) {
  check_rows(x, y, type, tokens, out_features);
  check_number("the type of the weight", weight_type, 0, static_cast<int>(WeightType::codebook));
  check_side("in_features", in_features);
  check_side("the outputs of a scale", block_out);
  check_side("the inputs of a scale", block_in);
  check_address("the weight", in<void>(weight), out_features > 0 && in_features > 0);
  check_address("the scales of the weight", in<void>(scales), weight_type >= static_cast<int>(WeightType::e4m3));
  check_address("the rows with NaN", in<void>(row_nan), weight_type == static_cast<int>(WeightType::e4m3));
  check_address("the codebook", in<void>(table), weight_type == static_cast<int>(WeightType::codebook));
  FloatLinear problem;
  problem.x = in<void>(x);
  problem.type = static_cast<FloatType>(type);
  problem.weight = in<void>(weight);
  problem.weight_type = static_cast<WeightType>(weight_type);
  problem.scales = in<float>(scales);
  problem.block_out = block_out;
  problem.block_in = block_in;
  problem.row_nan = in<float>(row_nan);
  problem.table = in<float>(table);
  problem.bias = in<void>(bias);
  problem.y = out(y);
  problem.tokens = tokens;
  problem.out_features = out_features;
  problem.in_features = in_features;
  float_linear(problem, static_cast<Isa>(isa), threads);
}

void rms_norm_(std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t y, std::uintptr_t sum,
               int type, std::int64_t rows, std::int64_t size, float epsilon, int isa, int threads) {
  check_rows(x, y, type, rows, size);
  check_address("the sum", in<void>(sum), residual != 0);
  rms_norm(in<void>(x), in<void>(residual), in<void>(weight), out(y), out(sum), static_cast<FloatType>(type), rows,
           size, epsilon, static_cast<Isa>(isa), threads);
}

void silu_and_mul_(std::uintptr_t x, std::uintptr_t y, int type, std::int64_t rows, std::int64_t size, int isa,
                   int threads) {
  check_rows(x, y, type, rows, size);
  silu_and_mul(in<void>(x), out(y), static_cast<FloatType>(type), rows, size, static_cast<Isa>(isa), threads);
}

void rotate_(std::uintptr_t x, std::uintptr_t y, std::uintptr_t cos, std::uintptr_t sin, int type,
             std::int64_t tokens, std::int64_t heads, std::int64_t head_size, std::int64_t rotary_size,
             std::int64_t token_stride, int isa, int threads) {
  check_rows(x, y, type, tokens, heads * head_size);
  check_number("the size that is rotated", rotary_size, 0, head_size);
  check_address("cosines and sines", cos == 0 ? nullptr : in<void>(sin), tokens > 0 && rotary_size > 0);
  rotate(in<void>(x), out(y), in<float>(cos), in<float>(sin), static_cast<FloatType>(type), tokens, heads, head_size,
         rotary_size, token_stride, static_cast<Isa>(isa), threads);
}

void widen_(std::uintptr_t x, std::uintptr_t y, int type, std::int64_t count, int isa, int threads) {
  check_rows(x, y, type, count, 1);
  widen(in<void>(x), static_cast<float *>(out(y)), static_cast<FloatType>(type), count, static_cast<Isa>(isa), threads);
}

void copy_rows_(std::uintptr_t table, std::int64_t rows, std::int64_t row_bytes, std::uintptr_t ids,
                std::int64_t count, std::uintptr_t y) {
  const auto *first = in<std::int64_t>(ids);
  check_rows(table, y, 0, count, row_bytes);
  check_address("the rows' numbers", first, count > 0);
  check_indices("a row is outside the table", first, count, -rows, rows);
  copy_rows(in<void>(table), rows, row_bytes, first, count, out(y));
}

void pointwise_(int operation, std::uintptr_t x, std::uintptr_t y, std::uintptr_t to, int type, Sides sizes,
                Sides x_strides, Sides y_strides, Sides out_strides, int threads) {
  pointwise({static_cast<Pointwise>(operation), in<void>(x), in<void>(y), out(to), static_cast<FloatType>(type), sizes,
             x_strides, y_strides, out_strides},
            threads);
}

} // namespace

void register_float(nb::module_ &m) {
  const auto released = nb::call_guard<Released>();
  m.def("float_linear", &Recorded<&linear>::call, released, "See kernels/float_linear.h.");
  m.def("rms_norm", &Recorded<&rms_norm_>::call, released, "See kernels/elementwise.h.");
  m.def("silu_and_mul", &Recorded<&silu_and_mul_>::call, released, "See kernels/elementwise.h.");
  m.def("rotate", &Recorded<&rotate_>::call, released, "See kernels/elementwise.h.");
  m.def("widen", &Recorded<&widen_>::call, released, "See kernels/elementwise.h.");
  m.def("copy_rows", &Recorded<&copy_rows_>::call, released, "See kernels/elementwise.h.");
  m.def("pointwise", &Recorded<&pointwise_>::call, released, "See kernels/pointwise.h.");
}

} // namespace pymllm
