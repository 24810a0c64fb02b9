#include "cpu_probe.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <set>
#include <stdexcept>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#define PYMLLM_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define PYMLLM_ARM64 1
#endif

#if defined(__linux__)
#include <sched.h>
#if defined(PYMLLM_ARM64)
#include <sys/auxv.h>
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#endif

namespace pymllm {
namespace {

struct PathRule {
  const char *name;
  std::vector<const char *> needs;
};

// On ARM, whether the compiler had the dot products (sources.cmake); elsewhere it is the CPU that lacks them.
#if defined(PYMLLM_ARM64) && !defined(PYMLLM_NEON_DOTPROD)
constexpr bool kNeonIsBuilt = false;
#else
constexpr bool kNeonIsBuilt = true;
#endif

bool is_built(const PathRule &rule) { return kNeonIsBuilt || rule.name != std::string("neon_dotprod"); }

// Best first. pymllm/kernels/native/extension.py has the same table for installs without this module; a test compares the two.
const std::vector<PathRule> &path_rules() {
  static const std::vector<PathRule> rules = {
      {"avx512_vnni", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}},
      {"avx2_vnni", {"avx2", "fma", "f16c", "avx_vnni"}},
      {"avx2", {"avx2", "fma", "f16c"}},
      {"neon_dotprod", {"neon", "dotprod"}},
      {"portable", {}},
  };
  return rules;
}

bool has(const Features &features, const std::string &name) {
  for (const auto &feature : features)
    if (feature.first == name) return feature.second;
  return false;
}

std::string join(const std::vector<std::string> &names) {
  std::string joined;
  for (const auto &name : names) joined += (joined.empty() ? "" : ", ") + name;
  return joined;
}

[[maybe_unused]] std::optional<std::string> trimmed(const std::string &text) {
  const auto first = text.find_first_not_of(" \t\n");
  if (first == std::string::npos) return std::nullopt;
  return text.substr(first, text.find_last_not_of(" \t\n") - first + 1);
}

// --------------------------------------------------------------------------------------------------------- x86-64

#if defined(PYMLLM_X86)

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = out[0], r.ebx = out[1], r.ecx = out[2], r.edx = out[3];
#else
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
#endif
  return r;
}

// The register sets that the operating system saves at a context switch. Call only where CPUID says OSXSAVE.
std::uint64_t enabled_register_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

// Bit numbers: Intel SDM volume 2A, CPUID; register state: volume 1, section 13.3.
Features read_features() {
  const auto bit = [](std::uint32_t word, int n) { return ((word >> n) & 1u) != 0; };
  const std::uint32_t max_leaf = cpuid(0).eax;
  const Registers one = cpuid(1);
  const Registers seven = max_leaf >= 7 ? cpuid(7) : Registers{};
  const Registers seven_1 = max_leaf >= 7 && seven.eax >= 1 ? cpuid(7, 1) : Registers{};

  const std::uint64_t state = bit(one.ecx, 27) ? enabled_register_state() : 0;
  const auto os_saves = [state](std::uint64_t mask) { return (state & mask) == mask; };
  const bool avx = os_saves(0x6) && bit(one.ecx, 28);        // XMM, YMM
  const bool avx512 = avx && os_saves(0xe6);                 // + opmask, ZMM 0-15 high halves, ZMM 16-31
  const bool amx = os_saves(0x60000) && bit(seven.edx, 24);  // tile configuration, tile data

  return {
      {"sse4_2", bit(one.ecx, 20)},
      {"avx2", avx && bit(seven.ebx, 5)},
      {"fma", avx && bit(one.ecx, 12)},
      {"f16c", avx && bit(one.ecx, 29)},
      {"avx_vnni", avx && bit(seven_1.eax, 4)},
      {"avx512f", avx512 && bit(seven.ebx, 16)},
      {"avx512bw", avx512 && bit(seven.ebx, 30)},
      {"avx512dq", avx512 && bit(seven.ebx, 17)},
      {"avx512vl", avx512 && bit(seven.ebx, 31)},
      {"avx512_vnni", avx512 && bit(seven.ecx, 11)},
      {"avx512_bf16", avx512 && bit(seven_1.eax, 5)},
      {"avx512_fp16", avx512 && bit(seven.edx, 23)},
      {"amx_tile", amx},
      {"amx_int8", amx && bit(seven.edx, 25)},
      {"amx_bf16", amx && bit(seven.edx, 22)},
  };
}

void read_identity(CpuProbe &probe) {
  probe.arch = "x86_64";
  const Registers zero = cpuid(0);
  char vendor[13] = {};
  std::memcpy(vendor, &zero.ebx, 4);
  std::memcpy(vendor + 4, &zero.edx, 4);
  std::memcpy(vendor + 8, &zero.ecx, 4);
  probe.vendor = trimmed(vendor);
  if (cpuid(0x80000000u).eax >= 0x80000004u) {
    char brand[49] = {};
    for (std::uint32_t i = 0; i < 3; ++i) {
      const Registers r = cpuid(0x80000002u + i);
      const std::uint32_t words[4] = {r.eax, r.ebx, r.ecx, r.edx};
      std::memcpy(brand + 16 * i, words, 16);
    }
    probe.brand = trimmed(brand);
  }
}

