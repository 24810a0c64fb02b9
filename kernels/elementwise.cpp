#include "elementwise.h"

#include <cmath>
#include <cstring>

#include "float_scalar.h"
#include "threads.h"
#include "vector_portable.h"

namespace pymllm {
namespace {

inline float square_root(float v) { return std::sqrt(v); }

#include "elementwise_kernel.h"

const ElementwisePath &path_of(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == Isa::avx512_vnni) return elementwise_avx512();
  if (isa == Isa::avx2 || isa == Isa::avx2_vnni) return elementwise_avx2();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
  if (isa == Isa::neon_dotprod) return elementwise_neon();
#endif
  (void)isa;
  return elementwise_portable();
}

} // namespace

const ElementwisePath &elementwise_portable() { return kElementwise; }

void rms_norm(const void *x, const void *residual, const void *weight, void *y, void *sum, FloatType type,
              std::int64_t rows, std::int64_t size, float epsilon, Isa isa, int threads) {
  const ElementwisePath &path = path_of(isa);
  const std::int64_t passes = residual != nullptr ? 4 : 2;
  parallel_for(rows, worthwhile_threads(rows * size * passes * bytes_of(type), threads),
               [&](std::int64_t begin, std::int64_t end) {
                 path.rms_norm(x, residual, weight, y, sum, type, begin, end, size, epsilon);
               });
}

void silu_and_mul(const void *x, void *y, FloatType type, std::int64_t rows, std::int64_t size, Isa isa,
                  int threads) {
  const ElementwisePath &path = path_of(isa);
  parallel_for(rows, worthwhile_threads(rows * size * 3 * bytes_of(type), threads),
               [&](std::int64_t begin, std::int64_t end) { path.silu_and_mul(x, y, type, begin, end, size); });
}

void gate_and_multiply(const float *x, float *y, const Gate &gate, std::int64_t rows, std::int64_t size, Isa isa,
                       int threads) {
  const ElementwisePath &path = path_of(isa);
  parallel_for(rows, worthwhile_threads(rows * size * 12, threads),
               [&](std::int64_t begin, std::int64_t end) { path.gate_and_multiply(x, y, gate, begin, end, size); });
}

void rotate(const void *x, void *y, const float *cos, const float *sin, FloatType type, std::int64_t tokens,
            std::int64_t heads, std::int64_t head_size, std::int64_t rotary_size, std::int64_t token_stride, Isa isa,
            int threads) {
  const ElementwisePath &path = path_of(isa);
  parallel_for(tokens, worthwhile_threads(tokens * heads * head_size * 2 * bytes_of(type), threads),
               [&](std::int64_t begin, std::int64_t end) {
                 path.rotate(x, y, cos, sin, type, begin, end, heads, head_size, rotary_size, token_stride);
               });
}

void widen(const void *x, float *y, FloatType type, std::int64_t count, Isa isa, int threads) {
  const ElementwisePath &path = path_of(isa);
  parallel_for(count, worthwhile_threads(count * (4 + bytes_of(type)), threads),
               [&](std::int64_t begin, std::int64_t end) { path.widen(x, y, type, begin, end); });
}

void copy_rows(const void *table, std::int64_t rows, std::int64_t row_bytes, const std::int64_t *ids,
               std::int64_t count, void *y) {
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(static_cast<char *>(y) + i * row_bytes,
                static_cast<const char *>(table) + (ids[i] < 0 ? ids[i] + rows : ids[i]) * row_bytes,
                static_cast<std::size_t>(row_bytes));
}

} // namespace pymllm
