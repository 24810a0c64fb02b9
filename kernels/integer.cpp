#include "integer.h"

#include <algorithm>

#include "float_scalar.h"
#include "scratch.h"
#include "threads.h"

namespace pymllm::integer {

const Kernels &kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__GNUC__)
  case Isa::avx512_vnni: return kAvx512Vnni;
#else
  case Isa::avx512_vnni: return kAvx2;  // the AVX-512 path is in GNU asm
#endif
  case Isa::avx2_vnni: return kAvx2Vnni;
  case Isa::avx2: return kAvx2;
#endif
#if defined(PYMLLM_NEON_DOTPROD)  // where the compiler has it: sources.cmake
  case Isa::neon_dotprod: return kNeonDotprod;
#endif
  default: return kPortable;
  }
}

std::size_t activation_bytes(const Weights &weights, std::int64_t rows) {
  return static_cast<std::size_t>(rows * (weights.in_features + 8 * weights.groups()));
}

Activations activations_in(std::uint8_t *memory, const Weights &weights, std::int64_t rows, int slices) {
  Activations x{};
  x.rows = rows;
  x.slices = slices;
  x.codes = reinterpret_cast<std::int8_t *>(memory);
  x.scales = reinterpret_cast<float *>(memory + rows * weights.in_features);
  x.negative_sums = reinterpret_cast<std::int32_t *>(x.scales + rows * weights.groups());
  return x;
}

void linear(const Weights &weights, const Floats &floats, const Quantisation &quantisation, int threads, Isa isa) {
  const Kernels &kernels = kernels_of(isa);
  const int slices = quantisation.slices;
  const std::int64_t groups = weights.groups(), row_blocks = weights.row_blocks();
  const std::int64_t parts = (floats.tokens * slices + kRowsAtATime - 1) / kRowsAtATime;
  const std::int64_t element = bytes_of(floats.dtype);
  thread_local Scratch activations;
  Quantisation demanded = quantisation;
  if (demanded.demand == Demand::tensor) demanded.scale = kernels.demanded_tensor_scale(floats, weights);

  for (std::int64_t i = 0; i < parts; ++i) {
    const std::int64_t token = floats.tokens * i / parts, tokens = floats.tokens * (i + 1) / parts - token;
    const Floats part{floats.dtype, tokens,
                      static_cast<const std::uint8_t *>(floats.x) + token * weights.in_features * element, floats.bias,
                      static_cast<std::uint8_t *>(floats.y) + token * weights.out_features * element};
    const std::int64_t rows = tokens * slices;
    const Activations x = activations_in(activations.at_least(activation_bytes(weights, rows)), weights, rows, slices);

    const std::int64_t macs = rows * weights.in_features * row_blocks * kBlockRows;
    const std::int64_t bytes = row_blocks * groups * weights.block_bytes();
    const Team team = worthwhile_threads(std::max(bytes, macs / 16), threads);
    const Team quantisers = worthwhile_threads(rows * weights.in_features * 2, team);
    if (quantisation.demand == Demand::none)
      parallel_for(groups, quantisers, [&](std::int64_t first, std::int64_t last) {
        kernels.quantise(part, weights, x, first, last);
      });
    else
      parallel_for(tokens, quantisers, [&](std::int64_t first, std::int64_t last) {
        kernels.quantise_as_demanded(part, weights, demanded, x, first, last);
      });
    const std::int64_t steps = (row_blocks + kStepBlocks - 1) / kStepBlocks;
    parallel_for(steps, team, [&](std::int64_t first, std::int64_t last) {
      thread_local Scratch scratch;
      const std::int64_t begin = first * kStepBlocks, end = std::min(last * kStepBlocks, row_blocks);
      kernels.multiply(weights, x, part, begin, end,
                       scratch.at_least(kernels.scratch_bytes(weights, rows, end - begin)));
    });
  }
}

} // namespace pymllm::integer
