// The loops of sampling.h, written for compilers that vectorise; included inside an anonymous namespace by one file for
// each instruction set, whose flags say how wide.

#include "strips.h"

inline std::int64_t piece_at(std::int64_t at, std::int64_t size) { return size - at < kPiece ? size - at : kPiece; }

bool has_nan(const float *values, std::int64_t size) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest > 0x7f800000u;
}

bool maxima_of_pieces(const float *values, std::int64_t size, float *maxima, float *copy) {
  constexpr std::int64_t lanes = Lanes::kLanes;
  // Comparisons drop NaN. 0 times a value is 0, but for NaN and infinity: then a second look tells.
  Vec zeros = Lanes::zero();
  float zero = 0.0f;
  for (std::int64_t at = 0; at < size; at += kPiece) {
    const std::int64_t count = piece_at(at, size);
    const float *piece = values + at;
    Vec most = Lanes::set1(float_of(0xff800000u));
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const Vec value = Lanes::load(piece + i);
      if (copy != nullptr) Lanes::store(copy + at + i, value);
      zeros = Lanes::fma(value, Lanes::zero(), zeros);
      most = Lanes::max(value, most);
    }
    float largest = Lanes::largest(most);
    for (; i < count; ++i) {
      if (copy != nullptr) copy[at + i] = piece[i];
      zero += piece[i] * 0.0f;
      largest = piece[i] > largest ? piece[i] : largest;
    }
    maxima[at / kPiece] = largest;
  }
  return !(Lanes::total(zeros) + zero == 0.0f) && has_nan(values, size);
}

// x and weights of a piece, filled up to kPiece: one loop for each step, and no comparison beside the arithmetic, as
// compilers then vectorise all of them. count: of the values.
inline void weigh_piece(const float *values, std::int64_t count, float most, float scale, float *x, float *weights) {
  alignas(64) float within[kPiece];
  for (std::int64_t i = 0; i < count; ++i) x[i] = (values[i] - most) * scale;
  for (std::int64_t i = 0; i < kPiece; i += Lanes::kLanes)
    Lanes::store(within + i, Lanes::max(Lanes::load(x + i), Lanes::set1(kLeastExponent)));
  for (std::int64_t i = 0; i < kPiece; ++i) weights[i] = exponential_within(within[i]);
  for (std::int64_t i = 0; i < kPiece; ++i) weights[i] = x[i] < kLeastExponent ? 0.0f : weights[i];
}

void weights_of(const float *values, std::int64_t size, float most, float scale, float *weights) {
  alignas(64) float x[kPiece] = {}, piece[kPiece];
  for (std::int64_t at = 0; at < size; at += kPiece) {
    const std::int64_t count = piece_at(at, size);
    weigh_piece(values + at, count, most, scale, x, piece);
    std::memcpy(weights + at, piece, static_cast<std::size_t>(count) * sizeof(float));
  }
}

void sums_of_pieces(const float *values, std::int64_t size, float most, float scale, float *sums) {
  alignas(64) float x[kPiece] = {}, weights[kPiece];
  for (std::int64_t at = 0; at < size; at += kPiece) {
    const std::int64_t count = piece_at(at, size);
    weigh_piece(values + at, count, most, scale, x, weights);
    for (std::int64_t i = count; i < kPiece; ++i) weights[i] = 0.0f;
    Vec sum = Lanes::zero();
    for (std::int64_t i = 0; i < kPiece; i += Lanes::kLanes) sum = Lanes::add(sum, Lanes::load(weights + i));
    sums[at / kPiece] = Lanes::total(sum);
  }
}

constexpr SamplingPath kSampling = {maxima_of_pieces, sums_of_pieces, weights_of};
