// The float linear, attention, the KV store, sampling and the small operations on an ARM processor, every path that it can run,
// against float64. The loops are those of every processor, tested more widely in Python; here it is the vectors below.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../../../kernels/attention.h"
#include "../../../kernels/elementwise.h"
#include "../../../kernels/float_linear.h"
#include "../../../kernels/float_scalar.h"
#include "../../../kernels/sampling.h"
#include "paths.h"

using namespace pymllm;

namespace {

using Bytes = std::vector<std::uint8_t>;
using Doubles = std::vector<double>;

constexpr FloatType kTypes[] = {FloatType::f32, FloatType::bf16, FloatType::f16};

double unit(FloatType type) { return type == FloatType::f32 ? 0x1p-24 : type == FloatType::bf16 ? 0x1p-8 : 0x1p-11; }

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// A tensor, and what its elements are as float64.
struct Tensor {
  FloatType type;
  Bytes bytes;
  Doubles values;

  Tensor(FloatType type, std::int64_t count) : type(type), bytes(index(count * (type == FloatType::f32 ? 4 : 2) + 1)) {}

  static Tensor random(FloatType type, std::int64_t count, float scale = 1.0f) {
    Tensor tensor(type, count);
    for (std::int64_t i = 0; i < count; ++i) tensor.set(i, normal() * scale);
    tensor.read(count);
    return tensor;
  }
  void set(std::int64_t i, float value) {
    const std::uint16_t half = type == FloatType::bf16 ? to_bf16(value) : to_f16(value);
    if (type == FloatType::f32) std::memcpy(bytes.data() + 4 * i, &value, 4);
    else std::memcpy(bytes.data() + 2 * i, &half, 2);
  }
  double at(std::int64_t i) const { return read_float(bytes.data(), type, i); }
  void read(std::int64_t count) {
    values.clear();
    for (std::int64_t i = 0; i < count; ++i) values.push_back(at(i));
  }
  void *data() { return bytes.data(); }
};

template <class Name> void expect_near(double found, double expected, double bound, const Name &name) {
  expect(std::fabs(found - expected) <= bound, [&] {
    return name() + ": " + std::to_string(found) + " for " + std::to_string(expected);
  });
}

// float8_e4m3fn by its definition.
double e4m3(std::uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 128 ? -magnitude : magnitude;
}

std::uint8_t random_e4m3() {
  const auto code = static_cast<std::uint8_t>(between(0, 255));
  return (code & 127) == 127 ? 0 : code;  // 127 is NaN
}

// ------------------------------------------------------------------------------------------------------ float linear

struct Linear {
  WeightType kind;
  std::int64_t outputs, inputs, block_out, block_in;
  Bytes weight;
  std::vector<float> table, scales;
  Doubles values;  // [O, I]

  Linear(WeightType kind, std::int64_t outputs, std::int64_t inputs, std::int64_t block_out, std::int64_t block_in)
      : kind(kind), outputs(outputs), inputs(inputs), block_out(block_out), block_in(block_in) {
    const std::int64_t rows = block_out > 0 ? block_out : outputs, columns = block_in > 0 ? block_in : inputs;
    const std::int64_t across = (inputs + columns - 1) / columns;
    if (kind == WeightType::e4m3 || kind == WeightType::codebook)
      for (std::int64_t i = 0; i < (outputs + rows - 1) / rows * across; ++i)
        scales.push_back(std::fabs(normal()) + 0.1f);
    if (kind == WeightType::codebook)
      for (int i = 0; i < 16; ++i) table.push_back(normal());
    for (std::int64_t o = 0; o < outputs; ++o)
      for (std::int64_t i = 0; i < inputs; ++i) {
        const double scale = scales.empty() ? 1.0 : scales[index(o / rows * across + i / columns)];
        values.push_back(add_weight(i) * scale);
      }
  }

