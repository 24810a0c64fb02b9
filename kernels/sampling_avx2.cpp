// sampling.h for AVX2: the same loops, vectorised by the compiler.
#include "sampling.h"
#include "vector_avx2.h"

namespace pymllm {
namespace {

#include "sampling_kernel.h"

} // namespace

const SamplingPath &sampling_avx2() { return kSampling; }

} // namespace pymllm
