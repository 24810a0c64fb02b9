// attention.h for AVX-512 (F, BW, DQ, VL).
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "float_scalar.h"
#include "vector_avx512.h"

namespace pymllm {
namespace {

#include "attention_kernel.h"

} // namespace

const AttentionPath &attention_avx512() { return kAttention; }

} // namespace pymllm
