// The one threading policy of the native kernels.
//
// Python passes torch.get_num_threads(); the kernels add no pool of their own. On Linux torch and this module both ask
// for a library whose SONAME is libgomp.so.1, so the process maps one OpenMP runtime with one pool of threads,
// whichever of the two is imported first (tests/kernels/test_native_int4.py looks in /proc/self/maps). Without OpenMP
// at build time everything runs serially. Bodies touch no Python object: the binding has released the GIL.
//
// A kernel splits its OUTPUT between threads and never a sum, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace pymllm {

// A fork and join costs 2-5 us, in which one thread streams about 64 KB: give each thread at least that much.
constexpr std::int64_t kBytesWorthAThread = 64 * 1024;

// How many of `threads` to use on work that reads and writes `bytes`: 1 (serial, no OpenMP call) up to `threads`.
// Compute-bound work may count one byte for about 16 multiply-adds.
int worthwhile_threads(std::int64_t bytes, int threads);

using RangeBody = void (*)(const void *context, std::int64_t begin, std::int64_t end);
void run_ranges(std::int64_t n, int threads, std::int64_t chunk, RangeBody body, const void *context);

// body(begin, end) over contiguous pieces of [0, n), on up to `threads` threads; serial, without OpenMP, if that is 1.
// chunk 0: one even piece a thread (streams stay long). chunk > 0: pieces of that size, handed out as threads come
// free (uneven cores). The body must not throw, nor call parallel_for again.
template <class Body>
void parallel_for(std::int64_t n, int threads, const Body &body, std::int64_t chunk = 0) {
  if (n <= 0) return;
  if (threads <= 1 || n == 1) return body(std::int64_t{0}, n);
  run_ranges(
      n, threads, chunk,
      [](const void *context, std::int64_t begin, std::int64_t end) {
        (*static_cast<const Body *>(context))(begin, end);
      },
      &body);
}

} // namespace pymllm
