// The Python face of tape.h.
#include "tape.h"

#include <nanobind/nanobind.h>

#include "released.h"

namespace nb = nanobind;

namespace pymllm {

Tape *&recording() {
  thread_local Tape *tape = nullptr;
  return tape;
}

void register_tape(nb::module_ &m) {
  nb::class_<Tape>(m, "Tape")
      .def(nb::init<>())
      .def("record", [](Tape &tape) { recording() = &tape; }, "Note down this thread's native calls, until stop().")
      .def("stop", [](Tape &tape) {
        if (recording() == &tape) recording() = nullptr;
      })
      .def("__len__", &Tape::length)
      .def("bytes", &Tape::bytes)
      .def("play", &Tape::play, nb::call_guard<Released>(), nb::arg("begin"), nb::arg("end"));
}

} // namespace pymllm
