// The integer linear on an ARM processor, every path that it can run: against float64, against sums in int64, and one
// path against another.
//
// T tokens, O outputs, I inputs, G group of a block
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../../../kernels/integer.h"
#include "../../../kernels/integer_block.h"
#include "../../../kernels/integer_experts.h"
#include "paths.h"

using namespace pymllm;
using namespace pymllm::integer;

namespace {

using Bytes = std::vector<std::uint8_t>;

// Codebooks whose values are small, and those that exceed 127; their zero points.
constexpr std::uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr std::uint8_t kIq4[16] = {0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240};
constexpr std::int64_t kE2m1Zero = 12, kIq4Zero = 127;

struct Case {
  int bits;  // 0: codes of kE2m1; 1: of kIq4
  Scales scales;
  Zeros zeros;
  std::int64_t outputs, inputs, group;  // a last group may be filled up
  std::int64_t stored_group;
  bool factors;

  const std::uint8_t *table() const { return bits == 0 ? kE2m1 : bits == 1 ? kIq4 : nullptr; }

  std::string name() const {
    const auto number = [](auto value) { return std::to_string(static_cast<long>(value)); };
    return "bits " + number(bits) + " scales " + number(scales) + " zeros " + number(zeros) + " O " + number(outputs) +
           " I " + number(inputs) + " G " + number(group) + " of " + number(stored_group) + (factors ? " factors" : "");
  }
};

// What a checkpoint would store, and the same packed. `exact`: scales are 1/2 or 1, offsets small integers, so that
// every path's float32 sums are exact.
struct Layer {
  Case c;
  Bytes codes, scale_bytes, zero_bytes, blocks;
  std::vector<float> factors;
  std::vector<double> values;      // [O, I], out of what is stored
  std::vector<double> magnitudes;  // [O, I], of their parts
  Weights weights{};

  Layer(const Case &shape, bool exact) : c(shape) {
    const bool nibbles = c.bits <= 4;
    const std::int64_t top = c.table() != nullptr ? 15 : (1 << c.bits) - 1;
    const std::int64_t zero = c.bits == 0 ? kE2m1Zero : c.bits == 1 ? kIq4Zero : (top + 1) / 2;
    const std::int64_t filled = (c.inputs + c.group - 1) / c.group * c.group;
    weights = {nullptr, c.outputs, filled, c.group,
               {nibbles ? Codes::nibbles : Codes::bytes, c.scales, c.zeros, static_cast<std::int32_t>(zero),
                c.table(), !nibbles || c.bits == 1},
               nullptr};
    const int extreme = static_cast<int>(between(0, 3));  // 0: all codes 0, 1: all the largest
    for (std::int64_t i = 0; i < c.outputs * c.inputs; ++i)
      codes.push_back(static_cast<std::uint8_t>(extreme == 0 ? 0 : extreme == 1 ? top : between(0, top)));
    for (std::int64_t i = 0; i < c.outputs * stored_groups(); ++i) {
      add_scale(exact);
      if (c.zeros == Zeros::each) zero_bytes.push_back(static_cast<std::uint8_t>(between(0, top)));
      if (c.zeros == Zeros::offsets)
        append(zero_bytes, exact ? static_cast<float>(between(-3, 3)) : static_cast<float>(between(-99, 99)) / 997);
    }
    if (c.factors)
      for (std::int64_t i = 0; i < c.outputs; ++i) factors.push_back(exact ? 0.25f : static_cast<float>(i + 1) / 7);
    weights.row_factors = c.factors ? factors.data() : nullptr;
    blocks.resize(static_cast<std::size_t>(weights.row_blocks() * weights.groups() * weights.block_bytes()));
    pack(weights, stored(codes, scale_bytes, zero_bytes), blocks.data(), 1);
    weights.blocks = blocks.data();
    for (std::int64_t o = 0; o < c.outputs; ++o)
      for (std::int64_t i = 0; i < c.inputs; ++i) add_value(o, i);
  }

  Stored stored(Bytes &some_codes, Bytes &some_scales, Bytes &some_zeros) const {
    return {some_codes.data(), some_scales.data(), some_zeros.empty() ? nullptr : some_zeros.data(), c.inputs,
            c.stored_group};
  }

