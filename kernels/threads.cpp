#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "waiting.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pymllm {
namespace {

using Clock = std::chrono::steady_clock;

// A fork and join costs 2-5 us, in which one thread streams about 64 KB: give each thread at least that much.
constexpr std::int64_t kBytesWorthAThread = 64 * 1024;

// A piece that begins anew costs 0.25 us: with pieces of 64 KB, decoding (448 M parameters, int4, two threads) was 10 %
// slower than with these; with one piece a thread it was 5 % slower, as the later thread was waited for.
constexpr std::int64_t kPieceBytes = 384 * 1024;
constexpr std::int64_t kMostPiecesAShare = 32, kUnknownPiecesAShare = 4;
constexpr std::int64_t kMostPieces = 0xffff; // what a share has bits for
constexpr int kMostThreads = 1024;

// How long a thread looks at memory before it sleeps. Between the loops of a decoding step are 2 to 20 us: with 10 us
// decoding was 15 % slower than with 50, and with 200 no faster.
constexpr std::chrono::microseconds kWorkerLooks{50}, kCallerLooks{20};

// To wake a sleeping thread takes up to 50 us: loops that together read less than this do without. Where a woken team reads
// less than four times as much before it sleeps again, it did not pay, and the next time takes twice as many bytes. A
// model whose whole token is 300 us was 0.6 to 0.9 as fast on two threads as on one without this.
constexpr std::int64_t kBytesWorthWaking = 8 << 20, kMostWorthWaking = 64 << 20;

// Where waits for interrupted threads come to more than a tenth of the time, and 4 ms, teams are a thread smaller for so
// many times the last wait: beside one busy process, two threads on two cores were 0.81 as fast as one without this.
constexpr int kCautious = 8, kTolerance = 10;
constexpr std::chrono::microseconds kLongWait{100}, kTolerable{4000};

// Loops are numbered with the 31 bits that an invitation has, from near the last: every program goes over the end, which
// one that decodes reaches after a day.
constexpr std::uint32_t kLastLoop = 0x7fffffff, kFirstLoop = kLastLoop - 300;

// Pieces [begin, end) that nobody has claimed, of the loop with this number: one word, so that a claim is one exchange,
// and a thread that comes late cannot claim from another loop than the one that it was invited to.
struct Share {
  std::uint32_t loop, begin, end;

  static Share from(std::uint64_t word) {
    return {static_cast<std::uint32_t>(word >> 32), static_cast<std::uint32_t>(word >> 16 & 0xffff),
            static_cast<std::uint32_t>(word & 0xffff)};
  }
  std::uint64_t word() const { return std::uint64_t{loop} << 32 | std::uint64_t{begin} << 16 | end; }
};

// The place of a thread in a team; the first is the caller's.
struct alignas(64) Seat {
  std::atomic<std::uint64_t> share{0};
  alignas(64) WaitWord invitation; // the number of a loop, times 2; + 1: the thread sleeps
};

class Pool {
public:
  void run(std::int64_t n, Team asked, std::int64_t chunk, RangeBody body, const void *context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return body(context, 0, n, 0);
    const int hired = hire(static_cast<int>(std::min<std::int64_t>(allowed(asked.threads), n)));
    const int team = worth_waking(hired, asked.bytes);
    if (team == 1) {
      busy_.store(false, std::memory_order_release);
      return body(context, 0, n, 0);
    }
    publish({body, context, n, chunk}, team, asked.bytes);
    // Only here may a piece take long; a look at the clock takes 60 ns.
    const bool long_pieces = chunk > 0 || asked.bytes < 0 || asked.bytes / team > kMostPiecesAShare * kPieceBytes;
    const auto start = long_pieces ? Clock::now() : Clock::time_point{};
    const std::uint32_t done = work(loop_, 0);
    const auto over = [this] { return pending_.value.load(std::memory_order_acquire) == 0; };
    if (!look(over, kCallerLooks)) {
      const auto since = Clock::now() - kCallerLooks;
      wait_for_others();
      // Another's piece that was merely longer than the caller's own is no interruption.
      const auto now = Clock::now();
      if (now - since > kLongWait && (!long_pieces || (done > 0 && now - since > (since - start) / done * 4)))
        note_wait(now, now - since, team);
    }
    const std::exception_ptr failure = std::exchange(failure_, nullptr);
    failed_.store(false, std::memory_order_relaxed);
    busy_.store(false, std::memory_order_release);
    if (failure) std::rethrow_exception(failure);
  }

private:
  struct Loop {
    RangeBody body;
    const void *context;
    std::int64_t n, chunk;
  };
  static constexpr std::uint32_t kCallerSleeps = 1u << 31; // a bit of pending_

