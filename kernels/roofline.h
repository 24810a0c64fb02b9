// The two limits that a kernel's time is judged against: how fast memory is read, how fast the CPU multiplies.
#pragma once

#include <cstdint>

namespace pymllm::roofline {

// 2 MiB pages (or none of them) for memory that nothing has touched yet. Advice only.
void advise_pages(void *data, std::int64_t bytes, bool huge);

// Seconds to read `bytes` once: each thread reads its share as 1 or 8 streams side by side, prefetching 1 KB ahead.
double read_seconds(const void *data, std::int64_t bytes, int streams, int threads);

// Operations a second on registers only, a multiply-add being two: f32 fused multiply-add, and u8 x s8 summed in int32
// (0 where this CPU has no instruction for it, or the compiler none of ours). About 1 ms.
double f32_peak(int threads);
double int8_peak(int threads);

} // namespace pymllm::roofline
