// What the programs of `make arm-check` share: the paths that this CPU can run, random numbers, and counting.
//
// PROGRAM PATH: PATH is what the probe must choose here. On an ARM machine the tests in Python force the same paths.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../../../kernels/cpu_probe.h"
#include "../../../kernels/isa.h"

namespace {

std::vector<pymllm::Isa> g_paths;  // the best first, portable last
std::mt19937 g_generator(1);
long g_compared = 0, g_wrong = 0;

inline std::int64_t between(std::int64_t least, std::int64_t most) {
  return std::uniform_int_distribution<std::int64_t>(least, most)(g_generator);
}

inline float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(g_generator);
}

// name() says what was compared; the first 20 that are wrong are printed.
template <class Name> void expect(bool right, const Name &name) {
  ++g_compared;
  if (!right && ++g_wrong <= 20) std::printf("WRONG %s\n", name().c_str());
}

// What main returns.
template <class Check> int run_checks(const char *what, int count, char **arguments, const Check &check) {
  const pymllm::CpuProbe probe = pymllm::probe_cpu();
  const std::string chosen = pymllm::choose_path(probe, ""), wanted = count > 1 ? arguments[1] : chosen;
  if (chosen != wanted)
    return std::printf("WRONG: the probe chooses %s, not %s\n", chosen.c_str(), wanted.c_str()), 1;
  for (const std::string &path : probe.runnable_paths) g_paths.push_back(pymllm::isa_named(path));
  check();
  std::printf("%s kernels, %s: %ld results compared, %ld wrong\n", what, chosen.c_str(), g_compared, g_wrong);
  return g_wrong == 0 ? 0 : 1;
}

} // namespace
