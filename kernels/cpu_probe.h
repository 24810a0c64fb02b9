// What this CPU can run, and which kernel path to take on it. Plain C++17: no Python, no torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace pymllm {

// A feature counts as present only if the CPU has it AND the operating system saves its registers.
// AMX on Linux needs one more step before first use: arch_prctl(ARCH_REQ_XCOMP_PERM, 18).
using Features = std::vector<std::pair<std::string, bool>>;

struct CpuProbe {
  std::string arch;  // "x86_64", "aarch64" or "other"
  std::optional<std::string> vendor;
  std::optional<std::string> brand;
  Features features;                  // every feature asked for, in a fixed order, with the answer
  std::vector<std::string> runnable_paths; // the paths this CPU can run, best first; the last is "portable"
  int logical_cpus = 1;               // that this process may run on
  std::optional<int> physical_cores;  // that those CPUs sit on; a virtual machine may misreport it
  std::optional<std::int64_t> l1d_bytes, l2_bytes, l3_bytes;
  std::optional<std::string> transparent_huge_pages; // "always", "madvise", "never"; Linux only
};

CpuProbe probe_cpu();

// Every path name there is, best first.
const std::vector<std::string> &known_paths();

// The best path of `probe`, or `forced` if it is not empty.
// Throws std::invalid_argument if `forced` is no path, or one that this CPU cannot run.
std::string choose_path(const CpuProbe &probe, const std::string &forced);

} // namespace pymllm
