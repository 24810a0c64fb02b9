// The threads of the native kernels: a pool of our own.
//
// Python passes torch.get_num_threads() at every call. Each thread of a team has a contiguous share of the loop and
// claims it piece by piece; who has finished its own takes half of what another has left. So nobody waits for a thread
// that the system has not let begin, or has interrupted, but for the one piece that it is in. Between loops, threads look
// for the next one for some microseconds, then sleep. Bodies touch no Python object: the binding has released the GIL.
//
// A kernel splits its OUTPUT between threads and never a sum, so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pymllm {

// How many threads a loop may take, and the bytes that it reads and writes; -1: not known.
struct Team {
  int threads;
  std::int64_t bytes;

  Team(int threads, std::int64_t bytes = -1) : threads(threads), bytes(bytes) {}
  operator int() const { return threads; }
};

// How many of `threads` to use on work that reads and writes `bytes`: 1 (the pool is left alone) up to `threads`.
// Compute-bound work may count one byte for about 16 multiply-adds.
Team worthwhile_threads(std::int64_t bytes, int threads);

// thread: below the team's number of threads; no two threads that are in a body have the same.
using RangeBody = void (*)(const void *context, std::int64_t begin, std::int64_t end, int thread);
void run_ranges(std::int64_t n, Team team, std::int64_t chunk, RangeBody body, const void *context);

// body(begin, end), or body(begin, end, thread), over contiguous pieces of [0, n), on up to team.threads threads; in one
// piece on this thread if that is 1. chunk 0: even pieces, as large as a stream should be. chunk > 0: pieces of that size.
// A call from another thread, or from a body, while a loop runs, runs on its own thread alone. The first exception that
// a body throws is thrown again here, when all pieces are over.
template <class Body>
void parallel_for(std::int64_t n, Team team, const Body &body, std::int64_t chunk = 0) {
  constexpr bool numbered = std::is_invocable_v<const Body &, std::int64_t, std::int64_t, int>;
  if (n <= 0) return;
  if (team.threads <= 1 || n == 1) {
    if constexpr (numbered) return body(std::int64_t{0}, n, 0);
    else return body(std::int64_t{0}, n);
  }
  run_ranges(
      n, team, chunk,
      [](const void *context, std::int64_t begin, std::int64_t end, [[maybe_unused]] int thread) {
        if constexpr (numbered) (*static_cast<const Body *>(context))(begin, end, thread);
        else (*static_cast<const Body *>(context))(begin, end);
      },
      &body);
}

} // namespace pymllm