// Where sysfs is silent: leaf 4 (Intel) and 0x8000001D (AMD) share one layout, one subleaf a cache.
void read_caches_from_cpuid(CpuProbe &probe) {
  const bool amd = probe.vendor == "AuthenticAMD" || probe.vendor == "HygonGenuine";
  const std::uint32_t leaf = amd ? 0x8000001Du : 4u;
  if (cpuid(amd ? 0x80000000u : 0u).eax < leaf) return;
  if (amd && ((cpuid(0x80000001u).ecx >> 22) & 1u) == 0) return;  // no topology extensions
  for (std::uint32_t subleaf = 0; subleaf < 16; ++subleaf) {
    const Registers r = cpuid(leaf, subleaf);
    const std::uint32_t type = r.eax & 31, level = (r.eax >> 5) & 7;
    if (type == 0) break;
    if (type == 2) continue;  // instructions
    const std::int64_t ways = (r.ebx >> 22) + 1, partitions = ((r.ebx >> 12) & 1023) + 1;
    const std::int64_t bytes = ways * partitions * ((r.ebx & 4095) + 1) * (static_cast<std::int64_t>(r.ecx) + 1);
    if (level == 1 && !probe.l1d_bytes) probe.l1d_bytes = bytes;
    if (level == 2 && !probe.l2_bytes) probe.l2_bytes = bytes;
    if (level == 3 && !probe.l3_bytes) probe.l3_bytes = bytes;
  }
}

// -------------------------------------------------------------------------------------------------------- aarch64

#elif defined(PYMLLM_ARM64)