  std::int64_t stored_groups() const { return (c.inputs + c.stored_group - 1) / c.stored_group; }

  double value(std::int64_t o, std::int64_t i) const { return values[static_cast<std::size_t>(o * c.inputs + i)]; }

  // (value - zero) * scale of output o and input i, and the offset.
  std::pair<double, double> parts(std::int64_t o, std::int64_t i) const {
    const std::int64_t at = o * stored_groups() + i / c.stored_group;
    const std::uint8_t code = codes[static_cast<std::size_t>(o * c.inputs + i)];
    double zero = weights.format.zero;
    float offset = 0;
    if (c.zeros == Zeros::each) zero = zero_bytes[static_cast<std::size_t>(at)];
    if (c.zeros == Zeros::offsets) {
      zero = 0;
      std::memcpy(&offset, zero_bytes.data() + 4 * at, 4);
    }
    return {((c.table() != nullptr ? c.table()[code] : code) - zero) * read_scale(c.scales, scale_bytes.data(), at), offset};
  }

private:
  template <class T> static void append(Bytes &bytes, T value) {
    const auto *first = reinterpret_cast<const std::uint8_t *>(&value);
    bytes.insert(bytes.end(), first, first + sizeof value);
  }

  void add_scale(bool exact) {
    const float scale = exact ? (between(0, 1) != 0 ? 1.0f : 0.5f) : static_cast<float>(between(1, 999)) / 8191;
    switch (c.scales) {
    case Scales::f16: return append(scale_bytes, to_f16(scale));
    case Scales::bf16: return append(scale_bytes, to_bf16(scale));
    case Scales::f32: return append(scale_bytes, scale);
    case Scales::e4m3:
      return append(scale_bytes, static_cast<std::uint8_t>(exact ? scale < 1 ? 0x30 : 0x38 : between(1, 0x7e)));
    default: return append(scale_bytes, static_cast<std::uint8_t>(exact ? scale < 1 ? 126 : 127 : between(110, 130)));
    }
  }

  void add_value(std::int64_t o, std::int64_t i) {
    const auto [scaled, offset] = parts(o, i);
    const double factor = c.factors ? factors[static_cast<std::size_t>(o)] : 1;
    values.push_back((scaled + offset) * factor);
    magnitudes.push_back((std::fabs(scaled) + std::fabs(offset)) * std::fabs(factor));
  }
};

Bytes stored_as(FloatType dtype, const std::vector<float> &values) {
  Bytes bytes(values.size() * static_cast<std::size_t>(bytes_of(dtype)) + 1);
  for (std::size_t i = 0; i < values.size(); ++i)
    write_float(values[i], bytes.data(), dtype, static_cast<std::int64_t>(i));
  return bytes;
}

struct Quantised {  // activations, and memory for them
  Bytes memory;
  Activations x;
  Quantised(const Weights &weights, std::int64_t rows, int slices)
      : memory(activation_bytes(weights, rows) + 64), x(activations_in(memory.data(), weights, rows, slices)) {}
};

// Products of any int8 codes: every path gives the same bits, and those that sums in int64 give.
void check_products(const Layer &layer, std::int64_t tokens, int slices, FloatType dtype) {
  const Weights &w = layer.weights;
  const std::int64_t rows = tokens * slices;
  Quantised codes(w, rows, slices);
  const int extreme = static_cast<int>(between(0, 5));
  for (std::int64_t g = 0; g < w.groups(); ++g)
    for (std::int64_t row = 0; row < rows; ++row) {
      std::int32_t sum = 0;
      for (std::int64_t k = 0; k < w.group; ++k) {
        std::int64_t code = extreme == 0 ? -128 : extreme == 1 ? 127 : extreme == 2 ? 0 : between(-128, 127);
        if (g * w.group + k >= layer.c.inputs) code = 0;
        codes.x.codes[(g * rows + row) * w.group + k] = static_cast<std::int8_t>(code);
        sum += static_cast<std::int32_t>(code);
      }
      codes.x.scales[g * rows + row] = 1.0f;
      codes.x.negative_sums[g * rows + row] = -sum;
    }
  std::vector<float> biases;
  for (std::int64_t o = 0; o < w.out_features; ++o) biases.push_back(static_cast<float>(between(-9, 9)));
  const Bytes bias = stored_as(dtype, biases);
  const auto name = [&] {
    return layer.c.name() + " T " + std::to_string(tokens) + " slices " + std::to_string(slices);
  };
  const std::size_t bytes = static_cast<std::size_t>(tokens * w.out_features * bytes_of(dtype));
  Bytes first;
  for (const Isa path : g_paths) {
    const Kernels &kernels = kernels_of(path);
    Bytes y(bytes + 1, 0xee);  // one more than may be written
    std::vector<float> scratch(kernels.scratch_bytes(w, rows, w.row_blocks()) / sizeof(float) + 1);
    kernels.multiply(w, codes.x, {dtype, tokens, nullptr, bias.data(), y.data()}, 0, w.row_blocks(), scratch.data());
    if (path == g_paths[0]) first = y;
    expect(y == first && y.back() == 0xee, [&] { return "bits: " + name(); });
    if (dtype != FloatType::f32 || slices > 1) continue;
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t o = 0; o < w.out_features; ++o) {
        double sum = biases[static_cast<std::size_t>(o)];
        for (std::int64_t i = 0; i < layer.c.inputs; ++i)
          sum += layer.value(o, i) * codes.x.codes[(i / w.group * rows + t) * w.group + i % w.group];
        expect(read_float(y.data(), dtype, t * w.out_features + o) == sum, [&] { return "integers: " + name(); });
      }
  }
}

