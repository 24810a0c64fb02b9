// recurrence.h for NEON, which every 64-bit ARM has.
#include "recurrence.h"
#include "float_scalar.h"
#include "vector_neon.h"

namespace pymllm {
namespace {

inline float square_root(float v) { return vgetq_lane_f32(vsqrtq_f32(vdupq_n_f32(v)), 0); }

#include "recurrence_kernel.h"

} // namespace

const RecurrencePath &recurrence_neon() { return kRecurrence; }

} // namespace pymllm
