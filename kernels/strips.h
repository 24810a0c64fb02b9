// Conversions through small float32 buffers, so that the arithmetic between them stands in loops of its own, and exp as
// compilers can vectorise it. Included inside an anonymous namespace, after a vector_*.h: one copy for each instruction
// set (isa.h).

constexpr std::int64_t kStrip = 256; // elements in a buffer: 1 KB each, all in L1

// N vectors of a tensor, from its element `at` on.
template <int N>
inline void load_as(const void *from, std::int64_t at, FloatType type, Vec (&to)[N]) {
  const auto *floats = static_cast<const float *>(from) + at;
  const auto *bits = static_cast<const std::uint16_t *>(from) + at;
  if (type == FloatType::f32)
    PYMLLM_UNROLL
    for (int i = 0; i < N; ++i) to[i] = Lanes::load(floats + i * Lanes::kLanes);
  else if (type == FloatType::bf16)
    PYMLLM_UNROLL
    for (int i = 0; i < N; ++i) to[i] = Lanes::load_bf16(bits + i * Lanes::kLanes);
  else
    PYMLLM_UNROLL
    for (int i = 0; i < N; ++i) to[i] = Lanes::load_f16(bits + i * Lanes::kLanes);
}

inline void read_f16(const std::uint16_t *bits, std::int64_t count, float *to) {
  for (std::int64_t i = 0; i + Lanes::kLanes <= count; i += Lanes::kLanes) Lanes::store(to + i, Lanes::load_f16(bits + i));
  for (std::int64_t i = count - count % Lanes::kLanes; i < count; ++i) to[i] = from_f16(bits[i]);
}

inline void write_f16(const float *from, std::int64_t count, std::uint16_t *bits) {
  for (std::int64_t i = 0; i + Lanes::kLanes <= count; i += Lanes::kLanes) Lanes::store_f16(bits + i, Lanes::load(from + i));
  for (std::int64_t i = count - count % Lanes::kLanes; i < count; ++i) bits[i] = to_f16(from[i]);
}

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

// exp with a relative error of 2e-7: 2^n times a polynomial of degree 6 (Cephes) on [-ln2/2, ln2/2]. v: -87 to 88.
inline float exponential_within(float v) {
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

inline float exponential(float v) {
  v = v > 88.0f ? 88.0f : v; // stays finite: silu(-88) is -5e-37, as good as zero
  v = v < -87.0f ? -87.0f : v;
  return exponential_within(v);
}
