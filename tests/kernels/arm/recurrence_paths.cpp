// The gated delta rule, the scan of Mamba 2 and causal convolutions on an ARM processor, every path that it can run,
// against float64; and bit for bit however a prompt is cut. The loops are tested more widely in Python.
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "../../../kernels/float_scalar.h"
#include "../../../kernels/recurrence.h"
#include "paths.h"

using namespace pymllm;

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// A tensor of normal numbers with a row a token, and what they are as float64.
struct Rows {
  std::vector<std::uint8_t> bytes;
  TokenRows rows;
  std::int64_t width;

  Rows(FloatType type, std::int64_t tokens, std::int64_t width, float scale = 1.0f, float shift = 0.0f)
      : bytes(index(tokens * width * 4 + 1)), width(width) {
    rows = {bytes.data(), type, width};
    for (std::int64_t i = 0; i < tokens * width; ++i) write_float(normal() * scale + shift, bytes.data(), type, i);
  }
  double at(std::int64_t token, std::int64_t i) const { return read_float(rows.data, rows.type, token * width + i); }
  TokenRows from(std::int64_t token) const {
    return {static_cast<const std::uint8_t *>(rows.data) + token * width * bytes_of(rows.type), rows.type, rows.stride};
  }
};

void expect_near(double found, double expected, double bound, const std::string &name) {
  expect(std::fabs(found - expected) <= bound, [&] {
    return name + ": " + std::to_string(found) + " instead of " + std::to_string(expected);
  });
}

double half_unit(FloatType type) { return type == FloatType::f32 ? 0x1p-24 : type == FloatType::bf16 ? 0x1p-8 : 0x1p-11; }

// One fresh request of `tokens` tokens in slot 1 of 2, in steps of these sizes. run(first, requests, state, y)
using Run = std::function<void(std::int64_t, const Requests &, float *, std::uint8_t *)>;

void check(const std::string &name, FloatType type, std::int64_t tokens, std::int64_t width, std::int64_t state_floats,
           const Doubles &exact, const Doubles &exact_state, const Run &run) {
  std::vector<std::uint8_t> whole;
  Floats whole_state;
  for (const std::int64_t cut : {tokens, std::int64_t{1}, std::int64_t{5}}) {
    std::vector<std::uint8_t> y(index(tokens * width * bytes_of(type)));
    Floats state(index(2 * state_floats), 7.0f); // a fresh request does not see them
    for (std::int64_t first = 0; first < tokens; first += cut) {
      const std::int32_t count = static_cast<std::int32_t>(std::min(cut, tokens - first));
      const std::int32_t starts[] = {0, count}, lengths[] = {static_cast<std::int32_t>(first) + count};
      const std::int64_t slots[] = {1};
      run(first, {starts, lengths, slots, 1}, state.data(), y.data() + first * width * bytes_of(type));
    }
    if (cut == tokens) whole = y, whole_state = state;
    expect(y == whole && state == whole_state, [&] { return name + ": other bits in steps of " + std::to_string(cut); });
  }
  for (std::int64_t i = 0; i < tokens * width; ++i)
    expect_near(read_float(whole.data(), type, i), exact[index(i)], 1e-5 + 1.01 * half_unit(type) * std::fabs(exact[index(i)]),
                name);
  for (std::int64_t i = 0; i < state_floats; ++i) {
    expect_near(whole_state[index(i)], 7.0, 0.0, name + " state of another");
    expect_near(whole_state[index(state_floats + i)], exact_state[index(i)], 1e-5, name + " state");
  }
}

void check_gated_delta(FloatType type, std::int64_t keys, std::int64_t values, std::int64_t rows, std::int64_t columns,
                       bool channels) {
  const std::int64_t tokens = 37, group = values / keys;
  const Rows q(type, tokens, keys * rows), k(type, tokens, keys * rows), v(type, tokens, values * columns);
  const Rows g(FloatType::f32, tokens, values * (channels ? rows : 1), 0.1f, -0.5f), beta(type, tokens, values, 0.1f, 0.5f);
  Doubles exact(index(tokens * values * columns)), state(index(values * rows * columns));
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t head = 0; head < values; ++head) {
      const std::int64_t shared = head / group * rows;
      double *s = state.data() + head * rows * columns, query = 1e-6, key = 1e-6;
      for (std::int64_t i = 0; i < rows; ++i) {
        query += q.at(t, shared + i) * q.at(t, shared + i);
        key += k.at(t, shared + i) * k.at(t, shared + i);
      }
      for (std::int64_t c = 0; c < columns; ++c) {
        double known = 0, result = 0;
        for (std::int64_t i = 0; i < rows; ++i) {
          s[i * columns + c] *= std::exp(g.at(t, channels ? head * rows + i : head));
          known += s[i * columns + c] * k.at(t, shared + i) / std::sqrt(key);
        }
        const double delta = beta.at(t, head) * (v.at(t, head * columns + c) - known);
        for (std::int64_t i = 0; i < rows; ++i) {
          s[i * columns + c] += delta * k.at(t, shared + i) / std::sqrt(key);
          result += s[i * columns + c] * q.at(t, shared + i) / std::sqrt(query * static_cast<double>(rows));
        }
        exact[index((t * values + head) * columns + c)] = result;
      }
    }
  for (const Isa path : g_paths)
    check("gated delta", type, tokens, values * columns, values * rows * columns, exact, state,
          [&](std::int64_t first, const Requests &requests, float *states, std::uint8_t *y) {
            GatedDelta problem;
            problem.q = q.from(first), problem.k = k.from(first), problem.v = v.from(first);
            problem.g = g.from(first), problem.beta = beta.from(first);
            problem.y = y, problem.state = states, problem.requests = requests;
            problem.key_heads = keys, problem.value_heads = values, problem.key_dim = rows, problem.value_dim = columns;
            problem.normalise_eps = 1e-6f, problem.channel_decay = channels;
            gated_delta(problem, path, 1);
          });
}

