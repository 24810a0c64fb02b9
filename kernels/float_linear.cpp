#include "float_linear.h"

#include <algorithm>

#include "scratch.h"
#include "threads.h"

namespace pymllm {
namespace {

const FloatLinearPath &path_of(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == Isa::avx512_vnni) return float_linear_avx512();
  if (isa == Isa::avx2 || isa == Isa::avx2_vnni) return float_linear_avx2();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
  if (isa == Isa::neon_dotprod) return float_linear_neon();
#endif
  (void)isa;
  return float_linear_portable();
}

} // namespace

void float_linear(const FloatLinear &problem, Isa isa, int threads) {
  const FloatLinearPath &path = path_of(isa);
  const std::int64_t inputs = problem.in_features, outputs = problem.out_features;
  if (problem.tokens <= 0 || outputs <= 0) return;

  // + 16: rows a multiple of 4 KB apart would share the sets of the L1 cache.
  const std::int64_t stride = (inputs + 63) / 64 * 64 + 16;
  const std::int64_t panels = (problem.tokens + kPanel - 1) / kPanel;
  const std::int64_t panel = (problem.tokens + panels - 1) / panels;
  thread_local Scratch prepared_scratch, first_scratch;
  float *prepared = prepared_scratch.floats(panel * stride);

  const std::int64_t bits_of_weight =
      problem.weight_type == WeightType::codebook ? 4 : problem.weight_type == WeightType::e4m3 ? 8 : 16;
  const std::int64_t weight_bytes = outputs * inputs * bits_of_weight / 8;
  for (std::int64_t first = 0; first < problem.tokens; first += panel) {
    const std::int64_t tokens = std::min(panel, problem.tokens - first);
    // Below 128 K activations one thread is done before a second has started.
    parallel_for(tokens, worthwhile_threads(tokens * inputs, threads),
                 [&](std::int64_t begin, std::int64_t end) {
                   path.prepare(problem, first + begin, end - begin, prepared + begin * stride, stride);
                 });
    const Team team = worthwhile_threads(weight_bytes + outputs * inputs * tokens / 16, threads);
    if (tokens <= path.direct_tokens) {
      parallel_for(outputs, team, [&](std::int64_t begin, std::int64_t end) {
        path.rows(problem, prepared, stride, first, tokens, begin, end, nullptr);
      });
      continue;
    }
    // Every thread's share before the team starts, because a body must not throw.
    float *scratch = first_scratch.floats(team * path.scratch_floats);
    const std::int64_t blocks = (outputs + kRowBlock - 1) / kRowBlock;
    parallel_for(blocks, team, [&](std::int64_t begin, std::int64_t end, int thread) {
      path.rows(problem, prepared, stride, first, tokens, begin * kRowBlock, std::min(end * kRowBlock, outputs),
                scratch + thread * path.scratch_floats);
    });
  }
}

} // namespace pymllm
