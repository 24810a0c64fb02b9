// The Python face of attention.h. Tensors come checked by pymllm/kernels/native/attention.py; what they hold is checked here.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "attention.h"
#include "checks.h"
#include "isa.h"
#include "released.h"
#include "tape.h"

namespace nb = nanobind;

namespace pymllm {
namespace {

template <class T> T *at(std::uintptr_t address) { return reinterpret_cast<T *>(address); }

KVRows rows_at(std::uintptr_t data, int element, std::int64_t size, std::int64_t row_stride, std::uintptr_t scales,
               std::int64_t scale_stride) {
  check_number("the type of keys and values", element, 0, static_cast<int>(KVElement::e4m3));
  check_side("the size of a head", size, 1);
  check_side("the stride of keys and values", row_stride);
  check_address("keys and values", at<void>(data));
  return {at<void>(data), static_cast<KVElement>(element), size, row_stride, at<float>(scales), scale_stride};
}

// tokens: new ones, of all requests.  page_count: what the cache has; below 0: there is none.
void check(const Attention &problem, std::int64_t tokens, std::int64_t page_count) {
  check_number("the dtype", static_cast<int>(problem.type), 0, static_cast<int>(FloatType::f16));
  check_side("the number of key heads", problem.kv_heads, 1);
  check_number("query heads that are left over, shared among key heads", problem.heads % problem.kv_heads, 0, 0);
  check_side("the number of query heads", problem.heads, 1);
  check_side("block_size", problem.block, 1);
  check_side("sliding_window", problem.window);
  check_address("queries", problem.q, tokens > 0);
  check_requests(problem.query_starts, problem.lengths, problem.requests, tokens);
  if (page_count < 0) return check_all_new(problem.query_starts, problem.lengths, problem.requests);
  check_side("page_size", problem.page_size, 1);
  check_pages(problem.pages, problem.page_columns, problem.page_size, page_count, problem.lengths, problem.requests);
}

void attention_(std::uintptr_t q, std::uintptr_t y, int type, std::int64_t q_stride, std::uintptr_t k,
                std::uintptr_t k_scales, std::int64_t k_size, std::int64_t k_stride, std::uintptr_t v,
                std::uintptr_t v_scales, std::int64_t v_size, std::int64_t v_stride, int element,
                std::int64_t scale_stride, std::uintptr_t pages, std::int64_t page_columns, std::int64_t page_size,
                std::int64_t page_count, std::int64_t tokens, std::uintptr_t query_starts, std::uintptr_t lengths, std::int64_t requests, std::int64_t block,
                std::uintptr_t states, std::uintptr_t holes, std::uintptr_t hole_ends, std::uintptr_t sinks,
                std::int64_t heads, std::int64_t kv_heads, float scale, float soft_cap, std::int64_t window,
                bool bidirectional, int isa, int threads) {
  Attention problem;
  problem.q = at<void>(q);
  problem.y = at<void>(y);
  problem.type = static_cast<FloatType>(type);
  problem.q_stride = q_stride;
  problem.k = rows_at(k, element, k_size, k_stride, k_scales, scale_stride);
  problem.v = rows_at(v, element, v_size, v_stride, v_scales, scale_stride);
  problem.pages = page_count < 0 ? nullptr : at<std::int32_t>(pages);
  problem.page_columns = page_columns;
  problem.page_size = page_size;
  problem.query_starts = at<std::int32_t>(query_starts);
  problem.lengths = at<std::int32_t>(lengths);
  problem.requests = requests;
  problem.block = block;
  problem.states = at<std::int32_t>(states);
  problem.holes = at<std::int32_t>(holes);
  problem.hole_ends = at<std::int32_t>(hole_ends);
  problem.sinks = at<float>(sinks);
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.scale = scale;
  problem.soft_cap = soft_cap;
  problem.window = window;
  problem.bidirectional = bidirectional;
  check(problem, tokens, page_count);
  attention(problem, static_cast<Isa>(isa), threads);
}

void store_kv_(std::uintptr_t x, int type, std::int64_t x_stride, std::uintptr_t data, int element, std::int64_t size,
               std::int64_t row_stride, std::uintptr_t scales, std::uintptr_t slots, std::int64_t slot_count,
               std::int64_t tokens, std::int64_t kv_heads, int isa, int threads) {
  const KVRows rows = rows_at(data, element, size, row_stride, scales, kv_heads);
  check_number("the dtype", type, 0, static_cast<int>(FloatType::f16));
  check_side("the number of tokens", tokens);
  check_address("new keys and values", at<void>(x), tokens > 0);
  check_address("slot_mapping", at<void>(slots), tokens > 0);
  check_indices("slot_mapping names a slot that the cache does not have", at<std::int64_t>(slots), tokens, INT64_MIN,
                slot_count);
  store_kv(at<void>(x), static_cast<FloatType>(type), x_stride, rows, at<std::int64_t>(slots), tokens, kv_heads,
           static_cast<Isa>(isa), threads);
}

} // namespace

void register_attention(nb::module_ &m) {
  const auto released = nb::call_guard<Released>();
  m.def("attention", &Recorded<&attention_>::call, released, "See kernels/attention.h.");
  m.def("store_kv", &Recorded<&store_kv_>::call, released, "See kernels/attention.h.");
}

} // namespace pymllm
