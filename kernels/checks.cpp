#include "checks.h"

#include <algorithm>
#include <vector>

namespace pymllm {
namespace {

std::string number(std::int64_t value) { return std::to_string(value); }

std::string between(std::int64_t least, std::int64_t most) {
  if (most < least) return "none";
  if (most >= kLargestSide) return number(least) + " or more";
  // Where negative numbers stand for nothing, all of them do.
  return (least == INT64_MIN ? "any up to " : number(least) + " to ") + number(most);
}

} // namespace

void refuse_number(const char *name, std::int64_t least, std::int64_t most, std::int64_t found) {
  throw Refusal(std::string(name) + " is out of range", between(least, most), number(found));
}

void refuse_address(const char *name) {
  throw Refusal(std::string(name) + ": the tensor lies nowhere in the memory of this process",
                "a tensor on the CPU with memory of its own", "the address 0");
}

void refuse_index(const char *name, std::int64_t least, std::int64_t end, std::int64_t found, std::int64_t place) {
  throw Refusal(name, between(least, end - 1), number(found) + " at " + number(place), true);
}

void check_requests(const std::int32_t *starts, const std::int32_t *lengths, std::int64_t requests,
                    std::int64_t tokens) {
  check_side("the number of requests", requests);
  check_address("cu_seqlens_q", starts);
  check_address("context_lens", lengths, requests > 0);
  if (starts[0] != 0 || starts[requests] != tokens)
    throw Refusal("cu_seqlens_q must go from 0 to " + number(tokens) + ", the number of new tokens",
                  "0 to " + number(tokens), number(starts[0]) + " to " + number(starts[requests]), true);
  for (std::int64_t i = 0; i < requests; ++i) {
    const std::int64_t fresh = std::int64_t{starts[i + 1]} - starts[i];
    if (fresh < 0)
      throw Refusal("request " + number(i) + " must have from 0 to all of its tokens (context_lens) in a step",
                    "cu_seqlens_q that rises", number(starts[i]) + ", then " + number(starts[i + 1]), true);
    if (lengths[i] < fresh)
      throw Refusal("request " + number(i) + " has more new tokens (cu_seqlens_q) than tokens in all (context_lens)",
                    "context_lens of " + number(fresh) + " or more", number(lengths[i]), true);
  }
}

void check_all_new(const std::int32_t *starts, const std::int32_t *lengths, std::int64_t requests) {
  for (std::int64_t i = 0; i < requests; ++i)
    if (lengths[i] != starts[i + 1] - starts[i])
      throw Refusal("without a cache, context_lens must be the numbers of new tokens (cu_seqlens_q), as there are no others",
                    number(starts[i + 1] - starts[i]) + " for request " + number(i), number(lengths[i]), true);
}

void check_pages(const std::int32_t *pages, std::int64_t columns, std::int64_t page_size, std::int64_t count,
                 const std::int32_t *lengths, std::int64_t requests) {
  for (std::int64_t i = 0; i < requests; ++i) {
    const std::int64_t held = (lengths[i] + page_size - 1) / page_size;
    if (held > columns)
      throw Refusal("a request has more tokens (context_lens) than page_tables has room for",
                    "up to " + number(columns) + " pages of " + number(page_size) + " tokens",
                    number(lengths[i]) + " tokens of request " + number(i), true);
    check_address("page_tables", pages, held > 0);
    check_indices("page_tables names a page that the cache does not have", pages + i * columns, held, 0, count);
  }
}

void check_states(const std::int64_t *slots, std::int64_t requests, std::int64_t count) {
  for (std::int64_t i = 0; i < requests; ++i)
    if (slots[i] >= count)
      throw Refusal("state_slots must be below the " + number(count) + " slots of the state, not " + number(slots[i]),
                    "0 to " + number(count - 1) + ", or below 0 for none", number(slots[i]), true);
  if (requests < 2) return;
  thread_local std::vector<std::int64_t> sorted;
  sorted.assign(slots, slots + requests);
  std::sort(sorted.begin(), sorted.end());
  for (std::int64_t i = 1; i < requests; ++i)
    if (sorted[static_cast<std::size_t>(i)] >= 0 && sorted[static_cast<std::size_t>(i)] == sorted[static_cast<std::size_t>(i - 1)])
      throw Refusal("state_slots must name a slot for one request only", "other slots for other requests",
                    number(sorted[static_cast<std::size_t>(i)]) + " twice", true);
}

} // namespace pymllm
