// Which of the kernel paths to take, as an enum. The names and what each needs: cpu_probe.cpp.
//
// A path's code is in a file of its own (integer_avx2.cpp, ...) with its own compiler flags, and is reached through plain
// function pointers. Such a file instantiates no templates or inline functions of the standard library: the linker
// keeps one copy of each for the whole module, and a copy compiled for AVX-512 would then run on every CPU.
#pragma once

#include <string>

namespace pymllm {

enum class Isa { portable, neon_dotprod, avx2, avx2_vnni, avx512_vnni };

// The path for a name of known_paths(). Throws std::invalid_argument for another name or one this CPU cannot run.
Isa isa_named(const std::string &name);

// The path that probe() reports: the CPU's best, or what PYMLLM_CPU_ISA forced when this was first called.
// Throws std::invalid_argument as choose_path does.
Isa chosen_isa();

} // namespace pymllm
