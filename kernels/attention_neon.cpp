// attention.h for NEON.
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "float_scalar.h"
#include "vector_neon.h"

namespace pymllm {
namespace {

#include "attention_kernel.h"

} // namespace

const AttentionPath &attention_neon() { return kAttention; }

} // namespace pymllm