// x: [T, I] with groups of zeros, of tiny and of large values, and, where `strange`, infinities and NaN.
std::vector<float> activations(const Layer &layer, std::int64_t tokens, bool strange) {
  const std::int64_t filled = layer.weights.in_features;
  std::vector<float> x;
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t i = 0; i < filled; ++i) {
      const std::int64_t kind = (t + i / layer.c.group) % 7;
      float value = normal() * (kind == 0 ? 0.0f : kind == 1 ? 0x1p-120f : kind == 2 ? 900.0f : 1.0f);
      if (strange && t % 3 == 1 && i % 50 == 3) value = i % 100 == 3 ? NAN : t % 2 == 0 ? INFINITY : -INFINITY;
      x.push_back(i < layer.c.inputs ? value : 0.0f);
    }
  return x;
}

// Codes, scales and sums of activations, also as checkpoints demand them: every path gives the same bits.
void check_codes(const Layer &layer, std::int64_t tokens, FloatType dtype, bool strange) {
  const Weights &w = layer.weights;
  const Bytes x = stored_as(dtype, activations(layer, tokens, strange));
  const Floats floats{dtype, tokens, x.data(), nullptr, nullptr};
  for (const int slices : {1, 2, 3}) {
    Bytes first;
    for (const Isa path : g_paths) {
      Quantised found(w, tokens * slices, slices);
      kernels_of(path).quantise(floats, w, found.x, 0, w.groups());
      if (path == g_paths[0]) first = found.memory;
      expect(found.memory == first, [&] { return "codes: " + layer.c.name() + " slices " + std::to_string(slices); });
    }
  }
  for (const Demand demand : {Demand::token, Demand::tensor, Demand::group, Demand::stored}) {
    Bytes first;
    for (const Isa path : g_paths) {
      const Kernels &kernels = kernels_of(path);
      Quantised found(w, tokens, 1);
      const float scale = demand == Demand::tensor ? kernels.demanded_tensor_scale(floats, w) : 0.03125f;
      kernels.quantise_as_demanded(floats, w, {1, demand, w.group, scale}, found.x, 0, tokens);
      if (path == g_paths[0]) first = found.memory;
      expect(found.memory == first, [&] { return "codes demanded: " + layer.c.name(); });
    }
  }
}

