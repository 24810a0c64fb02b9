#include "pointwise.h"

#include "float_scalar.h"
#include "threads.h"

namespace pymllm {
namespace {

struct F32 {
  using Stored = float;
  static float read(float v) { return v; }
  static float write(float v) { return v; }
};
struct Bf16 {
  using Stored = std::uint16_t;
  static float read(std::uint16_t v) { return from_bf16(v); }
  static std::uint16_t write(float v) { return to_bf16(v); }
};
struct F16 {
  using Stored = std::uint16_t;
  static float read(std::uint16_t v) { return from_f16(v); }
  static std::uint16_t write(float v) { return to_f16(v); }
};

std::int64_t offset(const Sides &strides, std::int64_t a, std::int64_t b, std::int64_t c) {
  return a * strides[0] + b * strides[1] + c * strides[2];
}

// Rows [begin, end) of the first three dimensions. One: (out, i) for the last dimension's element i.
template <class Type, class One>
void rows(const PointwiseProblem &p, std::int64_t begin, std::int64_t end, const One &one) {
  using Stored = typename Type::Stored;
  const std::int64_t n = p.sizes[3], sx = p.x_strides[3], sy = p.y_strides[3], so = p.out_strides[3];
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t c = row % p.sizes[2], b = row / p.sizes[2] % p.sizes[1], a = row / p.sizes[2] / p.sizes[1];
    const Stored *x = static_cast<const Stored *>(p.x) + offset(p.x_strides, a, b, c);
    const Stored *y = static_cast<const Stored *>(p.y) + (p.y == nullptr ? 0 : offset(p.y_strides, a, b, c));
    Stored *out = static_cast<Stored *>(p.out) + offset(p.out_strides, a, b, c);
    if (sx == 1 && sy == 1 && so == 1) {
      for (std::int64_t i = 0; i < n; ++i) out[i] = one(x, y, i, i);
    } else {
      for (std::int64_t i = 0; i < n; ++i) out[i * so] = one(x, y, i * sx, i * sy);
    }
  }
}

template <class Type> void rows(const PointwiseProblem &p, std::int64_t begin, std::int64_t end) {
  using Stored = typename Type::Stored;
  const auto binary = [&](const auto &of) {
    rows<Type>(p, begin, end, [&](const Stored *x, const Stored *y, std::int64_t i, std::int64_t j) {
      return Type::write(of(Type::read(x[i]), Type::read(y[j])));
    });
  };
  switch (p.operation) {
  case Pointwise::copy:
    return rows<Type>(p, begin, end,
                      [](const Stored *x, const Stored *, std::int64_t i, std::int64_t) { return x[i]; });
  case Pointwise::negate:
    return rows<Type>(p, begin, end, [](const Stored *x, const Stored *, std::int64_t i, std::int64_t) {
      return Type::write(-Type::read(x[i]));
    });
  case Pointwise::add: return binary([](float x, float y) { return x + y; });
  case Pointwise::subtract: return binary([](float x, float y) { return x - y; });
  case Pointwise::multiply: return binary([](float x, float y) { return x * y; });
  }
}

} // namespace

void pointwise(const PointwiseProblem &problem, int threads) {
  const std::int64_t count = problem.sizes[0] * problem.sizes[1] * problem.sizes[2];
  parallel_for(count, worthwhile_threads(count * problem.sizes[3] * 3 * bytes_of(problem.type), threads),
               [&](std::int64_t begin, std::int64_t end) {
                 if (problem.type == FloatType::f32) rows<F32>(problem, begin, end);
                 else if (problem.type == FloatType::bf16) rows<Bf16>(problem, begin, end);
                 else rows<F16>(problem, begin, end);
               });
}

} // namespace pymllm