void check_mamba2_scan(FloatType type, std::int64_t heads, std::int64_t groups, std::int64_t rows, std::int64_t columns) {
  const std::int64_t tokens = 37, shared = heads / groups;
  const Rows x(type, tokens, heads * rows), dt(type, tokens, heads), b(type, tokens, groups * columns),
      c(type, tokens, groups * columns), a(FloatType::f32, 1, heads, 0.1f, -0.6f), d(type, 1, heads),
      bias(type, 1, heads, 1.0f, -2.0f);
  Doubles exact(index(tokens * heads * rows)), state(index(heads * rows * columns));
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t head = 0; head < heads; ++head) {
      const double step = std::log1p(std::exp(dt.at(t, head) + bias.at(0, head)));
      for (std::int64_t i = 0; i < rows; ++i) {
        double *s = state.data() + (head * rows + i) * columns, result = d.at(0, head) * x.at(t, head * rows + i);
        for (std::int64_t n = 0; n < columns; ++n) {
          const std::int64_t at = head / shared * columns + n;
          s[n] = s[n] * std::exp(step * a.at(0, head)) + step * x.at(t, head * rows + i) * b.at(t, at);
          result += s[n] * c.at(t, at);
        }
        exact[index((t * heads + head) * rows + i)] = result;
      }
    }
  for (const Isa path : g_paths)
    check("Mamba 2 scan", type, tokens, heads * rows, heads * rows * columns, exact, state,
          [&](std::int64_t first, const Requests &requests, float *states, std::uint8_t *y) {
            Mamba2Scan problem;
            problem.x = x.from(first), problem.dt = dt.from(first), problem.b = b.from(first), problem.c = c.from(first);
            problem.a = a.rows, problem.d = d.rows, problem.dt_bias = bias.rows;
            problem.y = y, problem.state = states, problem.requests = requests;
            problem.heads = heads, problem.groups = groups, problem.head_dim = rows, problem.state_size = columns;
            problem.most_dt = INFINITY;
            mamba2_scan(problem, path, 1);
          });
}

void check_causal_conv(FloatType type, std::int64_t channels, std::int64_t kernel, bool silu) {
  const std::int64_t tokens = 37, past = kernel - 1;
  const Rows x(type, tokens, channels), weight(type, channels, kernel), bias(type, 1, channels);
  Doubles exact(index(tokens * channels)), state(index(channels * past));
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    const auto input = [&](std::int64_t t) { return t < 0 ? 0.0 : x.at(t, channel); };
    for (std::int64_t t = 0; t < tokens; ++t) {
      double sum = bias.at(0, channel);
      for (std::int64_t at = 0; at < kernel; ++at) sum += weight.at(channel, at) * input(t - past + at);
      exact[index(t * channels + channel)] = silu ? sum / (1 + std::exp(-sum)) : sum;
    }
    for (std::int64_t at = 0; at < past; ++at) state[index(channel * past + at)] = input(tokens - past + at);
  }
  for (const Isa path : g_paths)
    check("causal convolution", type, tokens, channels, channels * past, exact, state,
          [&](std::int64_t first, const Requests &requests, float *states, std::uint8_t *y) {
            CausalConv problem;
            problem.x = x.from(first), problem.weight = weight.rows, problem.bias = bias.rows;
            problem.y = y, problem.state = states, problem.requests = requests;
            problem.channels = channels, problem.kernel = kernel, problem.silu = silu;
            causal_conv(problem, path, 1);
          });
}

void check_all() {
  for (const FloatType type : {FloatType::f32, FloatType::bf16, FloatType::f16}) {
    for (const bool channels : {false, true}) {
      check_gated_delta(type, 1, 2, 12, 37, channels);
      check_gated_delta(type, 2, 2, 16, 32, channels);
    }
    check_mamba2_scan(type, 4, 2, 10, 19);
    check_mamba2_scan(type, 2, 1, 8, 32);
    check_causal_conv(type, 300, 4, true);
    check_causal_conv(type, 5, 3, false);
    check_causal_conv(type, 17, 7, true);
  }
}

} // namespace

int main(int count, char **arguments) { return run_checks("recurrence", count, arguments, check_all); }