#if defined(__APPLE__)
bool sysctl_flag(const char *name) {
  int value = 0;
  std::size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

Features read_features() {
  bool dotprod = false, i8mm = false, bf16 = false, sve = false;
#if defined(__linux__)
  // Bits of the kernel's ABI, spelt out because older C libraries lack the names (HWCAP_ASIMDDP and so on).
  const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(26 /* AT_HWCAP2 */);
  dotprod = (hwcap >> 20) & 1;
  sve = (hwcap >> 22) & 1;
  i8mm = (hwcap2 >> 13) & 1;
  bf16 = (hwcap2 >> 14) & 1;
#elif defined(__APPLE__)
  dotprod = sysctl_flag("hw.optional.arm.FEAT_DotProd");
  i8mm = sysctl_flag("hw.optional.arm.FEAT_I8MM");
  bf16 = sysctl_flag("hw.optional.arm.FEAT_BF16");
#elif defined(_WIN32)
  dotprod = IsProcessorFeaturePresent(43 /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */) != 0;
#endif
  return {{"neon", true}, {"dotprod", dotprod}, {"i8mm", i8mm}, {"bf16", bf16}, {"sve", sve}};
}

void read_identity(CpuProbe &probe) {
  probe.arch = "aarch64";
#if defined(__APPLE__)
  probe.vendor = "Apple";
#endif
}

void read_caches_from_cpuid(CpuProbe &) {}

#else

Features read_features() { return {}; }
void read_identity(CpuProbe &probe) { probe.arch = "other"; }
void read_caches_from_cpuid(CpuProbe &) {}

#endif

// ---------------------------------------------------------------------------------------------- operating systems

#if defined(__linux__)

std::optional<std::string> read_line(const std::string &path) {
  std::ifstream file(path);
  std::string line;
  if (!file || !std::getline(file, line)) return std::nullopt;
  return trimmed(line);
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  // cpu_set_t holds 1024 CPUs; the kernel answers EINVAL while the set is smaller than its own.
  for (int capacity = 1024; capacity <= (1 << 16); capacity *= 2) {
    cpu_set_t *set = CPU_ALLOC(capacity);
    if (set == nullptr) break;
    const std::size_t size = CPU_ALLOC_SIZE(capacity);
    const bool answered = sched_getaffinity(0, size, set) == 0;
    for (int cpu = 0; answered && cpu < capacity; ++cpu)
      if (CPU_ISSET_S(cpu, size, set)) cpus.push_back(cpu);
    CPU_FREE(set);
    if (answered) break;
  }
  return cpus;
}

std::optional<std::int64_t> parse_size(const std::string &text) {  // "32K", "1M"
  std::int64_t value = 0;
  std::size_t i = 0;
  for (; i < text.size() && text[i] >= '0' && text[i] <= '9'; ++i) value = value * 10 + (text[i] - '0');
  if (i == 0) return std::nullopt;
  if (i < text.size() && text[i] == 'K') value <<= 10;
  if (i < text.size() && text[i] == 'M') value <<= 20;
  return value;
}

void read_system(CpuProbe &probe) {
  const std::vector<int> cpus = allowed_cpus();
  probe.logical_cpus = cpus.empty() ? std::max(1u, std::thread::hardware_concurrency()) : static_cast<int>(cpus.size());

  const std::string root = "/sys/devices/system/cpu/cpu";
  std::set<std::string> cores;
  bool complete = !cpus.empty();
  for (int cpu : cpus) {
    const auto siblings = read_line(root + std::to_string(cpu) + "/topology/thread_siblings_list");
    if (siblings) cores.insert(*siblings);
    complete = complete && siblings.has_value();
  }
  if (complete) probe.physical_cores = static_cast<int>(cores.size());

  const std::string cache = root + std::to_string(cpus.empty() ? 0 : cpus.front()) + "/cache/index";
  for (int index = 0; index < 16; ++index) {
    const std::string folder = cache + std::to_string(index);
    const auto level = read_line(folder + "/level"), type = read_line(folder + "/type");
    const auto size = read_line(folder + "/size");
    if (!level || !type || !size || *type == "Instruction") continue;
    if (*level == "1") probe.l1d_bytes = parse_size(*size);
    if (*level == "2") probe.l2_bytes = parse_size(*size);
    if (*level == "3") probe.l3_bytes = parse_size(*size);
  }

  if (const auto modes = read_line("/sys/kernel/mm/transparent_hugepage/enabled")) {  // "always [madvise] never"
    const auto open = modes->find('['), close = modes->find(']');
    if (open != std::string::npos && close != std::string::npos && close > open)
      probe.transparent_huge_pages = modes->substr(open + 1, close - open - 1);
  }
}

#elif defined(__APPLE__)

std::optional<std::int64_t> sysctl_number(const char *name) {
  std::int64_t value = 0;  // 4-byte answers fill the low half: both Apple architectures are little-endian
  std::size_t size = sizeof(value);
  if (sysctlbyname(name, &value, &size, nullptr, 0) != 0 || value <= 0) return std::nullopt;
  return value;
}

void read_system(CpuProbe &probe) {
  const auto first = [](const char *a, const char *b) {
    const auto value = sysctl_number(a);
    return value ? value : sysctl_number(b);
  };
  probe.logical_cpus = static_cast<int>(sysctl_number("hw.logicalcpu").value_or(1));
  if (const auto cores = sysctl_number("hw.physicalcpu")) probe.physical_cores = static_cast<int>(*cores);
  probe.l1d_bytes = first("hw.perflevel0.l1dcachesize", "hw.l1dcachesize");
  probe.l2_bytes = first("hw.perflevel0.l2cachesize", "hw.l2cachesize");
  probe.l3_bytes = first("hw.perflevel0.l3cachesize", "hw.l3cachesize");
  char brand[128] = {};
  std::size_t size = sizeof(brand) - 1;
  if (sysctlbyname("machdep.cpu.brand_string", brand, &size, nullptr, 0) == 0) probe.brand = trimmed(brand);
}

#elif defined(_WIN32)

void read_system(CpuProbe &probe) {
  DWORD_PTR process = 0, system = 0;
  int count = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &process, &system))
    for (; process != 0; process &= process - 1) ++count;
  probe.logical_cpus = count > 0 ? count : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

#else

void read_system(CpuProbe &probe) {
  probe.logical_cpus = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

#endif

} // namespace

const std::vector<std::string> &known_paths() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const PathRule &rule : path_rules()) all.emplace_back(rule.name);
    return all;
  }();
  return names;
}

CpuProbe probe_cpu() {
  CpuProbe probe;
  read_identity(probe);
  probe.features = read_features();
  read_system(probe);
  read_caches_from_cpuid(probe);
  for (const PathRule &rule : path_rules())
    if (is_built(rule) &&
        std::all_of(rule.needs.begin(), rule.needs.end(),
                    [&](const char *feature) { return has(probe.features, feature); }))
      probe.runnable_paths.emplace_back(rule.name);
  return probe;
}

std::string choose_path(const CpuProbe &probe, const std::string &forced) {
  if (forced.empty()) return probe.runnable_paths.front();
  for (const PathRule &rule : path_rules()) {
    if (forced != rule.name) continue;
    if (!is_built(rule))
      throw std::invalid_argument("PYMLLM_CPU_ISA=" + forced + ": the compiler of this build did not have it. " +
                                  "It can run: " + join(probe.runnable_paths) + ".");
    std::vector<std::string> missing;
    for (const char *feature : rule.needs)
      if (!has(probe.features, feature)) missing.emplace_back(feature);
    if (missing.empty()) return forced;
    throw std::invalid_argument("PYMLLM_CPU_ISA=" + forced + ": this CPU lacks " + join(missing) +
                                ". It can run: " + join(probe.runnable_paths) + ".");
  }
  throw std::invalid_argument("PYMLLM_CPU_ISA=" + forced + " is not a kernel path. Choose one of: " +
                              join(known_paths()) + ".");
}

} // namespace pymllm