// The whole layer against float64, within the bounds that follow from its roundings (tests/kernels/integer_cases.py).
void check_linear(const Layer &layer, std::int64_t tokens, int slices) {
  const Weights &w = layer.weights;
  const std::vector<float> x = activations(layer, tokens, false);
  const double half_code = slices == 1 ? 0.5 / 127 : 0.5 / 63.5 / std::pow(254, slices - 1);
  const double rounding = static_cast<double>(w.groups() + 8) * 0x1p-24;
  std::vector<double> sums, bounds;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<double> largest(static_cast<std::size_t>(w.groups()));
    for (std::int64_t i = 0; i < layer.c.inputs; ++i) {
      double &most = largest[static_cast<std::size_t>(i / w.group)];
      most = std::fmax(most, std::fabs(x[static_cast<std::size_t>(t * w.in_features + i)]));
    }
    for (std::int64_t o = 0; o < w.out_features; ++o) {
      double sum = 0, bound = 0;
      for (std::int64_t i = 0; i < layer.c.inputs; ++i) {
        const double most = largest[static_cast<std::size_t>(i / w.group)];
        sum += x[static_cast<std::size_t>(t * w.in_features + i)] * layer.value(o, i);
        bound += layer.magnitudes[static_cast<std::size_t>(o * layer.c.inputs + i)] *
                 (most < 0x1p-100 ? most : most * (1.001 * half_code + rounding));  // tiny ones count as zero
      }
      sums.push_back(sum), bounds.push_back(bound);
    }
  }
  for (const Isa path : g_paths) {
    std::vector<float> y(sums.size() + 1, -7.0f);
    linear(w, {FloatType::f32, tokens, x.data(), nullptr, y.data()}, {slices}, 1, path);
    for (std::size_t i = 0; i < sums.size(); ++i)
      expect(std::fabs(y[i] - sums[i]) <= bounds[i] + 0x1p-126, [&] {
        return "float64: " + layer.c.name() + " T " + std::to_string(tokens) + " slices " + std::to_string(slices) +
               ", " + std::to_string(y[i]) + " for " + std::to_string(sums[i]);
      });
    expect(y.back() == -7.0f, [&] { return "writes past the end: " + layer.c.name(); });
  }
}

// Unpacking gives back what was stored; a row of a table is value * scale + offset, rounded after each.
void check_rows(const Layer &layer) {
  Bytes codes(layer.codes.size()), scales(layer.scale_bytes.size()), zeros(layer.zero_bytes.size());
  unpack(layer.weights, layer.stored(codes, scales, zeros), 1);
  expect(codes == layer.codes && scales == layer.scale_bytes && zeros == layer.zero_bytes,
         [&] { return "unpacked: " + layer.c.name(); });
  if (layer.c.factors) return;
  const std::int64_t id = layer.c.outputs - 1;
  std::vector<float> row(static_cast<std::size_t>(layer.c.inputs));
  gather(layer.weights, layer.c.inputs, &id, 1, FloatType::f32, row.data(), 1);
  for (std::int64_t i = 0; i < layer.c.inputs; ++i) {
    const auto [scaled, offset] = layer.parts(id, i);
    const auto product = static_cast<float>(scaled);
    expect(row[static_cast<std::size_t>(i)] == static_cast<float>(static_cast<double>(product) + offset),
           [&] { return "row: " + layer.c.name(); });
  }
}

// Layers of one shape, one an expert, as one product.
struct Stack {
  std::vector<Layer> layers;
  Bytes blocks;
  Product product{};

  Stack(const Case &c, std::int64_t count) {
    for (std::int64_t e = 0; e < count; ++e) {
      layers.emplace_back(c, false);
      blocks.insert(blocks.end(), layers.back().blocks.begin(), layers.back().blocks.end());
    }
    product.first = layers[0].weights;
    product.first.blocks = blocks.data();
  }
  const Layer &of(std::int64_t expert) const { return layers[static_cast<std::size_t>(expert)]; }
};

