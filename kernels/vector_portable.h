// A vector of floats for plain C++: four lanes, which a compiler can map onto any 128-bit vector unit.
//
// In an anonymous namespace: each file that includes this keeps its own copy, compiled with its own flags (isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "float_scalar.h"

// Loops over structs of four floats are for the compiler to unroll: asked to, GCC takes twice the time for a linear layer.
#undef PYMLLM_UNROLL
#undef PYMLLM_UNROLL_LANES
#define PYMLLM_UNROLL
#define PYMLLM_UNROLL_LANES

namespace pymllm {
namespace {

struct Vec {
  float lane[4];
};

struct Lanes {
  static constexpr int kLanes = 4;
  static Vec zero() { return {}; }
  static Vec set1(float f) { return {{f, f, f, f}}; }
  static Vec load(const float *p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void store(float *p, Vec v) { std::memcpy(p, v.lane, sizeof v.lane); }
  static Vec load_bf16(const std::uint16_t *p) {
    Vec v;
    for (int i = 0; i < 4; ++i) v.lane[i] = from_bf16(p[i]);
    return v;
  }
  static Vec load_f16(const std::uint16_t *p) {
    Vec v;
    for (int i = 0; i < 4; ++i) v.lane[i] = from_f16(p[i]);
    return v;
  }
  static void store_f16(std::uint16_t *p, Vec v) {
    for (int i = 0; i < 4; ++i) p[i] = to_f16(v.lane[i]);
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < 4; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static Vec mul(Vec a, Vec b) {
    for (int i = 0; i < 4; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Vec add(Vec a, Vec b) {
    for (int i = 0; i < 4; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Vec sub(Vec a, Vec b) {
    for (int i = 0; i < 4; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static Vec max(Vec a, Vec b) {
    for (int i = 0; i < 4; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }

  static void fold4(Vec a, Vec b, Vec c, Vec d, float *out) {
    const Vec *all[4] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; ++i) {
      const float *v = all[i]->lane;
      out[i] = (v[0] + v[1]) + (v[2] + v[3]);
    }
  }
  static float largest(Vec v) {
    float most = v.lane[0];
    for (int i = 1; i < 4; ++i) most = v.lane[i] > most ? v.lane[i] : most;
    return most;
  }
  static float total(Vec v) { return (v.lane[0] + v.lane[1]) + (v.lane[2] + v.lane[3]); }

  // The sums of 4 vectors, side by side.
  static Vec fold(const Vec (&v)[4]) { return {{total(v[0]), total(v[1]), total(v[2]), total(v[3])}}; }
};

} // namespace
} // namespace pymllm
