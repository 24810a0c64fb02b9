# kernel_sources and kernel_definitions: the kernels without their Python face, each file with its flags. Included by
# CMakeLists.txt, and by tests/kernels/arm for another processor.
#
# No -march for all of them: the module must load on any CPU of its architecture. A kernel written for one instruction
# set is a file of its own, gets its flags here, and is only called on the path that probe() names. The files without
# flags stand first: of an inline function that two files emit, the linker keeps the first copy.
set(kernel_sources)
set(kernel_definitions)

macro(add_kernels flags)
  foreach(name ${ARGN})
    list(APPEND kernel_sources "${CMAKE_CURRENT_LIST_DIR}/${name}.cpp")
    set_source_files_properties("${CMAKE_CURRENT_LIST_DIR}/${name}.cpp" PROPERTIES COMPILE_FLAGS "${flags}")
  endforeach()
endmacro()

add_kernels("" attention checks cpu_probe elementwise float_linear integer integer_experts integer_portable isa
  lane_sums pointwise sampling stored_codes threads)
set(roofline_flags "")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(roofline_flags "-Wno-uninitialized")
endif()
add_kernels("${roofline_flags}" roofline)
# No product and sum become one operation but where the source says so: rows of a table are code * scale + offset,
# rounded twice as torch does it; on ARM a token's portable product must not depend on how many others are beside it; a
# recurrence has the same loop for the last token of a step and for others.
set(as_written "")
if(NOT MSVC)
  set(as_written "-ffp-contract=off")
endif()
add_kernels("${as_written}" float_linear_portable integer_pack recurrence)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  if(MSVC)
    set(avx2_flags "/arch:AVX2")
    set(avx2vnni_flags "/arch:AVX2")
    set(avx512vnni_flags "/arch:AVX512")
  else()
    set(avx2_flags "-mavx2 -mfma -mf16c")
    set(avx2vnni_flags "${avx2_flags} -mavxvnni")
    set(avx512vnni_flags "${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni")
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU") # gcc 12 warns of its own _mm512_undefined_*
      string(APPEND avx512vnni_flags " -Wno-uninitialized -Wno-maybe-uninitialized")
    endif()
  endif()
  add_kernels("${avx2_flags}" attention_avx2 elementwise_avx2 float_linear_avx2 integer_avx2 sampling_avx2)
  add_kernels("${avx2vnni_flags}" integer_avx2vnni)
  add_kernels("${avx2_flags} ${as_written}" recurrence_avx2)
  add_kernels("${avx512vnni_flags}" attention_avx512 elementwise_avx512 float_linear_avx512 sampling_avx512)
  add_kernels("${avx512vnni_flags} ${as_written}" recurrence_avx512)
  if(NOT MSVC) # GNU asm
    add_kernels("${avx512vnni_flags}" integer_avx512vnni)
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64" AND NOT MSVC)
  include(CheckCXXSourceCompiles)
  set(neon_flags "-march=armv8.2-a+dotprod")
  set(CMAKE_REQUIRED_FLAGS "${neon_flags}")
  check_cxx_source_compiles("#include <arm_neon.h>
    int main() { return vgetq_lane_s32(vdotq_laneq_s32(vdupq_n_s32(0), vdupq_n_s8(1), vdupq_n_s8(1), 3), 0); }"
    PYMLLM_COMPILES_DOTPROD)
  unset(CMAKE_REQUIRED_FLAGS)
  if(PYMLLM_COMPILES_DOTPROD)
    list(APPEND kernel_definitions PYMLLM_NEON_DOTPROD)
    add_kernels("" attention_neon elementwise_neon float_linear_neon sampling_neon) # every 64-bit ARM has what these use
    add_kernels("${as_written}" recurrence_neon)
    add_kernels("${neon_flags}" integer_neon)
  endif()
endif()