  double add_weight(std::int64_t i) {
    if (kind == WeightType::e4m3) return weight.push_back(random_e4m3()), e4m3(weight.back());
    if (kind == WeightType::codebook) {
      const auto code = static_cast<std::uint8_t>(between(0, 15));
      if (i % 2 == 0) weight.push_back(code);
      else weight.back() = static_cast<std::uint8_t>(weight.back() | code << 4);
      return table[code];
    }
    const float value = normal() * (i % 9 == 0 ? 1e-6f : 1.0f);  // in float16 subnormal
    const std::uint16_t half = kind == WeightType::bf16 ? to_bf16(value) : to_f16(value);
    weight.push_back(static_cast<std::uint8_t>(half & 255));
    weight.push_back(static_cast<std::uint8_t>(half >> 8));
    return kind == WeightType::bf16 ? from_bf16(half) : from_f16(half);
  }
};

void check_float_linear(const Linear &w, std::int64_t tokens, FloatType type) {
  const std::int64_t count = tokens * w.outputs;
  Tensor x = Tensor::random(type, tokens * w.inputs), bias = Tensor::random(type, w.outputs);
  Tensor y(type, count), one(type, w.outputs);
  FloatLinear problem{x.data(), type, w.weight.data(), w.kind};
  problem.scales = w.scales.empty() ? nullptr : w.scales.data();
  problem.block_out = w.block_out, problem.block_in = w.block_in;
  problem.table = w.table.empty() ? nullptr : w.table.data();
  problem.bias = bias.data(), problem.y = y.data();
  problem.tokens = tokens, problem.out_features = w.outputs, problem.in_features = w.inputs;
  const auto name = [&] {
    return "float linear " + std::to_string(static_cast<int>(w.kind)) + " O " + std::to_string(w.outputs) + " I " +
           std::to_string(w.inputs) + " block " + std::to_string(w.block_in) + " T " + std::to_string(tokens);
  };
  for (const Isa path : g_paths) {
    float_linear(problem, path, 1);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t o = 0; o < w.outputs; ++o) {
        double sum = bias.values[index(o)], parts = std::fabs(sum);
        for (std::int64_t i = 0; i < w.inputs; ++i) {
          const double product = x.values[index(t * w.inputs + i)] * w.values[index(o * w.inputs + i)];
          sum += product, parts += std::fabs(product);
        }
        const double rounding = static_cast<double>(w.inputs / 2 + 16) * 0x1p-24 * parts;
        expect_near(y.at(t * w.outputs + o), sum, rounding + unit(type) * std::fabs(sum) + 0x1p-24, name);
      }
    if (tokens == 0) continue;
    FloatLinear last = problem;  // a token's result does not depend on those beside it
    const std::int64_t element = type == FloatType::f32 ? 4 : 2, from = (count - w.outputs) * element;
    last.x = x.bytes.data() + (tokens - 1) * w.inputs * element;
    last.tokens = 1, last.y = one.data();
    float_linear(last, path, 1);
    expect(std::memcmp(one.data(), y.bytes.data() + from, index(w.outputs * element)) == 0,
           [&] { return "alone: " + name(); });
  }
}

void check_float_linears() {
  for (const WeightType kind : {WeightType::bf16, WeightType::f16, WeightType::e4m3, WeightType::codebook}) {
    const bool scaled = kind == WeightType::e4m3 || kind == WeightType::codebook;
    for (const FloatType type : kTypes)
      for (const std::int64_t inputs : {2, 30, 64, 202}) {
        const Linear linear(kind, between(1, 40), inputs, scaled ? between(0, 3) : 0, scaled && inputs > 64 ? 64 : 0);
        for (const std::int64_t tokens : {0, 1, 2, 3, 4, 5, 6, 9}) check_float_linear(linear, tokens, type);
      }
    const Linear linear(kind, 37, 136, scaled ? 1 : 0, 0);
    for (std::int64_t tokens = 10; tokens <= 33; ++tokens) check_float_linear(linear, tokens, FloatType::f32);
    check_float_linear(linear, 99, FloatType::f32);                                    // two panels
    check_float_linear(Linear(kind, 5, 1100, scaled ? 2 : 0, scaled ? 128 : 0), 35, FloatType::f32); // two chunks
  }
}

// --------------------------------------------------------------------------------------------------- small operations

double silu(double v) { return v / (1 + std::exp(-v)); }