// silu between two products in three slices: what is left is float32's error.
void check_experts(int bits, std::int64_t tokens, std::int64_t top_k) {
  const std::int64_t count = 3, hidden = 96, intermediate = 64;
  const Stack gate_up({bits, Scales::f16, Zeros::each, 2 * intermediate, hidden, 32, 32, false}, count);
  const Stack down({bits, Scales::f16, Zeros::each, hidden, intermediate, 32, 32, false}, count);
  std::vector<std::int64_t> ids;
  std::vector<float> shares, x;
  for (std::int64_t i = 0; i < tokens * top_k; ++i) {
    ids.push_back(between(-1, count - 1));  // below 0: none
    shares.push_back(static_cast<float>(between(1, 9)) / 8);
  }
  for (std::int64_t i = 0; i < tokens * hidden; ++i) x.push_back(normal());
  std::vector<double> sums(static_cast<std::size_t>(tokens * hidden)), parts(sums.size());
  for (std::int64_t slot = 0; slot < tokens * top_k; ++slot) {
    const std::int64_t expert = ids[static_cast<std::size_t>(slot)], token = slot / top_k;
    if (expert < 0) continue;
    const auto dot = [&](std::int64_t o) {
      double sum = 0;
      for (std::int64_t i = 0; i < hidden; ++i)
        sum += gate_up.of(expert).value(o, i) * x[static_cast<std::size_t>(token * hidden + i)];
      return sum;
    };
    for (std::int64_t i = 0; i < intermediate; ++i) {
      const double gate = dot(i), between_both = gate / (1 + std::exp(-gate)) * dot(intermediate + i);
      for (std::int64_t o = 0; o < hidden; ++o) {
        const double part = down.of(expert).value(o, i) * between_both * shares[static_cast<std::size_t>(slot)];
        sums[static_cast<std::size_t>(token * hidden + o)] += part;
        parts[static_cast<std::size_t>(token * hidden + o)] += std::fabs(part);
      }
    }
  }
  for (const Isa path : g_paths) {
    std::vector<float> y(sums.size());
    experts({gate_up.product, down.product, count, {Gate::silu, 0, 0}}, {ids.data(), shares.data(), tokens, top_k},
            FloatType::f32, x.data(), y.data(), {tokens * top_k, 3}, 1, path);
    for (std::size_t i = 0; i < sums.size(); ++i)
      expect(std::fabs(y[i] - sums[i]) <= 1e-5 * parts[i] + 1e-5, [&] {
        return "experts, bits " + std::to_string(bits) + " T " + std::to_string(tokens) + ", " + std::to_string(y[i]) +
               " for " + std::to_string(sums[i]);
      });
  }
}

void check(const Case &c) {
  const Layer exact(c, true), layer(c, false);
  for (const FloatType dtype : {FloatType::f32, FloatType::f16, FloatType::bf16}) {
    for (const int slices : {1, 2, 3}) check_products(exact, between(0, 9), slices, dtype);
    check_codes(layer, between(1, 7), dtype, false);
    check_codes(layer, between(2, 7), dtype, true);
  }
  for (const int slices : {1, 2, 3}) check_linear(layer, between(0, 6), slices);
  check_rows(layer);
}

void check_all() {
  if (g_paths.size() > 1)
    expect(&kernels_of(g_paths[0]) != &kPortable, [] { return std::string("the path is not compiled in"); });
  for (int bits = 0; bits <= 8; ++bits) {
    for (const Zeros zeros : {Zeros::same, Zeros::each, Zeros::offsets})
      for (const std::int64_t group : {16, 32, 64, 128}) {
        const auto scales = static_cast<Scales>(between(0, bits <= 1 ? 4 : 2));
        const std::int64_t outputs = between(1, 50), inputs = group * between(1, 256 / group);
        check({bits, scales, zeros, outputs, inputs, group, group, false});
        const std::int64_t odd = between(1, 256);  // one group, the whole row, of any length
        check({bits, scales, zeros, outputs, odd, group, (odd + group - 1) / group * group, true});
      }
  }
  for (const Zeros zeros : {Zeros::same, Zeros::offsets})
    for (int scales = 0; scales < 5; ++scales) check({0, static_cast<Scales>(scales), zeros, 33, 96, 32, 32, false});
  for (const int bits : {4, 8}) {  // every number of tokens
    const Layer exact({bits, Scales::f16, Zeros::each, 37, 192, 64, 64, false}, true);
    const Layer layer({bits, Scales::f16, Zeros::each, 19, 192, 64, 64, false}, false);
    for (std::int64_t tokens = 0; tokens <= 33; ++tokens) {
      check_products(exact, tokens, 1, FloatType::f32);
      for (const int slices : {1, 2, 3}) check_linear(layer, tokens, slices);
    }
  }
  for (const int bits : {0, 1, 4, 8})
    for (const std::int64_t tokens : {1, 2, 9}) check_experts(bits, tokens, 2);
  check_linear(Layer({4, Scales::bf16, Zeros::each, 50, 1024, 128, 128, false}, false), 70, 3);  // in two parts
}

} // namespace

int main(int count, char **arguments) { return run_checks("integer", count, arguments, check_all); }
