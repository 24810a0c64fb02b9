// The Python face of the native CPU kernels: the module pymllm._native. Conversions only; the work is in the other files.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdlib>

#include "checks.h"
#include "cpu_probe.h"
#include "lane_sums.h"

namespace nb = nanobind;

namespace pymllm {
void register_attention(nb::module_ &m);
void register_float(nb::module_ &m);
void register_integer(nb::module_ &m);
void register_recurrence(nb::module_ &m);
void register_sampling(nb::module_ &m);
void register_stored_codes(nb::module_ &m);
void register_tape(nb::module_ &m);
void register_watch(nb::module_ &m);
} // namespace pymllm

namespace {

nb::dict probe() {
  const pymllm::CpuProbe cpu = pymllm::probe_cpu();
  const char *forced = std::getenv("PYMLLM_CPU_ISA");

  nb::dict features;
  for (const auto &[name, present] : cpu.features) features[name.c_str()] = present;
  nb::list runnable_paths;
  for (const auto &path : cpu.runnable_paths) runnable_paths.append(path);

  nb::dict result;
  result["arch"] = cpu.arch;
  result["vendor"] = cpu.vendor;
  result["brand"] = cpu.brand;
  result["features"] = features;
  result["runnable_paths"] = runnable_paths;
  result["best_path"] = pymllm::choose_path(cpu, forced == nullptr ? "" : forced);
  result["logical_cpus"] = cpu.logical_cpus;
  result["physical_cores"] = cpu.physical_cores;
  result["l1d_bytes"] = cpu.l1d_bytes;
  result["l2_bytes"] = cpu.l2_bytes;
  result["l3_bytes"] = cpu.l3_bytes;
  result["transparent_huge_pages"] = cpu.transparent_huge_pages;
  return result;
}

nb::bytes lane_sums(std::uintptr_t address, std::size_t count) {
  const auto *bytes = reinterpret_cast<const unsigned char *>(address);
  pymllm::check_address("the bytes to sum", bytes, count > 0);
  pymllm::LaneSums sums;
  {
    nb::gil_scoped_release others_run;
    sums = pymllm::lane_sums(bytes, count);
  }
  return nb::bytes(sums.data(), sizeof sums);
}

// A refusal is an error of ours in Python. Where our errors cannot be had, what stands in the way is raised instead.
void raise_refusal(const std::exception_ptr &thrown, void *) {
  try {
    std::rethrow_exception(thrown);
  } catch (const pymllm::Refusal &refusal) {
    try {
      const nb::object kind = nb::module_::import_("pymllm.errors").attr(refusal.index ? "IndicesError" : "ConfigError");
      const nb::object error =
          kind(refusal.message, nb::arg("code") = "native-call", nb::arg("expected") = refusal.expected,
               nb::arg("found") = refusal.found);
      PyErr_SetObject(kind.ptr(), error.ptr());
    } catch (nb::python_error &error) {
      error.restore();
    }
  }
}

} // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of pymllm. Use them through pymllm.kernels.native.extension.";
#if !defined(__SANITIZE_ADDRESS__)
  // What lives at the end of a process is no leak: a daemon thread never lets go of the tape that it plays.
  nb::set_leak_warnings(false);
#endif
  nb::register_exception_translator(raise_refusal);
  // std::invalid_argument becomes ValueError.
  m.def("probe", &probe, "What this CPU can run; PYMLLM_CPU_ISA forces a kernel path (ValueError if it cannot).");
  m.def("lane_sums", &lane_sums, "The sums of lane_sums.h over `count` bytes at an address: 16 words of 64 bits.");
  pymllm::register_attention(m);
  pymllm::register_float(m);
  pymllm::register_integer(m);
  pymllm::register_recurrence(m);
  pymllm::register_sampling(m);
  pymllm::register_stored_codes(m);
  pymllm::register_tape(m);
  pymllm::register_watch(m);
}
