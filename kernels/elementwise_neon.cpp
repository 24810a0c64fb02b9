// elementwise.h for NEON: the same loops, vectorised by the compiler.
#include "elementwise.h"
#include "float_scalar.h"
#include "vector_neon.h"

namespace pymllm {
namespace {

inline float square_root(float v) { return vgetq_lane_f32(vsqrtq_f32(vdupq_n_f32(v)), 0); }

#include "elementwise_kernel.h"

} // namespace

const ElementwisePath &elementwise_neon() { return kElementwise; }

} // namespace pymllm