void check_small_operations(FloatType type, std::int64_t rows, std::int64_t size) {
  const double half = unit(type);
  const auto name = [&] { return "type " + std::to_string(static_cast<int>(type)) + " size " + std::to_string(size); };
  for (const Isa path : g_paths) {
    Tensor x = Tensor::random(type, rows * size, 3), residual = Tensor::random(type, rows * size);
    Tensor weight = Tensor::random(type, size), y(type, rows * size), sum(type, rows * size);
    rms_norm(x.data(), residual.data(), weight.data(), y.data(), sum.data(), type, rows, size, 1e-5f, path, 1);
    sum.read(rows * size);
    for (std::int64_t row = 0; row < rows; ++row) {
      double squares = 0;
      for (std::int64_t i = row * size; i < (row + 1) * size; ++i) {
        const double exact = x.values[index(i)] + residual.values[index(i)];
        expect_near(sum.values[index(i)], exact, half * std::fabs(exact), [&] { return "residual " + name(); });
        squares += sum.values[index(i)] * sum.values[index(i)];
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(size) + 1e-5);
      for (std::int64_t i = 0; i < size; ++i) {
        const double expected = sum.values[index(row * size + i)] * scale * weight.values[index(i)];
        expect_near(y.at(row * size + i), expected, (2.1 * half + 2e-6) * std::fabs(expected) + 0x1p-24,
                    [&] { return "norm " + name(); });
      }
    }

    Tensor both = Tensor::random(type, rows * 2 * size, 4);
    silu_and_mul(both.data(), y.data(), type, rows, size, path, 1);
    for (std::int64_t i = 0; i < rows * size; ++i) {
      const std::int64_t at = i / size * 2 * size + i % size;
      const double up = both.values[index(at + size)], expected = silu(both.values[index(at)]) * up;
      expect_near(y.at(i), expected, (2.1 * half + 1e-6) * std::fabs(expected) + 0x1p-24 * (1 + std::fabs(up)),
                  [&] { return "silu " + name(); });
    }

    const std::int64_t head = size, rotary = size / 4 * 2, tokens = rows, heads = 2;
    Tensor q = Tensor::random(type, tokens * heads * head), turned(type, tokens * heads * head);
    std::vector<float> cos, sin;
    for (std::int64_t i = 0; i < tokens * rotary / 2; ++i) {
      const float angle = 0.1f * static_cast<float>(i);
      cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
    }
    rotate(q.data(), turned.data(), cos.data(), sin.data(), type, tokens, heads, head, rotary, heads * head, path, 1);
    for (std::int64_t i = 0; i < tokens * heads * head; ++i) {
      const std::int64_t d = i % head, pair = d % (rotary > 0 ? rotary / 2 : 1), base = i - d;
      double expected = q.values[index(i)], bound = 0;
      if (d < rotary) {
        const double a = q.values[index(base + pair)], b = q.values[index(base + rotary / 2 + pair)];
        const std::size_t angle = index(i / (heads * head) * (rotary / 2) + pair);
        expected = d < rotary / 2 ? a * cos[angle] - b * sin[angle] : b * cos[angle] + a * sin[angle];
        bound = half * std::fabs(expected) + 0x1p-23 * (std::fabs(a) + std::fabs(b));
      }
      expect_near(turned.at(i), expected, bound, [&] { return "rotary " + name(); });
    }
  }
}

void check_gates(std::int64_t size) {
  std::vector<float> x, y(index(2 * size));
  for (std::int64_t i = 0; i < 4 * size; ++i) x.push_back(normal() * (i % 11 == 0 ? 60.0f : 3.0f));
  for (const Isa path : g_paths)
    for (const Gate &gate : {Gate{Gate::silu, 0, 0}, Gate{Gate::gelu_tanh, 0, 0}, Gate{Gate::swiglu, 1.702f, 7}}) {
      gate_and_multiply(x.data(), y.data(), gate, 2, size, path, 1);
      for (std::int64_t i = 0; i < 2 * size; ++i) {
        double g = x[index(i / size * 2 * size + i % size)], u = x[index(i / size * 2 * size + size + i % size)];
        double expected = silu(g) * u;
        if (gate.kind == Gate::gelu_tanh) {
          const double z = 0.7978845608 * (g + 0.044715 * g * g * g);
          expected = g * (z < 0 ? std::exp(2 * z) / (1 + std::exp(2 * z)) : 1 / (1 + std::exp(-2 * z))) * u;
        } else if (gate.kind == Gate::swiglu) {
          g = std::fmin(g, 7), u = std::fmax(std::fmin(u, 7), -7);
          expected = g / (1 + std::exp(-gate.alpha * g)) * (u + 1);
        }
        // The exponent of gelu's reaches far below 0, where its rounding is one of the result.
        expect_near(y[index(i)], expected, 1e-5 * std::fabs(expected) + 1e-6,
                    [&] { return "gate " + std::to_string(gate.kind) + " size " + std::to_string(size); });
      }
    }
}

