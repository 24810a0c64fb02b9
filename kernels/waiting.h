// How a thread waits for a word of memory to change: first looking at it for some microseconds, then asleep.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__linux__) && !defined(PYMLLM_PORTABLE_WAIT)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#define PYMLLM_FUTEX
#else
#include <condition_variable>
#include <mutex>
#endif
#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#endif

namespace pymllm {

// Tells the processor that this is a loop that waits, so that it saves power and leaves the core to its other thread.
inline void pause_briefly() {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
  __builtin_ia32_pause();
#elif defined(_MSC_VER) && defined(_M_X64)
  _mm_pause();
#elif defined(__GNUC__) && defined(__aarch64__)
  __asm__ volatile("isb"); // `yield` is over at once on most cores; this takes about as long as x86's pause
#endif
}

// Asks `over` again and again, for as long as `span`. Returns the last answer.
template <class Over> bool look(const Over &over, std::chrono::nanoseconds span) {
  if (over()) return true;
  const auto end = std::chrono::steady_clock::now() + span;
  do {
    for (int i = 0; i < 16; ++i) { // a look at the clock takes as long as one of memory
      pause_briefly();
      if (over()) return true;
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// A word that threads sleep on. On Linux a futex, which no lock stands before: a waker never waits for a sleeper.
class WaitWord {
public:
  std::atomic<std::uint32_t> value{0};

  // Sleeps while the word is `seen`; may return for no reason.
  void sleep(std::uint32_t seen) {
#if defined(PYMLLM_FUTEX)
    static_assert(sizeof value == 4, "the kernel looks at these 32 bits");
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    std::unique_lock<std::mutex> lock(mutex_);
    if (value.load(std::memory_order_relaxed) == seen) changed_.wait(lock);
#endif
  }

  // Wakes who sleeps on the word, after it was changed.
  void wake() {
#if defined(PYMLLM_FUTEX)
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
#else
    { std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_one();
#endif
  }

  // The word once it is no longer `seen`, or `seen` when `span` is over.
  std::uint32_t watch(std::uint32_t seen, std::chrono::nanoseconds span) const {
    std::uint32_t now = seen;
    look([&] { return (now = value.load(std::memory_order_acquire)) != seen; }, span);
    return now;
  }

#if !defined(PYMLLM_FUTEX)
private:
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
};

} // namespace pymllm
