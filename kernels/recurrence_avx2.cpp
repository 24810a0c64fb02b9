// recurrence.h for AVX2, FMA and F16C.
#include "recurrence.h"
#include "float_scalar.h"
#include "vector_avx2.h"

namespace pymllm {
namespace {

inline float square_root(float v) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(v))); }

#include "recurrence_kernel.h"

} // namespace

const RecurrencePath &recurrence_avx2() { return kRecurrence; }

} // namespace pymllm