// Who arrives first in a race, as pymllm/kernels/sampling.py has it.  begin: the index of the first weight.  near: is set
// where two arrive almost together.
std::int64_t winner(double number, std::uint64_t what, const Doubles &weights, std::int64_t begin, bool &near) {
  const auto mixed = [](std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  };
  const std::uint64_t state = mixed(static_cast<std::uint64_t>(std::ldexp(number, 53)) * 4 + what);
  std::vector<std::pair<double, std::int64_t>> arrivals;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto entrant = begin + static_cast<std::int64_t>(i);
    const std::uint64_t z = mixed(state + static_cast<std::uint64_t>(entrant + 1) * 0x9E3779B97F4A7C15u);
    const double u = std::ldexp(static_cast<double>(z >> 11) + 0.5, -53);
    if (weights[i] > 0) arrivals.emplace_back(-std::log(u) / weights[i], entrant);
  }
  std::sort(arrivals.begin(), arrivals.end());
  near |= arrivals.size() > 1 && arrivals[1].first < arrivals[0].first * (1 + 1e-4);
  return arrivals.at(0).second;
}

// Draws from all tokens and from those that top_p leaves, and log-probabilities, of logits of which some are masked.
void check_sampling(std::int64_t size) {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> logits;
  for (std::int64_t i = 0; i < size; ++i) logits.push_back(i % 5 == 3 ? -infinity : 4 * normal());
  const double most = *std::max_element(logits.begin(), logits.end());
  const std::int64_t starts[] = {0, 0};
  std::vector<float> bad = logits;
  bad[index(size - 1)] = std::nanf("");
  for (const Isa path : g_paths)
    for (const double top_p : {1.0, 0.7})
      for (const double number : {0.0, 0.31, 0.77, 0.999}) {
        const RowSettings settings{0.8, 0, top_p, 0, 1, 1, 0, 0, number};
        Doubles weights;
        double total = 0, left = 0;
        for (const float logit : logits) total += weights.emplace_back(std::exp((logit - most) / 0.8));
        Doubles sorted = weights;
        std::sort(sorted.begin(), sorted.end(), std::greater<double>());
        std::size_t count = 0;
        while (count < sorted.size() && left < top_p * total && sorted[count] > 0) left += sorted[count++];
        for (double &weight : weights)
          if (weight < sorted[count - 1]) weight = 0;
        Doubles sums;
        for (std::size_t i = 0; i < weights.size(); i += kPiece)
          sums.push_back(std::accumulate(weights.begin() + i, weights.begin() + std::min(weights.size(), i + kPiece), 0.0));
        bool near = false;
        const std::int64_t piece = winner(number, 1, sums, 0, near), begin = piece * kPiece;
        const Doubles within(weights.begin() + begin, weights.begin() + std::min<std::int64_t>(size, begin + kPiece));
        const std::int64_t token = winner(number, 2, within, begin, near);
        std::int64_t chosen = -2;
        SamplingBatch batch{logits.data(), 1, size, size, &settings, starts, nullptr, nullptr, starts, nullptr, nullptr};
        choose_tokens(batch, &chosen, nullptr, path, 1);
        const auto name = [&] { return "sampling, size " + std::to_string(size); };
        expect(chosen == token || near, name);
        batch.logits = bad.data();
        choose_tokens(batch, &chosen, nullptr, path, 1);
        expect(chosen == -1, name);
        float logprob = 0, best = 0;
        std::int64_t first = -1;
        log_probabilities(logits.data(), 1, size, size, &token, 1, &logprob, &first, &best, path, 1);
        double sum = 0;
        for (const float logit : logits) sum += std::exp(logit - most);
        expect_near(logprob, logits[index(token)] - most - std::log(sum), 2e-6, name);
        expect_near(best, -std::log(sum), 2e-6, name);
        expect(logits[index(first)] == static_cast<float>(most), name);
      }
}

// ---------------------------------------------------------------------------------------------------------- attention

struct Options {
  KVElement element;
  FloatType type;
  std::int64_t heads, kv_heads, key_size, value_size, page_size, window;
  bool sinks;
  float cap;
  float sharpness = 1.0f;
  std::int64_t block = 1;
};

// Rows of keys or values in every slot, and their values as float64.
struct Cache {
  KVRows rows;
  Bytes bytes;
  std::vector<float> scales;
  Doubles values;

  Cache(KVElement element, std::int64_t slots, std::int64_t heads, std::int64_t size) {
    if (element == KVElement::int8)
      for (std::int64_t i = 0; i < slots * heads; ++i)
        scales.push_back(0.01f + static_cast<float>(between(0, 9)) / 500);
    for (std::int64_t i = 0; i < slots * heads * size; ++i) add(element, i / size);
    rows = {bytes.data(), element, size, heads * size, scales.empty() ? nullptr : scales.data(), heads};
  }

