// int8 activations as a checkpoint demands them, with the roundings of compressed-tensors: scale = largest / 127.5,
// code = clamp(round(x / scale)), where quotients are rounded to x's own dtype. Loops for compilers that vectorise.
// Included by integer_kernel.h, inside an anonymous namespace.

constexpr std::uint32_t kInfinityBits = 0x7f800000u;

// Without a branch, so that loops over it become vectors; NaN does not come here.
inline float as_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

inline float as_dtype(float value, FloatType dtype) {
  if (dtype == FloatType::f32) return value;
  return dtype == FloatType::bf16 ? as_bf16(value) : from_f16(to_f16(value));
}

// Of the largest |x| of [at, at + count), the bits: as integers, magnitudes keep their order, and NaN is the largest.
std::uint32_t largest_magnitude(const Floats &floats, std::int64_t at, std::int64_t count) {
  alignas(64) float values[kMaxGroup];
  std::int32_t largest = 0;
  for (std::int64_t done = 0; done < count; done += kMaxGroup) {
    const std::int64_t some = count - done < kMaxGroup ? count - done : kMaxGroup;
    read_strip(floats.x, at + done, some, floats.dtype, values);
    for (std::int64_t i = 0; i < some; ++i) {
      const auto magnitude = static_cast<std::int32_t>(bits_of(values[i]) & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return static_cast<std::uint32_t>(largest);
}

// NaN for infinities and NaN.
inline float demanded_scale(std::uint32_t largest, FloatType dtype) {
  if (largest >= kInfinityBits) return float_of(0x7fc00000u);
  const float smallest = dtype == FloatType::f16 ? 0x1p-14f : 0x1p-126f;
  const float scale = as_dtype(float_of(largest) / 127.5f, dtype);
  return scale > smallest ? scale : smallest;
}

// Up to kMaxGroup codes; returns their sum. Adding 1.5 * 2^23 rounds to integers, to even.
template <FloatType kDtype>
std::int32_t quantise_chunk(const float *values, std::int64_t count, float scale, std::int8_t *codes) {
  alignas(64) std::int32_t rounded[kMaxGroup], sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    float code = as_dtype(values[i] / scale, kDtype);
    code = code < -128.0f ? -128.0f : code;
    code = code > 127.0f ? 127.0f : code;
    rounded[i] = static_cast<std::int32_t>(bits_of(code + 12582912.0f)) - 0x4b400000;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<std::int8_t>(rounded[i]);
    sum += rounded[i];
  }
  return sum;
}

void quantise_as_demanded(const Floats &floats, const Weights &weights, const Quantisation &quantisation,
                                 const Activations &out, std::int64_t first, std::int64_t last) {
  const std::int64_t inputs = weights.in_features, group = weights.group, stretch = quantisation.group;
  const Demand demand = quantisation.demand;
  for (std::int64_t token = first; token < last; ++token) {
    float scale = quantisation.scale;
    if (demand != Demand::group) {
      const std::uint32_t largest = largest_magnitude(floats, token * inputs, inputs);
      if (demand == Demand::token) scale = demanded_scale(largest, floats.dtype);
      else if (largest > kInfinityBits) scale = float_of(largest);  // NaN is no code
    }
    for (std::int64_t g = 0; g < weights.groups(); ++g) {
      const std::int64_t at = token * inputs + g * group, left = inputs - g * group;
      if (demand == Demand::group && g * group % stretch == 0)
        scale = demanded_scale(largest_magnitude(floats, at, left < stretch ? left : stretch), floats.dtype);
      const std::int64_t row = g * out.rows + token;
      std::int8_t *codes = out.codes + row * group;
      std::int32_t sum = 0;
      if ((bits_of(scale) & 0x7fffffffu) > kInfinityBits) {
        std::memset(codes, 0, static_cast<std::size_t>(group));
      } else {
        alignas(64) float values[kMaxGroup];
        read_strip(floats.x, at, group, floats.dtype, values);
        if (floats.dtype == FloatType::f32) sum = quantise_chunk<FloatType::f32>(values, group, scale, codes);
        else if (floats.dtype == FloatType::bf16) sum = quantise_chunk<FloatType::bf16>(values, group, scale, codes);
        else sum = quantise_chunk<FloatType::f16>(values, group, scale, codes);
      }
      out.scales[row] = scale;
      out.negative_sums[row] = -sum;
    }
  }
}

// The scale that all of x has.
float demanded_tensor_scale(const Floats &floats, const Weights &weights) {
  return demanded_scale(largest_magnitude(floats, 0, floats.tokens * weights.in_features), floats.dtype);
}
