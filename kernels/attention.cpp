#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "float_scalar.h"
#include "scratch.h"
#include "threads.h"
#include "vector_portable.h"

namespace pymllm {
namespace {

#include "attention_kernel.h"

const AttentionPath &path_of(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == Isa::avx512_vnni) return attention_avx512();
  if (isa == Isa::avx2 || isa == Isa::avx2_vnni) return attention_avx2();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
  if (isa == Isa::neon_dotprod) return attention_neon();
#endif
  (void)isa;
  return attention_portable();
}

constexpr std::int64_t kPieceKeys = 512; // of a decoding request, at least, in a piece
constexpr std::int64_t kMostPieces = 16;

std::int64_t element_bytes(KVElement element) {
  return element == KVElement::f32 ? 4 : element == KVElement::bf16 || element == KVElement::f16 ? 2 : 1;
}

// A tile of a decoding request that is computed in pieces: `count` of them from the first in the list.
struct Split {
  AttentionTile whole;
  std::int64_t first, count;
};

} // namespace

const AttentionPath &attention_portable() { return kAttention; }

void attention(const Attention &problem, Isa isa, int threads) {
  const AttentionPath &path = path_of(isa);
  const std::int64_t group = problem.heads / problem.kv_heads;
  std::vector<AttentionTile> tiles;
  std::vector<Split> splits;
  std::int64_t pieces = 0, most_rows = 1, work = 0;
  for (std::int64_t request = 0; request < problem.requests; ++request) {
    const std::int64_t fresh = problem.query_starts[request + 1] - problem.query_starts[request];
    const std::int64_t length = problem.lengths[request], rows = fresh * group;
    const std::int64_t size = rows <= path.few_rows ? path.few_rows : path.many_rows;
    for (std::int64_t row = 0; row < rows; row += size) {
      AttentionTile tile;
      tile.request = request;
      tile.row_begin = row;
      tile.rows = std::min(size, rows - row);
      tile.key_begin = seen_at(problem, request, length - fresh + row / group).begin;
      tile.key_end = seen_at(problem, request, length - fresh + (row + tile.rows - 1) / group).end;
      most_rows = std::max(most_rows, tile.rows);
      const std::int64_t keys = tile.key_end - tile.key_begin;
      // 8 rows of 160 keys take 10 us: of few rows, one and a key cost as much as two elements read.
      const std::int64_t row_bytes = rows <= path.few_rows ? tile.rows / 2 : tile.rows / 16;
      work += keys * problem.kv_heads * (problem.k.size + problem.v.size) *
              std::max(element_bytes(problem.k.element), row_bytes);
      const std::int64_t piece = std::max(kPieceKeys, (keys / kMostPieces + kKeys) / kKeys * kKeys);
      for (tile.kv_head = 0; tile.kv_head < problem.kv_heads; ++tile.kv_head) {
        if (rows > path.few_rows || keys <= piece) {
          tiles.push_back(tile);
          continue;
        }
        splits.push_back({tile, pieces, (keys + piece - 1) / piece});
        for (std::int64_t key = tile.key_begin; key < tile.key_end; key += piece) {
          AttentionTile part = tile;
          part.key_begin = key;
          part.key_end = std::min(key + piece, tile.key_end);
          part.partial = reinterpret_cast<float *>(1); // placed below, once their number is known
          tiles.push_back(part);
          ++pieces;
        }
      }
    }
  }
  if (tiles.empty()) return;
  thread_local Scratch partial_scratch;
  const std::int64_t width = path.few_rows * (problem.v.size + 2);
  float *partials = pieces > 0 ? partial_scratch.floats(pieces * width) : nullptr;
  std::int64_t placed = 0;
  for (AttentionTile &tile : tiles)
    if (tile.partial != nullptr) tile.partial = partials + placed++ * width;

  const std::int64_t scratch = path.scratch_floats(problem, most_rows);
  run_with_scratch(static_cast<std::int64_t>(tiles.size()), scratch, worthwhile_threads(work, threads),
            [&](std::int64_t i, float *mine) { path.tile(problem, tiles[static_cast<std::size_t>(i)], mine); });
  if (splits.empty()) return;
  run_with_scratch(static_cast<std::int64_t>(splits.size()), scratch,
            worthwhile_threads(pieces * width * static_cast<std::int64_t>(sizeof(float)), threads),
            [&](std::int64_t i, float *mine) {
              const Split &split = splits[static_cast<std::size_t>(i)];
              path.combine(problem, split.whole, partials + split.first * width, split.count, width, mine);
            });
}

void store_kv(const void *x, FloatType type, std::int64_t x_stride, const KVRows &rows, const std::int64_t *slots,
              std::int64_t tokens, std::int64_t kv_heads, Isa isa, int threads) {
  const AttentionPath &path = path_of(isa);
  const std::int64_t bytes = tokens * kv_heads * rows.size * (type == FloatType::f32 ? 8 : 4);
  parallel_for(tokens, worthwhile_threads(bytes, threads), [&](std::int64_t begin, std::int64_t end) {
    path.store(x, type, x_stride, rows, slots, kv_heads, begin, end);
  });
}

} // namespace pymllm
