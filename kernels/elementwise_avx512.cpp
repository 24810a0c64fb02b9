// elementwise.h for AVX-512 (F, BW, DQ, VL): the same loops, vectorised by the compiler.
#include "elementwise.h"
#include "float_scalar.h"
#include "vector_avx512.h"

namespace pymllm {
namespace {

inline float square_root(float v) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(v))); }

#include "elementwise_kernel.h"

} // namespace

const ElementwisePath &elementwise_avx512() { return kElementwise; }

} // namespace pymllm