  int allowed(int threads) {
    if (threads <= most_) return std::max(threads, 1);
    if (const auto now = Clock::now(); most_ < kMostThreads && now >= raise_at_) {
      ++most_;
      raise_at_ = now + hold_;
    }
    return std::min(threads, most_);
  }

  void note_wait(Clock::time_point now, Clock::duration waited, int team) {
    lost_ = std::max(lost_ - (now - last_wait_) / kTolerance, Clock::duration::zero()) + waited;
    last_wait_ = now;
    if (lost_ < kTolerable) return;
    most_ = team - 1;
    hold_ = kCautious * waited;
    raise_at_ = now + hold_;
  }

  // Returns how many threads there are, with the caller, up to `team`: fewer where the system gives no more.
  int hire(int team) {
    while (hired_ + 1 < team && !refused_) {
      try {
        // Detached: they sleep to the end of the process, and the pool is never freed (see the_pool).
        std::thread(&Pool::serve, this, hired_ + 1).detach();
        ++hired_;
      } catch (const std::exception &) { // no thread, or no memory for one
        refused_ = true;
      }
    }
    return std::min(team, hired_ + 1);
  }

  // Returns `team`, or how many of it are awake, the caller among them, if the loop is not worth more.
  int worth_waking(int team, std::int64_t bytes) {
    int awake = 1;
    while (awake < team && !(seats_[awake].invitation.value.load(std::memory_order_relaxed) & 1)) ++awake;
    if (bytes < 0) return team;
    if (awake < team) {
      const bool paid = together_ >= 4 * kBytesWorthWaking;
      if (together_ > 0) worth_ = paid ? kBytesWorthWaking : std::min(2 * worth_, kMostWorthWaking);
      together_ = 0;
      alone_ += bytes;
      if (alone_ < worth_) return awake;
      alone_ = 0;
    }
    together_ += bytes;
    return team;
  }

  void publish(const Loop &loop, int team, std::int64_t bytes) {
    now_ = loop;
    std::int64_t &chunk = now_.chunk;
    if (chunk > 0) {
      chunk = std::max(chunk, (loop.n + kMostPieces - 1) / kMostPieces);
      pieces_ = (loop.n + chunk - 1) / chunk;
    } else {
      const std::int64_t each = std::clamp<std::int64_t>(bytes / team / kPieceBytes, 1, kMostPiecesAShare);
      pieces_ = std::min({loop.n, team * (bytes < 0 ? kUnknownPiecesAShare : each), kMostPieces});
    }
    team_.store(team, std::memory_order_relaxed);
    pending_.value.store(static_cast<std::uint32_t>(pieces_), std::memory_order_relaxed);
    loop_ = (loop_ + 1) & kLastLoop;
    for (int i = 0; i < team; ++i) {
      const Share share{loop_, static_cast<std::uint32_t>(pieces_ * i / team),
                        static_cast<std::uint32_t>(pieces_ * (i + 1) / team)};
      seats_[i].share.store(share.word(), std::memory_order_release);
    }
    for (int i = 1; i < team; ++i)
      if (seats_[i].invitation.value.exchange(loop_ << 1, std::memory_order_acq_rel) & 1) seats_[i].invitation.wake();
  }

  void serve(int seat) {
    WaitWord &invitation = seats_[seat].invitation;
    for (std::uint32_t seen = 0;;) {
      std::uint32_t now = invitation.watch(seen, kWorkerLooks);
      if (now == seen && invitation.value.compare_exchange_strong(now, seen | 1, std::memory_order_acq_rel))
        while ((now = invitation.value.load(std::memory_order_acquire)) == (seen | 1)) invitation.sleep(seen | 1);
      work(now >> 1, seat);
      seen = now;
    }
  }

  // Does pieces until none is left to claim. Returns how many.
  std::uint32_t work(std::uint32_t loop, int seat) {
    std::uint32_t done = 0, piece = 0;
    for (; claim(loop, seat, piece) || steal(loop, seat, piece); ++done) run_piece(piece, seat);
    if (done == 0) return 0; // perhaps the loop is over: nothing of it may be touched
    const std::uint32_t before = pending_.value.fetch_sub(done, std::memory_order_acq_rel);
    if (before == (kCallerSleeps | done)) pending_.wake();
    return done;
  }

