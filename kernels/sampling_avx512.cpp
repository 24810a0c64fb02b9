// sampling.h for AVX-512 (F, BW, DQ, VL): the same loops, vectorised by the compiler.
#include "sampling.h"
#include "vector_avx512.h"

namespace pymllm {
namespace {

#include "sampling_kernel.h"

} // namespace

const SamplingPath &sampling_avx512() { return kSampling; }

} // namespace pymllm
