#include "isa.h"

#include <cstdlib>

#include "cpu_probe.h"

namespace pymllm {

Isa isa_named(const std::string &name) {
  static const CpuProbe cpu = probe_cpu();
  const std::string path = choose_path(cpu, name);
  if (path == "avx512_vnni") return Isa::avx512_vnni;
  if (path == "avx2_vnni") return Isa::avx2_vnni;
  if (path == "avx2") return Isa::avx2;
  if (path == "neon_dotprod") return Isa::neon_dotprod;
  return Isa::portable;
}

Isa chosen_isa() {
  static const Isa isa = [] {
    const char *forced = std::getenv("PYMLLM_CPU_ISA");
    return isa_named(forced == nullptr ? "" : forced);
  }();
  return isa;
}

} // namespace pymllm
