// The loops of sampling.h, written for compilers that vectorise; included inside an anonymous namespace by one file for
// each instruction set, whose flags say how wide.

#include "strips.h"

constexpr int kBeside = 16; // values side by side, so that one need not wait for another

inline std::int64_t piece_at(std::int64_t at, std::int64_t size) { return size - at < kPiece ? size - at : kPiece; }

bool maxima_of_pieces(const float *values, std::int64_t size, float *maxima) {
  // A comparison drops NaN: the largest magnitude as an integer finds it.
  alignas(64) std::uint32_t magnitudes[kBeside] = {};
  for (std::int64_t at = 0; at < size; at += kPiece) {
    const std::int64_t count = piece_at(at, size);
    const float *piece = values + at;
    alignas(64) float most[kBeside];
    for (int lane = 0; lane < kBeside; ++lane) most[lane] = float_of(0xff800000u);
    std::int64_t i = 0;
    for (; i + kBeside <= count; i += kBeside)
      for (int lane = 0; lane < kBeside; ++lane) {
        const float value = piece[i + lane];
        most[lane] = value > most[lane] ? value : most[lane];
        const std::uint32_t magnitude = bits_of(value) & 0x7fffffffu;
        magnitudes[lane] = magnitude > magnitudes[lane] ? magnitude : magnitudes[lane];
      }
    for (; i < count; ++i) {
      most[0] = piece[i] > most[0] ? piece[i] : most[0];
      const std::uint32_t magnitude = bits_of(piece[i]) & 0x7fffffffu;
      magnitudes[0] = magnitude > magnitudes[0] ? magnitude : magnitudes[0];
    }
    for (int half = kBeside / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane)
        most[lane] = most[lane + half] > most[lane] ? most[lane + half] : most[lane];
    maxima[at / kPiece] = most[0];
  }
  std::uint32_t largest = 0;
  for (int lane = 0; lane < kBeside; ++lane) largest = magnitudes[lane] > largest ? magnitudes[lane] : largest;
  return largest > 0x7f800000u;
}

void weights_of(const float *values, std::int64_t size, float most, float scale, float *weights) {
  for (std::int64_t i = 0; i < size; ++i) {
    const float x = (values[i] - most) * scale;
    const float weight = exponential(x);
    weights[i] = x < kLeastExponent ? 0.0f : weight;
  }
}

void sums_of_pieces(const float *values, std::int64_t size, float most, float scale, float *sums) {
  alignas(64) float weights[kPiece];
  for (std::int64_t at = 0; at < size; at += kPiece) {
    const std::int64_t count = piece_at(at, size);
    for (std::int64_t i = count; i < kPiece; ++i) weights[i] = 0.0f;
    weights_of(values + at, count, most, scale, weights);
    for (int lane = 0; lane < kBeside; ++lane)
      weights[lane] = (weights[lane] + weights[lane + 16]) + (weights[lane + 32] + weights[lane + 48]);
    for (int half = kBeside / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) weights[lane] += weights[lane + half];
    sums[at / kPiece] = weights[0];
  }
}

constexpr SamplingPath kSampling = {maxima_of_pieces, sums_of_pieces, weights_of};
