#include "threads.h"

#include <algorithm>
#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pymllm {

int worthwhile_threads(std::int64_t bytes, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(bytes / kBytesWorthAThread, 1, std::max(threads, 1)));
}

#if defined(_OPENMP)

void run_ranges(std::int64_t n, int threads, std::int64_t chunk, RangeBody body, const void *context) {
  std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(std::min<std::int64_t>(threads, n)))
  {
    if (chunk > 0) {
      for (std::int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < n;)
        body(context, begin, std::min(begin + chunk, n));
    } else {
      // The team may be smaller than asked for (OMP_THREAD_LIMIT): divide by what it is.
      const std::int64_t team = omp_get_num_threads(), mine = omp_get_thread_num();
      const std::int64_t begin = n * mine / team, end = n * (mine + 1) / team;
      if (begin < end) body(context, begin, end);
    }
  }
}

#else

void run_ranges(std::int64_t n, int, std::int64_t, RangeBody body, const void *context) { body(context, 0, n); }

#endif

} // namespace pymllm
