// attention.h for AVX2, FMA and F16C.
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "float_scalar.h"
#include "vector_avx2.h"

namespace pymllm {
namespace {

#include "attention_kernel.h"

} // namespace

const AttentionPath &attention_avx2() { return kAttention; }

} // namespace pymllm
