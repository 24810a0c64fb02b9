// The Python face of tape.h.
#include "tape.h"

#include <nanobind/nanobind.h>

#include <utility>

#include "released.h"

namespace nb = nanobind;

namespace pymllm {

Tape *&recording() {
  thread_local Tape *tape = nullptr;
  return tape;
}

namespace {

// A thread's calls go to this tape, or to none. A tape that is recorded lives, whoever has forgotten it.
void record(nb::handle tape) {
  thread_local PyObject *held = nullptr;
  Tape *const next = tape.is_valid() ? nb::cast<Tape *>(tape) : nullptr;
  PyObject *const before = std::exchange(held, tape.inc_ref().ptr());
  recording() = next;
  Py_XDECREF(before);
}

} // namespace

void register_tape(nb::module_ &m) {
  nb::class_<Tape>(m, "Tape")
      .def(nb::init<>())
      .def("record", [](nb::handle tape) { record(tape); }, nb::sig("def record(self) -> None"),
           "Note down this thread's native calls, until stop().")
      .def("stop", [](Tape &tape) {
        if (recording() == &tape) record(nb::handle());
      })
      .def("__len__", &Tape::length)
      .def("bytes", &Tape::bytes)
      .def("play", &Tape::play, nb::call_guard<Released>(), nb::arg("begin"), nb::arg("end"));
}

} // namespace pymllm
