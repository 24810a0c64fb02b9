// The loops of elementwise.h, written for compilers that vectorise; included inside an anonymous namespace by one file
// for each instruction set, whose flags say how wide. Conversions go through small float32 buffers, so that the
// arithmetic stands in loops of its own.

constexpr std::int64_t kStrip = 256; // elements in a buffer: 1 KB each, all in L1
constexpr int kPartial = 32;         // sums side by side, so that additions need not wait for one another

inline void read_strip(const void *from, std::int64_t at, std::int64_t count, FloatType type, float *to) {
  if (type == FloatType::f32) {
    std::memcpy(to, static_cast<const float *>(from) + at, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const auto *bits = static_cast<const std::uint16_t *>(from) + at;
  if (type == FloatType::bf16)
    for (std::int64_t i = 0; i < count; ++i) to[i] = from_bf16(bits[i]);
  else read_f16(bits, count, to);
}

inline void write_strip(const float *from, void *to, std::int64_t at, std::int64_t count, FloatType type) {
  if (type == FloatType::f32) {
    std::memcpy(static_cast<float *>(to) + at, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  auto *bits = static_cast<std::uint16_t *>(to) + at;
  if (type == FloatType::bf16)
    for (std::int64_t i = 0; i < count; ++i) bits[i] = to_bf16(from[i]);
  else write_f16(from, count, bits);
}

// To the tensor's type and back.
inline void round_strip(float *values, std::int64_t count, FloatType type) {
  if (type == FloatType::f32) return;
  std::uint16_t bits[kStrip];
  write_strip(values, bits, 0, count, type);
  read_strip(bits, 0, count, type, values);
}

inline std::int64_t strip_at(std::int64_t at, std::int64_t size) { return size - at < kStrip ? size - at : kStrip; }

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

// exp with a relative error of 2e-7: 2^n times a polynomial of degree 6 (Cephes) on [-ln2/2, ln2/2].
inline float exponential(float v) {
  v = v > 88.0f ? 88.0f : v; // stays finite: silu(-88) is -5e-37, as good as zero
  v = v < -87.0f ? -87.0f : v;
  const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  const float shifted = v * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = v - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of((bits_of(shifted) + 127u) << 23);
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

void rotate_tokens(const void *x, void *y, const float *cos, const float *sin, FloatType type, std::int64_t begin,
                   std::int64_t end, std::int64_t heads, std::int64_t head_size, std::int64_t rotary_size,
                   std::int64_t token_stride) {
  const std::int64_t half = rotary_size / 2, bytes = type == FloatType::f32 ? 4 : 2;
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

constexpr ElementwisePath kElementwise = {rms_norm_rows, silu_and_mul_rows, rotate_tokens};
