// The pool of kernels/threads.h under ThreadSanitizer, or any other way of building it: `make sanitize`.
//
// Ends with 0 if every loop ran each of its items once, on as many threads as were asked for at most, whoever called,
// and after exceptions and forks. Nothing here looks at a clock.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "scratch.h"
#include "threads.h"

using pymllm::parallel_for;

namespace {

void expect(bool holds, const char *what) {
  if (holds) return;
  std::fprintf(stderr, "pool: %s\n", what);
  std::_Exit(1);
}

// Plain memory: a piece that runs twice, or is not seen by the caller, is a race that ThreadSanitizer reports.
void check_every_item_once(std::int64_t n, int threads, std::int64_t chunk) {
  std::vector<int> runs(static_cast<std::size_t>(n), 0), inputs(static_cast<std::size_t>(n));
  std::iota(inputs.begin(), inputs.end(), threads);
  parallel_for(
      n, threads,
      [&](std::int64_t begin, std::int64_t end, int thread) {
        expect(begin < end && end <= n, "a piece is empty, or ends behind the loop");
        expect(thread >= 0 && thread < threads, "a thread has a number above those asked for");
        for (std::int64_t i = begin; i < end; ++i)
          runs[static_cast<std::size_t>(i)] += inputs[static_cast<std::size_t>(i)] == static_cast<int>(i) + threads;
      },
      chunk);
  for (int count : runs) expect(count == 1, "an item ran never, or twice");
}

// No two threads that are at work have one number: their scratch would be one.
void check_numbers_are_exclusive(int threads) {
  std::vector<std::atomic<bool>> taken(static_cast<std::size_t>(threads));
  parallel_for(threads * 50, threads, [&](std::int64_t, std::int64_t, int thread) {
    expect(!taken[static_cast<std::size_t>(thread)].exchange(true), "two threads have one number");
    std::this_thread::yield();
    taken[static_cast<std::size_t>(thread)].store(false);
  });
  std::vector<std::int64_t> sums(97, 0);
  pymllm::run_with_scratch(97, 8, threads, [&](std::int64_t i, float *scratch) {
    for (int k = 0; k < 8; ++k) scratch[k] = static_cast<float>(i);
    for (int k = 0; k < 8; ++k) sums[static_cast<std::size_t>(i)] += static_cast<std::int64_t>(scratch[k]);
  });
  for (std::int64_t i = 0; i < 97; ++i) expect(sums[static_cast<std::size_t>(i)] == 8 * i, "scratch was shared");
}

void check_exceptions(int threads) {
  for (int turn = 0; turn < 20; ++turn) {
    std::atomic<int> ran{0};
    bool caught = false;
    try {
      parallel_for(
          40, threads,
          [&](std::int64_t begin, std::int64_t) {
            ++ran;
            if (begin % 3 == 0) throw std::runtime_error(std::to_string(begin));
          },
          1);
    } catch (const std::runtime_error &error) {
      caught = std::stoi(error.what()) % 3 == 0;
    }
    expect(caught, "an exception did not reach the caller");
    check_every_item_once(33, threads, 0);
  }
}

void check_loops_inside_loops(int threads) {
  std::vector<int> runs(64, 0);
  parallel_for(
      8, threads,
      [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
          parallel_for(8, threads, [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t k = first; k < last; ++k) ++runs[static_cast<std::size_t>(i * 8 + k)];
          });
      },
      1);
  for (int count : runs) expect(count == 1, "an item of an inner loop ran never, or twice");
}

void check_several_callers() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([caller] {
      for (int turn = 0; turn < 300; ++turn) check_every_item_once(1 + (turn * 7 + caller) % 90, 2 + turn % 3, turn % 4);
    });
  for (std::thread &caller : callers) caller.join();
}

// The pool does not end up with the caller alone: not after thousands of loops, whose numbers begin anew meanwhile.
void check_others_take_part() {
  int helped = 0;
  for (int turn = 0; turn < 1000; ++turn) {
    std::atomic<bool> other{false};
    parallel_for(
        2, 2,
        [&](std::int64_t, std::int64_t, int thread) {
          if (thread > 0) other = true;
          for (int i = 0; i < 1000 && !other; ++i) std::this_thread::yield();
        },
        1);
    helped += other;
  }
  expect(helped > 0, "no thread but the caller's took part");
}

// Both sides of a fork go on, also while another thread is in a loop.
void check_fork() {
#if (defined(__unix__) || defined(__APPLE__)) && !defined(__SANITIZE_THREAD__) // which follows no threads into a child
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) check_every_item_once(200, 3, 0);
  });
  for (int turn = 0; turn < 8; ++turn) {
    const pid_t child = fork();
    expect(child >= 0, "fork failed");
    if (child == 0) {
      for (int i = 0; i < 20; ++i) check_every_item_once(100 + i, 3, i % 2);
      std::_Exit(0);
    }
    check_every_item_once(100, 4, 0);
    int status = 0;
    expect(waitpid(child, &status, 0) == child && status == 0, "the child of a fork went wrong");
  }
  stop = true;
  other.join();
#endif
}

} // namespace

int main() {
  for (int threads : {2, 5, 1, 3, 8, 2})  // the number changes from call to call, up and down
    for (std::int64_t n : {1, 2, 3, 17, 64, 1000})
      for (std::int64_t chunk : {0, 1, 7, 5000}) check_every_item_once(n, threads, chunk);
  check_every_item_once(200000, 4, 1); // more pieces than a share can number
  for (int turn = 0; turn < 2000; ++turn) check_every_item_once(16, 2 + turn % 2, 0);
  for (int threads : {2, 6}) {
    check_numbers_are_exclusive(threads);
    check_exceptions(threads);
    check_loops_inside_loops(threads);
  }
  check_several_callers();
  check_others_take_part();
  check_fork();
  std::puts("pool: well");
  return 0;
}
