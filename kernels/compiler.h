// What a compiler must be told: to unroll a loop, to inline a function, to prefetch a cache line.
//
// Static, not merely inline: files with different compiler flags include this, and each must keep its own copy (isa.h).
#pragma once

#if !defined(__GNUC__) && (defined(_M_X64) || defined(_M_IX86))
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define PYMLLM_INLINE static inline __attribute__((always_inline))
#else
#define PYMLLM_INLINE static __forceinline
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define PYMLLM_UNROLL _Pragma("GCC unroll 8")
#define PYMLLM_UNROLL_LANES _Pragma("GCC unroll 16")
#else
#define PYMLLM_UNROLL
#define PYMLLM_UNROLL_LANES
#endif

namespace pymllm {

PYMLLM_INLINE void prefetch_line(const void *p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
  // GCC takes a function that only prefetches for one without effect, and drops calls of it.
  __asm__ volatile("" : : "r"(p));
#elif defined(_M_X64) || defined(_M_IX86)
  _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0);
#else
  (void)p;
#endif
}

} // namespace pymllm