  void add(KVElement element, std::int64_t row) {
    if (element == KVElement::int8) {
      bytes.push_back(static_cast<std::uint8_t>(between(0, 255)));
      values.push_back(static_cast<double>(static_cast<std::int8_t>(bytes.back())) * scales[index(row)]);
    } else if (element == KVElement::e4m3) {
      const auto code = static_cast<std::uint8_t>(random_e4m3() & 0xbf);  // below 2
      bytes.push_back(code), values.push_back(e4m3(code));
    } else {
      const Tensor one = Tensor::random(static_cast<FloatType>(element), 1);
      bytes.insert(bytes.end(), one.bytes.begin(), one.bytes.end() - 1), values.push_back(one.values[0]);
    }
  }
};

using Requests = std::vector<std::pair<std::int64_t, std::int64_t>>;  // tokens stored already, and new ones

void check_attention(const Options &o, const Requests &requests) {
  std::int64_t longest = 0;
  std::vector<std::int32_t> starts{0}, lengths, pages;
  for (const auto &[past, fresh] : requests) {
    starts.push_back(starts.back() + static_cast<std::int32_t>(fresh));
    lengths.push_back(static_cast<std::int32_t>(past + fresh));
    longest = std::max(longest, past + fresh);
  }
  const auto count = static_cast<std::int64_t>(requests.size());
  const std::int64_t columns = (longest + o.page_size - 1) / o.page_size;
  const std::int64_t tokens = starts.back(), group = o.heads / o.kv_heads;
  for (std::int64_t i = count * columns; i-- > 0;) pages.push_back(static_cast<std::int32_t>(i));
  const std::int64_t slots = count * columns * o.page_size;
  Cache k(o.element, slots, o.kv_heads, o.key_size), v(o.element, slots, o.kv_heads, o.value_size);
  Tensor q = Tensor::random(o.type, tokens * o.heads * o.key_size), y(o.type, tokens * o.heads * o.value_size);
  std::vector<float> sinks;
  for (std::int64_t i = 0; i < o.heads; ++i) sinks.push_back(normal());
  Attention problem{q.data(), y.data(), o.type, o.heads * o.key_size, k.rows, v.rows};
  problem.pages = pages.data(), problem.page_columns = columns, problem.page_size = o.page_size;
  problem.query_starts = starts.data(), problem.lengths = lengths.data();
  problem.requests = count, problem.heads = o.heads, problem.kv_heads = o.kv_heads;
  problem.scale = o.sharpness / std::sqrt(static_cast<float>(o.key_size));
  problem.block = o.block;
  problem.soft_cap = o.cap, problem.window = o.window, problem.sinks = o.sinks ? sinks.data() : nullptr;
  for (const Isa path : g_paths) {
    attention(problem, path, 1);
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t t = starts[index(r)]; t < starts[index(r + 1)]; ++t)
        for (std::int64_t head = 0; head < o.heads; ++head) {
          const std::int64_t position = requests[index(r)].first + t - starts[index(r)];
          const std::int64_t first = o.window > 0 ? std::max<std::int64_t>(0, position + 1 - o.window) : 0;
          std::int64_t end = position + 1;
          while (end % o.block != 0 && end < lengths[index(r)]) ++end;
          const auto row_of = [&](std::int64_t p) {
            const std::int64_t slot = pages[index(r * columns + p / o.page_size)] * o.page_size + p % o.page_size;
            return slot * o.kv_heads + head / group;
          };
          Doubles logits, result(index(o.value_size));
          double top = o.sinks ? sinks[index(head)] : -1e30;
          for (std::int64_t p = first; p < end; ++p) {
            double logit = 0;
            for (std::int64_t d = 0; d < o.key_size; ++d)
              logit += q.values[index((t * o.heads + head) * o.key_size + d)] *
                       k.values[index(row_of(p) * o.key_size + d)];
            logit *= problem.scale;
            logits.push_back(o.cap > 0 ? o.cap * std::tanh(logit / o.cap) : logit);
            top = std::fmax(top, logits.back());
          }
          double sum = o.sinks ? std::exp(sinks[index(head)] - top) : 0, most = 0;
          for (std::int64_t p = first; p < end; ++p) {
            const double weight = std::exp(logits[index(p - first)] - top);
            sum += weight;
            for (std::int64_t d = 0; d < o.value_size; ++d) {
              const double value = v.values[index(row_of(p) * o.value_size + d)];
              result[index(d)] += weight * value, most = std::fmax(most, std::fabs(value));
            }
          }
          for (std::int64_t d = 0; d < o.value_size; ++d) {
            const double expected = result[index(d)] / sum;
            const double bound = 5e-6 * o.sharpness * most + unit(o.type) * std::fabs(expected);
            expect_near(y.at((t * o.heads + head) * o.value_size + d), expected, bound, [&] {
              return "attention, element " + std::to_string(static_cast<int>(o.element)) + " request " +
                     std::to_string(r);
            });
          }
        }
  }
}

