// A tape: the native calls of a decoding step, kept so that they can be made again without Python in between.
//
// While a thread records, every function bound with `Recorded` makes its call and notes it down, arguments and all.
// Arguments are addresses and numbers; who plays a tape answers for the memory being there, and for what it holds
// (pymllm/engine/tape.py).
#pragma once

#include <cstddef>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

namespace pymllm {

class Tape {
public:
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  std::size_t length() const { return calls_.size(); }
  void play(std::size_t begin, std::size_t end) const {
    for (std::size_t i = begin; i < end && i < calls_.size(); ++i) calls_[i]();
  }

private:
  std::vector<std::function<void()>> calls_;
};

// The tape that this thread records on; null: none.
Tape *&recording();

template <auto Function> struct Recorded;
template <class... Arguments, void (*Function)(Arguments...)> struct Recorded<Function> {
  static_assert((std::is_trivially_destructible_v<std::decay_t<Arguments>> && ...), "a tape keeps numbers and addresses");
  static void call(Arguments... arguments) {
    if (Tape *tape = recording()) tape->add([=] { Function(arguments...); });
    Function(arguments...);
  }
};

} // namespace pymllm
