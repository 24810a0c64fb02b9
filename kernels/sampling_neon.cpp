// sampling.h for NEON: the same loops, vectorised by the compiler.
#include "sampling.h"
#include "vector_neon.h"

namespace pymllm {
namespace {

#include "sampling_kernel.h"

} // namespace

const SamplingPath &sampling_neon() { return kSampling; }

} // namespace pymllm