  bool claim(std::uint32_t loop, int seat, std::uint32_t &piece) {
    std::atomic<std::uint64_t> &share = seats_[seat].share;
    std::uint64_t word = share.load(std::memory_order_relaxed);
    for (;;) {
      const Share all = Share::from(word);
      if (all.loop != loop || all.begin >= all.end) return false;
      if (!exchange(share, word, {loop, all.begin + 1, all.end})) continue;
      piece = all.begin;
      return true;
    }
  }

  // The later half of another's share becomes one's own, so that it is one stream again.
  bool steal(std::uint32_t loop, int seat, std::uint32_t &piece) {
    const int team = team_.load(std::memory_order_relaxed);
    for (int i = 1; i < team; ++i) {
      std::atomic<std::uint64_t> &share = seats_[(seat + i) % team].share;
      std::uint64_t word = share.load(std::memory_order_relaxed);
      for (;;) {
        const Share all = Share::from(word);
        if (all.loop != loop || all.begin >= all.end) break;
        piece = all.begin + (all.end - all.begin) / 2;
        if (!exchange(share, word, {loop, all.begin, piece})) continue;
        // The loop cannot end before `piece` is done, so the seat is still this loop's.
        seats_[seat].share.store(Share{loop, piece + 1, all.end}.word(), std::memory_order_release);
        return true;
      }
    }
    return false;
  }

  static bool exchange(std::atomic<std::uint64_t> &share, std::uint64_t &seen, const Share &wanted) {
    return share.compare_exchange_weak(seen, wanted.word(), std::memory_order_acq_rel, std::memory_order_relaxed);
  }

  // Only for who has claimed the piece: until it is done, no other loop is published.
  void run_piece(std::int64_t piece, int seat) {
    const Loop &loop = now_;
    const bool chunked = loop.chunk > 0;
    const std::int64_t begin = chunked ? piece * loop.chunk : loop.n * piece / pieces_;
    const std::int64_t end = chunked ? std::min(begin + loop.chunk, loop.n) : loop.n * (piece + 1) / pieces_;
    try {
      loop.body(loop.context, begin, end, seat);
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
    }
  }

  void wait_for_others() {
    work(loop_, 0); // what a thread stole and, interrupted, has not begun
    std::uint32_t now = pending_.value.fetch_or(kCallerSleeps, std::memory_order_acq_rel) | kCallerSleeps;
    for (; now != kCallerSleeps; now = pending_.value.load(std::memory_order_acquire)) pending_.sleep(now);
  }

  std::atomic<bool> busy_{false}; // who sets it has the members below, up to team_, but for what run_piece reads

  int hired_ = 0;
  bool refused_ = false;
  // Bytes of loops that nobody was woken for, of those of the team since it was woken, and what is worth waking it.
  std::int64_t alone_ = 0, together_ = 0, worth_ = kBytesWorthWaking;
  int most_ = kMostThreads; // in a team, until raise_at_
  Clock::time_point raise_at_{}, last_wait_{};
  Clock::duration hold_{}, lost_{};
  std::uint32_t loop_ = kFirstLoop;
  Loop now_{};
  std::int64_t pieces_ = 0;

  std::atomic<int> team_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;   // of who set failed_, then the caller's
  alignas(64) WaitWord pending_; // pieces that are not done, and kCallerSleeps
  Seat seats_[kMostThreads];
};

std::atomic<Pool *> g_pool{nullptr};

// Never freed: at the end of the process its threads still look at it.
Pool &the_pool() {
  Pool *pool = g_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  Pool *made = new Pool;
  if (g_pool.compare_exchange_strong(pool, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *pool;
}

#if defined(__unix__) || defined(__APPLE__)
// The child of a fork has the memory of the pool and none of its threads: it makes another.
[[maybe_unused]] const int g_at_fork = pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
#endif

} // namespace

Team worthwhile_threads(std::int64_t bytes, int threads) {
  return {static_cast<int>(std::clamp<std::int64_t>(bytes / kBytesWorthAThread, 1, std::max(threads, 1))), bytes};
}

void run_ranges(std::int64_t n, Team team, std::int64_t chunk, RangeBody body, const void *context) {
  the_pool().run(n, team, chunk, body, context);
}

} // namespace pymllm
