// The binding's guard: while a kernel runs, other Python threads may.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <thread>

namespace pymllm {

// Gives the GIL up, and takes it again. Before Python 3.14, a daemon thread that asks for it while the interpreter ends
// is unwound by pthread_exit, which no destructor survives ("terminate called without an active exception"): here it
// sleeps until the process has ended, as later Pythons have it.
class Released {
public:
  Released() : state_(PyEval_SaveThread()) {}
  Released(const Released &) = delete;
  Released &operator=(const Released &) = delete;
  ~Released() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) { // the unwinding itself; to leave would end the process
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

private:
  PyThreadState *state_;
};

} // namespace pymllm
