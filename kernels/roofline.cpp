#include "roofline.h"

#include <chrono>

#include "isa.h"
#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define PYMLLM_TARGET(name) __attribute__((target(name), noinline))
#endif

namespace pymllm::roofline {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Results that the compiler must believe to be wanted.
volatile std::int64_t g_sink;

#if defined(PYMLLM_TARGET)

constexpr std::int64_t kIterations = 100000;
constexpr int kChains = 12;  // independent accumulators: more than latency times instructions a cycle

template <int kStreams>
PYMLLM_TARGET("avx512f") void read_avx512(const char *data, std::int64_t bytes) {
  const std::int64_t length = bytes / kStreams / 128 * 128;
  __m512i a = _mm512_setzero_si512(), b = a;
  for (std::int64_t i = 0; i < length; i += 128)
    for (int s = 0; s < kStreams; ++s) {
      const char *line = data + s * length + i;
      _mm_prefetch(line + 1024, _MM_HINT_T0);
      _mm_prefetch(line + 1088, _MM_HINT_T0);
      a = _mm512_xor_si512(a, _mm512_loadu_si512(line));
      b = _mm512_xor_si512(b, _mm512_loadu_si512(line + 64));
    }
  g_sink = _mm512_reduce_or_epi64(_mm512_xor_si512(a, b));
}

template <int kStreams>
PYMLLM_TARGET("avx2") void read_avx2(const char *data, std::int64_t bytes) {
  const std::int64_t length = bytes / kStreams / 64 * 64;
  __m256i a = _mm256_setzero_si256(), b = a;
  for (std::int64_t i = 0; i < length; i += 64)
    for (int s = 0; s < kStreams; ++s) {
      const char *line = data + s * length + i;
      _mm_prefetch(line + 1024, _MM_HINT_T0);
      a = _mm256_xor_si256(a, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(line)));
      b = _mm256_xor_si256(b, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(line + 32)));
    }
  g_sink = _mm256_extract_epi64(_mm256_xor_si256(a, b), 0);
}

// Whole loops in asm: in C++ gcc keeps the accumulators in memory, and the "peak" is below what kernels reach.
// One `step(register)` for each of registers 0 to 11; 14 and 15 hold the operands.
#define PYMLLM_REPEAT(step) \
  step("0") step("1") step("2") step("3") step("4") step("5") step("6") step("7") step("8") step("9") step("10") \
      step("11")
#define PYMLLM_LOOP(set, zero, step)                                                                             \
  std::int64_t left = kIterations;                                                                               \
  __asm__ volatile(set PYMLLM_REPEAT(zero) ".p2align 5\n1:\n" PYMLLM_REPEAT(step) "dec %0\njne 1b\n"            \
                   : "+r"(left)                                                                                  \
                   : "m"(operand)                                                                                \
                   : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                     "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")
#define PYMLLM_ZERO(n) "vpxor %%xmm" n ",%%xmm" n ",%%xmm" n "\n"

PYMLLM_TARGET("avx512f") void f32_avx512() {
#define PYMLLM_STEP(n) "vfmadd231ps %%zmm15,%%zmm15,%%zmm" n "\n"
  const float operand = 0.5f;
  PYMLLM_LOOP("vbroadcastss %1,%%zmm15\n", PYMLLM_ZERO, PYMLLM_STEP);
#undef PYMLLM_STEP
}

PYMLLM_TARGET("avx2,fma") void f32_avx2() {
#define PYMLLM_STEP(n) "vfmadd231ps %%ymm15,%%ymm15,%%ymm" n "\n"
  const float operand = 0.5f;
  PYMLLM_LOOP("vbroadcastss %1,%%ymm15\n", PYMLLM_ZERO, PYMLLM_STEP);
#undef PYMLLM_STEP
}

PYMLLM_TARGET("avx512f,avx512vnni") void int8_avx512() {
#define PYMLLM_STEP(n) "vpdpbusd %%zmm15,%%zmm15,%%zmm" n "\n"
  const std::int32_t operand = 0x03030303;
  PYMLLM_LOOP("vpbroadcastd %1,%%zmm15\n", PYMLLM_ZERO, PYMLLM_STEP);
#undef PYMLLM_STEP
}

// Without VNNI an operand of 1 serves for the bytes and for the widening.
PYMLLM_TARGET("avx2") void int8_avx2() {
#define PYMLLM_STEP(n)                         \
  "vpmaddubsw %%ymm15,%%ymm15,%%ymm13\n"        \
  "vpmaddwd %%ymm14,%%ymm13,%%ymm13\n"          \
  "vpaddd %%ymm13,%%ymm" n ",%%ymm" n "\n"
  const std::int32_t operand = 0x01010101;
  PYMLLM_LOOP("vpbroadcastd %1,%%ymm15\nvpsrlw $8,%%ymm15,%%ymm14\n", PYMLLM_ZERO, PYMLLM_STEP);
#undef PYMLLM_STEP
}

double peak(void (*loop)(), double lanes, int threads) {
  const double start = now();
  parallel_for(threads, threads, [&](std::int64_t, std::int64_t) { loop(); });
  return 2.0 * lanes * kChains * kIterations * threads / (now() - start);
}

#endif

template <int kStreams>
void read(const char *data, std::int64_t bytes) {
#if defined(PYMLLM_TARGET)
  if (chosen_isa() == Isa::avx512_vnni) return read_avx512<kStreams>(data, bytes);
  if (chosen_isa() != Isa::portable) return read_avx2<kStreams>(data, bytes);
#endif
  const std::int64_t length = bytes / kStreams / 8 * 8;
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < length; i += 8)
    for (int s = 0; s < kStreams; ++s) sum ^= *reinterpret_cast<const std::int64_t *>(data + s * length + i);
  g_sink = sum;
}

} // namespace

void advise_pages([[maybe_unused]] void *data, [[maybe_unused]] std::int64_t bytes, [[maybe_unused]] bool huge) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 2u << 20;
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (start + page - 1) & ~(page - 1), last = (start + bytes) & ~(page - 1);
  if (first < last)
    madvise(reinterpret_cast<void *>(first), last - first, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
}

double read_seconds(const void *data, std::int64_t bytes, int streams, int threads) {
  const std::int64_t share = bytes / threads / 4096 * 4096;
  const double start = now();
  parallel_for(threads, threads, [&](std::int64_t first, std::int64_t last) {
    const char *mine = static_cast<const char *>(data) + first * share;
    if (streams == 1)
      read<1>(mine, share * (last - first));
    else
      read<8>(mine, share * (last - first));
  });
  return now() - start;
}

#if defined(PYMLLM_TARGET)

double f32_peak(int threads) {
  switch (chosen_isa()) {
  case Isa::avx512_vnni: return peak(f32_avx512, 16, threads);
  case Isa::avx2_vnni:
  case Isa::avx2: return peak(f32_avx2, 8, threads);
  default: return 0;
  }
}

double int8_peak(int threads) {
  switch (chosen_isa()) {
  case Isa::avx512_vnni: return peak(int8_avx512, 64, threads);
  case Isa::avx2_vnni:
  case Isa::avx2: return peak(int8_avx2, 32, threads);
  default: return 0;
  }
}

#else

double f32_peak(int) { return 0; }
double int8_peak(int) { return 0; }

#endif

} // namespace pymllm::roofline
