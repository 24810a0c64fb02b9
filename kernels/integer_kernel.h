// The loops of the integer linear that every instruction set shares: activations to codes, the header of a block, and
// what stands between the sums and y. Included inside an anonymous namespace by files that define a class `V`: the Lanes
// of a vector_*.h, and
//   round(v)              to integers, to even where halfway
//   largest_bits(v)       the largest magnitude in several vectors, as the bits of a float: as integers, magnitudes keep
//                         their order, and NaN is above infinity
//   store_codes(codes, v) integers from -128 to 127, one byte each
//   widen(bytes, to)      as many bytes as there are lanes, as 32-bit integers

#include "strips.h"
#include "integer_demand.h"

template <int kGroup>
void quantise_groups(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
                     std::int64_t last) {
  constexpr int kVectors = kGroup / V::kLanes;
  for (std::int64_t g = first; g < last; ++g) {
    for (std::int64_t token = 0; token < floats.tokens; ++token) {
      const std::int64_t from = token * weights.in_features + g * kGroup;
      Vec values[kVectors];
      load_as(floats.x, from, floats.dtype, values);
      GroupScale scale = group_scale(V::largest_bits(values), out.slices);
      const Vec inverse = V::set1(scale.inverse), ratio = V::set1(kSliceRatio);
      if (scale.inverse == 0) // NaN times 0 is no code
        for (Vec &value : values) value = V::zero();
      PYMLLM_UNROLL
      for (int i = 0; i < kVectors; ++i) values[i] = V::mul(values[i], inverse);
      for (int slice = 0; slice < out.slices; ++slice) {
        const std::int64_t row = g * out.rows + token * out.slices + slice;
        Vec sum = V::zero(); // exact: below 2^24
        PYMLLM_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          const Vec code = V::round(values[i]);
          sum = V::add(sum, code);
          values[i] = V::mul(V::sub(values[i], code), ratio);
          V::store_codes(out.codes + row * kGroup + i * V::kLanes, code);
        }
        out.scales[row] = scale.scale;
        out.negative_sums[row] = -static_cast<std::int32_t>(V::total(sum));
        scale.scale *= 1.0f / kSliceRatio;
      }
    }
  }
}

void quantise(const Floats &floats, const Weights &weights, const Activations &out, std::int64_t first,
              std::int64_t last) {
  if (weights.group == 128) return quantise_groups<128>(floats, weights, out, first, last);
  if (weights.group == 64) return quantise_groups<64>(floats, weights, out, first, last);
  if (weights.group == 32) return quantise_groups<32>(floats, weights, out, first, last);
  quantise_groups<16>(floats, weights, out, first, last);
}

// Whole vectors at a time: a load that spans several stores would wait for them.
PYMLLM_INLINE void copy_floats(const void *from, FloatType type, float *to) {
  Vec values[kBlockRows / V::kLanes];
  load_as(from, 0, type, values);
  PYMLLM_UNROLL
  for (int i = 0; i < kBlockRows / V::kLanes; ++i) V::store(to + i * V::kLanes, values[i]);
}

// offsets: only where the format has them.
PYMLLM_INLINE void decode_header(const Format &format, const std::uint8_t *block, std::int32_t *zeros, float *scales,
                                 float *offsets) {
  const std::uint8_t *stored = block + format.zeros_offset();
  if (format.scales == Scales::f16) copy_floats(block, FloatType::f16, scales);
  else if (format.scales == Scales::bf16) copy_floats(block, FloatType::bf16, scales);
  else if (format.scales == Scales::f32) copy_floats(block, FloatType::f32, scales);
  else
    for (int r = 0; r < kBlockRows; ++r) scales[r] = read_scale(format.scales, block, r);
  if (format.zeros == Zeros::each)
    for (int r = 0; r < kBlockRows; r += V::kLanes) V::widen(stored + r, zeros + r);
  else
    for (int r = 0; r < kBlockRows; ++r) zeros[r] = format.zeros == Zeros::same ? format.zero : 0;
  if (format.zeros == Zeros::offsets) copy_floats(stored, FloatType::f32, offsets);
}

// sums [R][kColumns] += offsets [kColumns] * the sums of x.
template <int kColumns>
PYMLLM_INLINE void add_offsets(const float *offsets, const Activations &x, std::int64_t g, float *sums) {
  for (std::int64_t row = 0; row < x.rows; ++row) {
    const std::int64_t at = g * x.rows + row;
    const Vec sum = V::set1(static_cast<float>(-x.negative_sums[at]) * x.scales[at]);
    PYMLLM_UNROLL
    for (int i = 0; i < kColumns; i += V::kLanes) {
      float *to = sums + row * kColumns + i;
      V::store(to, V::fma(V::load(offsets + i), sum, V::load(to)));
    }
  }
}

// `count` outputs, at most kBlockRows, from `output` on.
PYMLLM_INLINE void finish_outputs(const float *sums, std::int64_t stride, int slices, const Floats &floats,
                                  const Weights &weights, std::int64_t token, std::int64_t output,
                                  std::int64_t count) {
  alignas(64) float factors[kBlockRows] = {}, bias[kBlockRows] = {}, result[kBlockRows];
  if (weights.row_factors != nullptr) read_strip(weights.row_factors, output, count, FloatType::f32, factors);
  if (floats.bias != nullptr) read_strip(floats.bias, output, count, floats.dtype, bias);
  PYMLLM_UNROLL
  for (int i = 0; i < kBlockRows; i += V::kLanes) {
    Vec sum = V::load(sums + (slices - 1) * stride + i);
    for (int slice = slices - 1; slice-- > 0;) sum = V::add(sum, V::load(sums + slice * stride + i));
    if (weights.row_factors != nullptr) sum = V::mul(sum, V::load(factors + i));
    if (floats.bias != nullptr) sum = V::add(sum, V::load(bias + i));
    V::store(result + i, sum);
  }
  write_strip(result, floats.y, token * weights.out_features + output, count, floats.dtype);
}

// sums: the slices of a token, `stride` floats apart. Adds them, the smallest first, and the bias.
PYMLLM_INLINE void finish(const float *sums, std::int64_t stride, int slices, const Floats &floats,
                          const Weights &weights, std::int64_t token, std::int64_t row_block) {
  const std::int64_t output = row_block * kBlockRows, left = weights.out_features - output;
  if (left >= kBlockRows) // a number that the compiler knows: no loops over what is left
    return finish_outputs(sums, stride, slices, floats, weights, token, output, kBlockRows);
  finish_outputs(sums, stride, slices, floats, weights, token, output, left);
}