void check_attentions() {
  const Requests mixed{{0, 1}, {33, 1}, {7, 12}, {0, 5}, {70, 1}};
  for (const KVElement element : {KVElement::f32, KVElement::bf16, KVElement::f16, KVElement::int8, KVElement::e4m3}) {
    check_attention({element, FloatType::f32, 4, 2, 16, 16, 16, 0, false, 0}, mixed);
    check_attention({element, FloatType::bf16, 6, 1, 20, 7, 5, 9, true, 0}, mixed);
    check_attention({element, FloatType::f16, 3, 3, 33, 24, 8, 0, false, 2}, mixed);
  }
  check_attention({KVElement::f32, FloatType::f32, 2, 1, 8, 8, 16, 0, true, 0}, {{1100, 1}, {0, 40}});  // in pieces
  for (const std::int64_t block : {3, 4, 32})
    check_attention({KVElement::bf16, FloatType::f32, 4, 2, 8, 8, 5, block == 3 ? 7 : 0, false, 0, 1, block},
                    {{8, 4}, {1100, 4}, {33, 32}, {0, 45}});
  // Logits of several hundred, each rounded accordingly; float32's exp ends at 88.
  check_attention({KVElement::f32, FloatType::f32, 2, 2, 16, 8, 16, 0, false, 0, 200}, mixed);
}

void check_store(FloatType type, KVElement element) {
  const std::int64_t tokens = 5, heads = 3, size = 21, width = heads * size, slots = 9;
  const std::vector<std::int64_t> to{4, -1, 0, 8, 3};
  Tensor x = Tensor::random(type, tokens * width);
  for (const Isa path : g_paths) {
    Cache cache(element, slots, heads, size);
    const Bytes before = cache.bytes;
    store_kv(x.data(), type, width, cache.rows, to.data(), tokens, heads, path, 1);
    const auto name = [&] {
      return "store " + std::to_string(static_cast<int>(type)) + " as " + std::to_string(static_cast<int>(element));
    };
    const std::size_t row = before.size() / index(slots);
    for (const std::size_t slot : {1, 2, 5, 6, 7})
      expect(std::memcmp(before.data() + slot * row, cache.bytes.data() + slot * row, row) == 0, name);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t i = 0; to[index(t)] >= 0 && i < width; ++i) {
        const std::int64_t at = to[index(t)] * width + i;
        const double value = x.values[index(t * width + i)];
        if (element != KVElement::int8) {
          const double found = read_float(cache.bytes.data(), static_cast<FloatType>(element), at);
          expect_near(found, value, unit(static_cast<FloatType>(element)) * std::fabs(value) + 0x1p-25, name);
          continue;
        }
        double largest = 0;
        for (std::int64_t d = i / size * size; d < (i / size + 1) * size; ++d)
          largest = std::fmax(largest, std::fabs(x.values[index(t * width + d)]));
        const double scale = cache.scales[index(at / size)];
        expect_near(scale, largest / 127, 1e-7 * largest, name);
        expect_near(static_cast<std::int8_t>(cache.bytes[index(at)]) * scale, value, 0.5001 * scale, name);
      }
  }
}

void check_all() {
  check_float_linears();
  for (const FloatType type : kTypes)
    for (const std::int64_t size : {1, 4, 7, 32, 65, 300}) check_small_operations(type, 3, size);
  for (const std::int64_t size : {1, 4, 7, 130}) check_gates(size);
  for (const std::int64_t size : {1, 4, 63, 64, 65, 1000, 5003}) check_sampling(size);
  check_attentions();
  for (const FloatType type : kTypes)
    for (const KVElement element : {KVElement::f32, KVElement::bf16, KVElement::f16, KVElement::int8})
      check_store(type, element);
}

} // namespace

int main(int count, char **arguments) { return run_checks("float", count, arguments, check_all); }
