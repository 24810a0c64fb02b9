// The loops of elementwise.h, written for compilers that vectorise; included inside an anonymous namespace by one file
// for each instruction set, whose flags say how wide.

#include "strips.h"

constexpr int kPartial = 32;         // sums side by side, so that additions need not wait for one another

void rms_norm_rows(const void *x, const void *residual, const void *weight, void *y, void *sum, FloatType type,
                   std::int64_t begin, std::int64_t end, std::int64_t size, float epsilon) {
  alignas(64) float values[kStrip], others[kStrip];
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t base = row * size;
    alignas(64) float partial[kPartial] = {};
    for (std::int64_t at = 0; at < size; at += kStrip) {
      const std::int64_t count = strip_at(at, size);
      read_strip(x, base + at, count, type, values);
      if (residual != nullptr) {
        read_strip(residual, base + at, count, type, others);
        for (std::int64_t i = 0; i < count; ++i) values[i] += others[i];
        write_strip(values, sum, base + at, count, type);
        read_strip(sum, base + at, count, type, values);
      }
      std::int64_t i = 0;
      for (; i + kPartial <= count; i += kPartial)
        for (int lane = 0; lane < kPartial; ++lane) partial[lane] += values[i + lane] * values[i + lane];
      for (; i < count; ++i) partial[i % kPartial] += values[i] * values[i];
    }
    for (int half = kPartial / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) partial[lane] += partial[lane + half];
    const float scale = 1.0f / square_root(partial[0] / static_cast<float>(size) + epsilon);
    const void *summed = residual != nullptr ? sum : x;
    for (std::int64_t at = 0; at < size; at += kStrip) {
      const std::int64_t count = strip_at(at, size);
      read_strip(summed, base + at, count, type, values);
      for (std::int64_t i = 0; i < count; ++i) values[i] *= scale;
      if (weight != nullptr) {
        round_strip(values, count, type);
        read_strip(weight, at, count, type, others);
        for (std::int64_t i = 0; i < count; ++i) values[i] *= others[i];
      }
      write_strip(values, y, base + at, count, type);
    }
  }
}

void silu_and_mul_rows(const void *x, void *y, FloatType type, std::int64_t begin, std::int64_t end,
                       std::int64_t size) {
  alignas(64) float gate[kStrip], up[kStrip];
  for (std::int64_t row = begin; row < end; ++row)
    for (std::int64_t at = 0; at < size; at += kStrip) {
      const std::int64_t count = strip_at(at, size);
      read_strip(x, row * 2 * size + at, count, type, gate);
      read_strip(x, row * 2 * size + size + at, count, type, up);
      for (std::int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i]));
      round_strip(gate, count, type);
      for (std::int64_t i = 0; i < count; ++i) gate[i] *= up[i];
      write_strip(gate, y, row * size + at, count, type);
    }
}

void gate_and_multiply_rows(const float *x, float *y, const Gate &gate, std::int64_t begin, std::int64_t end,
                            std::int64_t size) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float *g = x + row * 2 * size, *u = g + size;
    float *to = y + row * size;
    if (gate.kind == Gate::silu) {
      for (std::int64_t i = 0; i < size; ++i) to[i] = g[i] / (1.0f + exponential(-g[i])) * u[i];
    } else if (gate.kind == Gate::gelu_tanh) {  // (1 + tanh(z)) / 2 is sigmoid(2 z)
      for (std::int64_t i = 0; i < size; ++i) {
        const float z = 0.7978845608f * (g[i] + 0.044715f * g[i] * g[i] * g[i]);
        to[i] = g[i] / (1.0f + exponential(-2.0f * z)) * u[i];
      }
    } else {
      for (std::int64_t i = 0; i < size; ++i) {
        const float a = g[i] > gate.limit ? gate.limit : g[i];
        float b = u[i] > gate.limit ? gate.limit : u[i];
        b = b < -gate.limit ? -gate.limit : b;
        to[i] = a / (1.0f + exponential(-gate.alpha * a)) * (b + 1.0f);
      }
    }
  }
}

void rotate_tokens(const void *x, void *y, const float *cos, const float *sin, FloatType type, std::int64_t begin,
                   std::int64_t end, std::int64_t heads, std::int64_t head_size, std::int64_t rotary_size,
                   std::int64_t token_stride) {
  const std::int64_t half = rotary_size / 2, bytes = bytes_of(type);
  alignas(64) float a[kStrip], b[kStrip], first[kStrip], second[kStrip];
  for (std::int64_t token = begin; token < end; ++token)
    for (std::int64_t head = 0; head < heads; ++head) {
      const std::int64_t from = token * token_stride + head * head_size, to = (token * heads + head) * head_size;
      for (std::int64_t at = 0; at < half; at += kStrip) {
        const std::int64_t count = strip_at(at, half);
        const float *c = cos + token * half + at, *s = sin + token * half + at;
        read_strip(x, from + at, count, type, a);
        read_strip(x, from + half + at, count, type, b);
        for (std::int64_t i = 0; i < count; ++i) {
          first[i] = a[i] * c[i] - b[i] * s[i];
          second[i] = b[i] * c[i] + a[i] * s[i];
        }
        write_strip(first, y, to + at, count, type);
        write_strip(second, y, to + half + at, count, type);
      }
      if (rotary_size < head_size)
        std::memmove(static_cast<char *>(y) + (to + rotary_size) * bytes,
                     static_cast<const char *>(x) + (from + rotary_size) * bytes,
                     static_cast<std::size_t>((head_size - rotary_size) * bytes));
    }
}

void widen_piece(const void *x, float *y, FloatType type, std::int64_t begin, std::int64_t end) {
  read_strip(x, begin, end - begin, type, y + begin);
}

constexpr ElementwisePath kElementwise = {rms_norm_rows, silu_and_mul_rows, gate_and_multiply_rows, rotate_tokens,
                                          widen_piece};
