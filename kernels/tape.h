// A tape: the native calls of a decoding step, kept so that they can be made again without Python in between.
//
// While a thread records, every function bound with `Recorded` makes its call and notes it down, arguments and all.
// Arguments are addresses and numbers; who plays a tape answers for the memory being there, and for what it holds
// (pymllm/engine/tape.py).
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace pymllm {

// Calls lie one behind the other: each begins with cold caches, and one on a heap would miss them three times.
class Tape {
public:
  // call: what takes the arguments, a tuple, from an address.
  template <class Arguments>
  void add(void (*call)(const void *), const Arguments &arguments) {
    static_assert(std::is_trivially_destructible_v<Arguments>, "a tape keeps numbers and addresses");
    starts_.push_back(words_.size());
    words_.resize(words_.size() + 1 + (sizeof arguments + sizeof(Word) - 1) / sizeof(Word));
    Word *at = words_.data() + starts_.back();
    at->call = call;
    new (at + 1) Arguments(arguments);
  }
  std::size_t length() const { return starts_.size(); }
  std::size_t bytes() const { return words_.capacity() * sizeof(Word) + starts_.capacity() * sizeof starts_[0]; }
  void play(std::size_t begin, std::size_t end) const {
    for (std::size_t i = begin; i < end && i < starts_.size(); ++i) {
      const Word *at = words_.data() + starts_[i];
      at->call(at + 1);
    }
  }

private:
  union alignas(16) Word {
    void (*call)(const void *);
    unsigned char bytes[16];
  };
  std::vector<Word> words_;
  std::vector<std::size_t> starts_;
};

// The tape that this thread records on; null: none.
Tape *&recording();

template <auto Function> struct Recorded;
template <class... Arguments, void (*Function)(Arguments...)> struct Recorded<Function> {
  using Kept = std::tuple<std::decay_t<Arguments>...>;
  static void again(const void *kept) { std::apply(Function, *static_cast<const Kept *>(kept)); }
  static void call(Arguments... arguments) {
    if (Tape *tape = recording()) tape->add(again, Kept(arguments...));
    Function(arguments...);
  }
};

} // namespace pymllm
