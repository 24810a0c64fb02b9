// elementwise.h for AVX2, FMA and F16C: the same loops, vectorised by the compiler.
#include <immintrin.h>

#include "elementwise.h"
#include "float_scalar.h"

namespace pymllm {
namespace {

inline void read_f16(const std::uint16_t *bits, std::int64_t count, float *to) {
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bits + i))));
  for (; i < count; ++i) to[i] = from_f16(bits[i]);
}
inline void write_f16(const float *from, std::int64_t count, std::uint16_t *bits) {
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(bits + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) bits[i] = to_f16(from[i]);
}
inline float square_root(float v) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(v))); }

#include "elementwise_kernel.h"

} // namespace

const ElementwisePath &elementwise_avx2() { return kElementwise; }

} // namespace pymllm
