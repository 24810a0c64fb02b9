// Attention of one step, causal, by blocks or in both directions: the queries of all requests over what their pages hold, with float32 arithmetic; and
// storing new keys and values there.
//
// The query heads that share a key head are rows of one tile. Two regimes, told apart by the rows a tile has:
//   few    (decoding) lanes along the head size: a row meets the keys by dot products
//   many   (prompts) lanes along the rows: keys and values are read one number at a time, for all rows at once
// Both widen a block of keys and values to float32 first, whatever they are stored as, and keep a running maximum and
// sum of the softmax. A decoding request with many keys is cut into pieces that depend on its length alone; their sums
// are combined in order. So a row's result depends neither on the threads nor on the requests beside it.
#pragma once

#include <cstdint>

#include "float_linear.h"

namespace pymllm {

enum class KVElement { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, e4m3 = 4 };

// Keys or values of one layer, a row for each slot: [slots, kv_heads, size].
struct KVRows {
  void *data = nullptr;
  KVElement element = KVElement::f32;
  std::int64_t size = 0;       // of a head
  std::int64_t row_stride = 0; // elements from slot to slot
  // A value is its element times its scale. null: as they are; scale_stride 0: one for each head, [kv_heads]; else one
  // for each slot and head, [slots, kv_heads].
  float *scales = nullptr;
  std::int64_t scale_stride = 0;
};

struct Attention {
  const void *q = nullptr; // [T, heads, size], tokens q_stride elements apart
  void *y = nullptr;       // [T, heads, value size], contiguous
  FloatType type = FloatType::f32;
  std::int64_t q_stride = 0;
  KVRows k, v;
  // [requests, page_columns]: position p of a request is in slot pages[p / page_size] * page_size + p % page_size.
  // null: its keys are the rows of its new tokens.
  const std::int32_t *pages = nullptr;
  std::int64_t page_columns = 0, page_size = 1;
  const std::int32_t *query_starts = nullptr; // [requests + 1]
  const std::int32_t *lengths = nullptr;      // [requests], new tokens included
  const float *sinks = nullptr;               // [heads], or null
  std::int64_t requests = 0, heads = 0, kv_heads = 1;
  float scale = 1.0f;
  float soft_cap = 0.0f;   // 0: none
  std::int64_t window = 0; // positions that a query sees, its own included; 0: all
  bool bidirectional = false; // a query sees what comes after it, too: to the end, or as far as the window reaches back
  // A query at position p sees the whole block of so many positions that p is in, as far as its request goes; 1: up to p.
  std::int64_t block = 1;
  const std::int32_t *states = nullptr; // [requests]: those in state 0 see up to p, whatever `block` says; null: none
  // [requests]: positions from holes up to hole_ends that nobody sees, unless they are new; null: none.
  const std::int32_t *holes = nullptr, *hole_ends = nullptr;
};

void attention(const Attention &problem, Isa isa, int threads);

// x: [tokens, kv_heads, size], tokens x_stride elements apart, go to the slots; those below 0 nowhere. int8 elements
// get a scale for each slot and head, float elements none.
void store_kv(const void *x, FloatType type, std::int64_t x_stride, const KVRows &rows, const std::int64_t *slots,
              std::int64_t tokens, std::int64_t kv_heads, Isa isa, int threads);

// Rows of one key head of one request: row r is its new token r / group, query head r % group of the group.
struct AttentionTile {
  std::int64_t request = 0, kv_head = 0;
  std::int64_t row_begin = 0, rows = 0;
  std::int64_t key_begin = 0, key_end = 0; // positions; a row may see fewer
  float *partial = nullptr; // null: the tile's results are final; else [rows, 2 + value size]: maximum, sum, weighted sum
};

// What one instruction set brings; each in a file of its own (attention_avx512.cpp, ...).
struct AttentionPath {
  std::int64_t few_rows, many_rows; // a tile's, at most, in each regime
  std::int64_t (*scratch_floats)(const Attention &problem, std::int64_t rows);
  void (*tile)(const Attention &problem, const AttentionTile &tile, float *scratch);
  // The result of a tile from the partials of its `pieces`, piece_floats apart.
  void (*combine)(const Attention &problem, const AttentionTile &tile, const float *partials, std::int64_t pieces,
                  std::int64_t piece_floats, float *scratch);
  void (*store)(const void *x, FloatType type, std::int64_t x_stride, const KVRows &rows, const std::int64_t *slots,
                std::int64_t kv_heads, std::int64_t begin, std::int64_t end);
};

const AttentionPath &attention_portable();
#if defined(__x86_64__) || defined(_M_X64)
const AttentionPath &attention_avx2();
const AttentionPath &attention_avx512();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
const AttentionPath &attention_neon();
#endif

} // namespace pymllm
