// The loops of attention.h, over the `Lanes` and float16 conversions of a vector_*.h; included inside an anonymous
// namespace by one file for each instruction set.

#include "strips.h"

constexpr std::int64_t kKeys = 32; // keys and values widened at a time
constexpr std::int64_t kManyRows = 64;
constexpr std::int64_t kLanes = Lanes::kLanes;
constexpr int kColumns = kLanes == 16 ? 4 : 2; // vectors of a register tile, by 4 rows
constexpr float kUnseen = -1e30f;              // a logit below every real one; exp of it is 0

inline std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// --------------------------------------------------------------------------------------------------- keys and values

inline float from_e4m3(std::uint8_t code) {
  const std::uint32_t magnitude = code & 0x7fu, sign = static_cast<std::uint32_t>(code & 0x80u) << 24;
  const float value = float_of(sign | magnitude << 20) * float_of(0x7b800000u); // exponents differ by 120
  return magnitude == 0x7fu ? float_of(0x7fc00000u) : value;
}

inline void widen_row(const KVRows &rows, std::int64_t element, float scale, float *to) {
  const std::int64_t size = rows.size;
  switch (rows.element) {
  case KVElement::f32: read_strip(rows.data, element, size, FloatType::f32, to); break;
  case KVElement::bf16: read_strip(rows.data, element, size, FloatType::bf16, to); break;
  case KVElement::f16: read_strip(rows.data, element, size, FloatType::f16, to); break;
  case KVElement::int8: {
    const auto *codes = static_cast<const std::int8_t *>(rows.data) + element;
    for (std::int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(codes[i]) * scale;
    break;
  }
  case KVElement::e4m3: {
    const auto *codes = static_cast<const std::uint8_t *>(rows.data) + element;
    for (std::int64_t i = 0; i < size; ++i) to[i] = from_e4m3(codes[i]) * scale;
    break;
  }
  }
}

inline std::int64_t slot_of(const Attention &problem, std::int64_t request, std::int64_t position) {
  if (problem.pages == nullptr) return problem.query_starts[request] + position;
  const std::int64_t page = problem.pages[request * problem.page_columns + position / problem.page_size];
  return page * problem.page_size + position % problem.page_size;
}

// body(i, element, slot) for positions begin + i below end: where a head's row starts. Slots of a page follow one another.
template <class Body>
inline void each_row(const Attention &problem, const KVRows &rows, const AttentionTile &tile, std::int64_t begin,
                     std::int64_t end, const Body &body) {
  for (std::int64_t position = begin; position < end;) {
    std::int64_t slot = slot_of(problem, tile.request, position), last = end;
    if (problem.pages != nullptr) {
      last = position + problem.page_size - position % problem.page_size;
      last = last < end ? last : end;
    }
    for (; position < last; ++position, ++slot)
      body(position - begin, slot * rows.row_stride + tile.kv_head * rows.size, slot);
  }
}

// Positions [begin, begin + count) of one head as float32, `stride` apart.
inline void widen(const Attention &problem, const KVRows &rows, const AttentionTile &tile, std::int64_t begin,
                  std::int64_t count, std::int64_t stride, float *to) {
  each_row(problem, rows, tile, begin, begin + count, [&](std::int64_t i, std::int64_t element, std::int64_t slot) {
    const float scale = rows.scales != nullptr ? rows.scales[slot * rows.scale_stride + tile.kv_head] : 1.0f;
    widen_row(rows, element, scale, to + i * stride);
  });
}

// Asks for rows to come, [begin, end): while weights stream through the caches, pages are always cold.
inline void prefetch(const Attention &problem, const AttentionTile &tile, std::int64_t begin, std::int64_t end) {
  end = end < tile.key_end ? end : tile.key_end;
  const KVRows *both[2] = {&problem.k, &problem.v};
  for (const KVRows *rows : both) {
    const std::int64_t bytes = rows->element == KVElement::f32 ? 4 : rows->element <= KVElement::f16 ? 2 : 1;
    each_row(problem, *rows, tile, begin, end, [&](std::int64_t, std::int64_t element, std::int64_t) {
      const char *from = static_cast<const char *>(rows->data) + element * bytes;
      for (std::int64_t at = 0; at < rows->size * bytes; at += 64) prefetch_line(from + at);
    });
  }
}

// ------------------------------------------------------------------------------------------------------ small products

// c[i][j] = sum over k of a(i, k) * b[k][j], plus factor[j] * c[i][j] unless factor is null; R rows, W vectors of j.
template <int R, int W>
inline void multiply_tile(const float *a, std::int64_t a_row, std::int64_t a_step, const float *b, std::int64_t b_row,
                          float *c, std::int64_t c_row, std::int64_t depth, const float *factor) {
  Vec sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      const std::int64_t at = w * kLanes;
      sum[r][w] = factor == nullptr ? Lanes::zero()
                                    : Lanes::mul(Lanes::load(c + r * c_row + at), Lanes::load(factor + at));
    }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec right[W];
    PYMLLM_UNROLL
    for (int w = 0; w < W; ++w) right[w] = Lanes::load(b + k * b_row + w * kLanes);
    PYMLLM_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec left = Lanes::set1(a[r * a_row + k * a_step]);
      PYMLLM_UNROLL
      for (int w = 0; w < W; ++w) sum[r][w] = Lanes::fma(left, right[w], sum[r][w]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) Lanes::store(c + r * c_row + w * kLanes, sum[r][w]);
}

template <int W>
inline void multiply_rows(const float *a, std::int64_t a_row, std::int64_t a_step, const float *b, std::int64_t b_row,
                          float *c, std::int64_t c_row, std::int64_t rows, std::int64_t depth, const float *factor) {
  constexpr int R = W == 1 ? 8 : 4;
  std::int64_t i = 0;
  for (; i + R <= rows; i += R)
    multiply_tile<R, W>(a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row, depth, factor);
  for (; i < rows; ++i) multiply_tile<1, W>(a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row, depth, factor);
}

// columns: a multiple of the lanes.
inline void multiply(const float *a, std::int64_t a_row, std::int64_t a_step, const float *b, std::int64_t b_row,
                     float *c, std::int64_t c_row, std::int64_t rows, std::int64_t columns, std::int64_t depth,
                     const float *factor) {
  std::int64_t j = 0;
  const auto at = [&](std::int64_t column) { return factor == nullptr ? nullptr : factor + column; };
  for (; j + kColumns * kLanes <= columns; j += kColumns * kLanes)
    multiply_rows<kColumns>(a, a_row, a_step, b + j, b_row, c + j, c_row, rows, depth, at(j));
  for (; j < columns; j += kLanes)
    multiply_rows<1>(a, a_row, a_step, b + j, b_row, c + j, c_row, rows, depth, at(j));
}

// s[r][k] = q[r] . keys[k], for rows and keys `stride` apart, padded with zeros; keys in blocks of the lanes.
inline void dot_products(const float *q, const float *keys, std::int64_t stride, std::int64_t rows, std::int64_t count,
                         float *s) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t k = 0; k < count; k += kLanes) {
      Vec sum[kLanes];
      PYMLLM_UNROLL_LANES
      for (int i = 0; i < kLanes; ++i) sum[i] = Lanes::zero();
      for (std::int64_t d = 0; d < stride; d += kLanes) {
        const Vec left = Lanes::load(q + r * stride + d);
        PYMLLM_UNROLL_LANES
        for (int i = 0; i < kLanes; ++i) sum[i] = Lanes::fma(left, Lanes::load(keys + (k + i) * stride + d), sum[i]);
      }
      Lanes::store(s + r * kKeys + k, Lanes::fold(sum));
    }
}

// ------------------------------------------------------------------------------------------------------------- softmax

inline float weight_of(float logit, float maximum) {
  const float below = logit - maximum;
  const float value = exponential(below);
  return below < -87.0f ? 0.0f : value;
}

// cap * tanh(v / cap)
inline float capped(float v, float cap, float inverse) {
  const float x = v * inverse, size = x < 0.0f ? -x : x;
  const float e = exponential(-2.0f * size);
  const float square = x * x; // near 0, where 1 - e cancels
  const float series = size * (1.0f - square * (0.33333333f - square * (0.13333333f - square * 0.053968254f)));
  const float ratio = (1.0f - e) / (1.0f + e);
  const float tanh = size < 0.1f ? series : ratio;
  return cap * (x < 0.0f ? -tanh : tanh);
}

inline void cap_logits(float *s, std::int64_t count, float cap) {
  const float inverse = 1.0f / cap;
  for (std::int64_t i = 0; i < count; ++i) s[i] = capped(s[i], cap, inverse);
}

// The positions that a row sees: [begin, end).
struct Seen {
  std::int64_t begin, end;
};

// What the token at a position of a request sees.
inline Seen seen_at(const Attention &problem, std::int64_t request, std::int64_t position) {
  const std::int64_t length = problem.lengths[request], window = problem.window;
  const bool causal = problem.states != nullptr && problem.states[request] == 0;
  const std::int64_t block = causal ? 1 : problem.block, block_end = (position / block + 1) * block;
  std::int64_t end = block_end < length ? block_end : length;
  if (problem.bidirectional) end = window > 0 && window < length - position ? position + window : length;
  return {window > 0 && position + 1 > window ? position + 1 - window : 0, end};
}

inline Seen seen_by(const Attention &problem, const AttentionTile &tile, std::int64_t row) {
  const std::int64_t fresh = problem.query_starts[tile.request + 1] - problem.query_starts[tile.request];
  const std::int64_t token = (tile.row_begin + row) / (problem.heads / problem.kv_heads);
  return seen_at(problem, tile.request, problem.lengths[tile.request] - fresh + token);
}

// The positions that no row sees.
inline Seen hole_of(const Attention &problem, std::int64_t request) {
  if (problem.holes == nullptr) return {0, 0};
  const std::int64_t fresh = problem.query_starts[request + 1] - problem.query_starts[request];
  const std::int64_t cached = problem.lengths[request] - fresh, end = problem.hole_ends[request];
  return {problem.holes[request], end < cached ? end : cached};
}

// hide(i) for those of the positions begin + i below begin + count that lie in the hole.
template <class Hide>
inline void each_hidden(const Seen &hole, std::int64_t begin, std::int64_t count, const Hide &hide) {
  const std::int64_t last = hole.end - begin < count ? hole.end - begin : count;
  for (std::int64_t i = hole.begin > begin ? hole.begin - begin : 0; i < last; ++i) hide(i);
}

// Where a row's query, and its result, lie.
inline std::int64_t token_of(const Attention &problem, const AttentionTile &tile, std::int64_t row) {
  return problem.query_starts[tile.request] + (tile.row_begin + row) / (problem.heads / problem.kv_heads);
}
inline std::int64_t head_of(const Attention &problem, const AttentionTile &tile, std::int64_t row) {
  const std::int64_t group = problem.heads / problem.kv_heads;
  return tile.kv_head * group + (tile.row_begin + row) % group;
}

// The factors that make a row's weighted sum its result: its sink takes part in the softmax here.
inline float final_factor(const Attention &problem, std::int64_t head, float maximum, float sum) {
  if (problem.sinks == nullptr) return 1.0f / sum;
  const float sink = problem.sinks[head], top = sink > maximum ? sink : maximum;
  const float mine = weight_of(maximum, top);
  return mine / (sum * mine + weight_of(sink, top));
}

inline void write_row(const Attention &problem, const AttentionTile &tile, std::int64_t row, float maximum, float sum,
                      float *weighted) {
  const std::int64_t size = problem.v.size, head = head_of(problem, tile, row);
  if (tile.partial != nullptr) {
    float *to = tile.partial + row * (size + 2);
    to[0] = maximum;
    to[1] = sum;
    std::memcpy(to + 2, weighted, static_cast<std::size_t>(size) * sizeof(float));
    return;
  }
  const float factor = final_factor(problem, head, maximum, sum);
  for (std::int64_t i = 0; i < size; ++i) weighted[i] *= factor;
  write_strip(weighted, problem.y, (token_of(problem, tile, row) * problem.heads + head) * size, size, problem.type);
}

inline void read_query(const Attention &problem, const AttentionTile &tile, std::int64_t row, float *to) {
  const std::int64_t size = problem.k.size;
  const std::int64_t at =
      token_of(problem, tile, row) * problem.q_stride + head_of(problem, tile, row) * size;
  read_strip(problem.q, at, size, problem.type, to);
  for (std::int64_t i = 0; i < size; ++i) to[i] *= problem.scale;
}

// ---------------------------------------------------------------------------------------------------- the two regimes

void few(const Attention &problem, const AttentionTile &tile, float *scratch) {
  const std::int64_t rows = tile.rows, key_size = padded(problem.k.size), value_size = padded(problem.v.size);
  float *q = scratch, *keys = q + rows * key_size, *values = keys + kKeys * key_size;
  float *weighted = values + kKeys * value_size, *s = weighted + rows * value_size, *ones = s + rows * kKeys;
  float *maximum = ones + value_size, *sum = maximum + rows;
  std::memset(scratch, 0, static_cast<std::size_t>(s - scratch) * sizeof(float)); // what pads rows must be zero
  for (std::int64_t i = 0; i < value_size; ++i) ones[i] = 1.0f;
  Seen seen[kLanes];
  const Seen hole = hole_of(problem, tile.request);
  prefetch(problem, tile, tile.key_begin, tile.key_begin + kKeys);
  // The block to come, or the next head's first one, is asked for a share at a time: of prefetches in one go the CPU
  // drops most (a Zen 5 waits 0.7 us a block then).
  const std::int64_t share = (kKeys + rows - 1) / rows;
  for (std::int64_t r = 0; r < rows; ++r) {
    read_query(problem, tile, r, q + r * key_size);
    seen[r] = seen_by(problem, tile, r);
    maximum[r] = kUnseen;
    sum[r] = 0.0f;
  }
  for (std::int64_t begin = tile.key_begin; begin < tile.key_end; begin += kKeys) {
    const std::int64_t left = tile.key_end - begin, count = left < kKeys ? left : kKeys;
    AttentionTile ahead = tile;
    std::int64_t asked = begin + kKeys;
    if (left <= kKeys && tile.kv_head + 1 < problem.kv_heads) {
      ahead.kv_head += 1;
      asked = tile.key_begin;
    }
    widen(problem, problem.k, tile, begin, count, key_size, keys);
    widen(problem, problem.v, tile, begin, count, value_size, values);
    dot_products(q, keys, key_size, rows, padded(count), s);
    for (std::int64_t r = 0; r < rows; ++r, asked += share) {
      float *row = s + r * kKeys;
      prefetch(problem, ahead, asked, asked + share);
      if (problem.soft_cap > 0.0f) cap_logits(row, count, problem.soft_cap);
      const std::int64_t first = seen[r].begin - begin;
      const std::int64_t last = seen[r].end - begin < count ? seen[r].end - begin : count;
      for (std::int64_t i = 0; i < first && i < kKeys; ++i) row[i] = 2 * kUnseen;
      for (std::int64_t i = last > 0 ? last : 0; i < kKeys; ++i) row[i] = 2 * kUnseen;
      each_hidden(hole, begin, count, [&](std::int64_t i) { row[i] = 2 * kUnseen; });
      Vec most = Lanes::load(row);
      for (std::int64_t i = kLanes; i < kKeys; i += kLanes) most = Lanes::max(most, Lanes::load(row + i));
      const float found = Lanes::largest(most), top = found > maximum[r] ? found : maximum[r];
      if (top > maximum[r]) {
        const float shrink = weight_of(maximum[r], top);
        sum[r] *= shrink;
        for (std::int64_t i = 0; i < value_size; ++i) weighted[r * value_size + i] *= shrink;
        maximum[r] = top;
      }
      for (std::int64_t i = 0; i < kKeys; ++i) row[i] = weight_of(row[i], top);
      Vec weights = Lanes::load(row);
      for (std::int64_t i = kLanes; i < kKeys; i += kLanes) weights = Lanes::add(weights, Lanes::load(row + i));
      sum[r] += Lanes::total(weights);
    }
    multiply(s, kKeys, 1, values, value_size, weighted, value_size, rows, value_size, count, ones);
  }
  for (std::int64_t r = 0; r < rows; ++r)
    write_row(problem, tile, r, maximum[r], sum[r], weighted + r * value_size);
}

void many(const Attention &problem, const AttentionTile &tile, float *scratch) {
  const std::int64_t rows = padded(tile.rows), key_size = problem.k.size, value_size = problem.v.size;
  float *q = scratch, *s = q + key_size * rows, *weighted = s + kKeys * rows; // all of them [.., rows]
  float *maximum = weighted + value_size * rows, *sum = maximum + rows, *shrink = sum + rows;
  float *first = shrink + rows, *last = first + rows; // what a row sees, as floats: exact up to 2^24 positions
  float *keys = last + rows, *values = keys + kKeys * key_size, *line = values + kKeys * value_size;
  std::memset(weighted, 0, static_cast<std::size_t>(value_size * rows) * sizeof(float));
  std::int64_t all_from = 0, all_to = INT64_MAX; // the positions that every row sees, but for the hole
  const Seen hole = hole_of(problem, tile.request);
  for (std::int64_t r = 0; r < rows; ++r) {
    const bool real = r < tile.rows; // the others repeat the last one
    const std::int64_t row = real ? r : tile.rows - 1;
    if (real) read_query(problem, tile, row, line);
    for (std::int64_t d = 0; d < key_size; ++d) q[d * rows + r] = line[d];
    const Seen seen = seen_by(problem, tile, row);
    all_from = seen.begin > all_from ? seen.begin : all_from;
    all_to = seen.end < all_to ? seen.end : all_to;
    first[r] = static_cast<float>(seen.begin);
    last[r] = static_cast<float>(seen.end);
    maximum[r] = kUnseen;
    sum[r] = 0.0f;
  }
  prefetch(problem, tile, tile.key_begin, tile.key_begin + kKeys);
  for (std::int64_t begin = tile.key_begin; begin < tile.key_end; begin += kKeys) {
    const std::int64_t left = tile.key_end - begin, count = left < kKeys ? left : kKeys;
    prefetch(problem, tile, begin + kKeys, begin + 2 * kKeys);
    widen(problem, problem.k, tile, begin, count, key_size, keys);
    widen(problem, problem.v, tile, begin, count, value_size, values);
    multiply(keys, key_size, 1, q, rows, s, rows, count, rows, key_size, nullptr);
    if (problem.soft_cap > 0.0f) cap_logits(s, count * rows, problem.soft_cap);
    if (begin < all_from || begin + count > all_to)
      for (std::int64_t k = 0; k < count; ++k) {
        const auto position = static_cast<float>(begin + k);
        float *row = s + k * rows;
        for (std::int64_t r = 0; r < rows; ++r)
          row[r] = position >= first[r] && position < last[r] ? row[r] : 2 * kUnseen;
      }
    each_hidden(hole, begin, count, [&](std::int64_t k) {
      for (std::int64_t r = 0; r < rows; ++r) s[k * rows + r] = 2 * kUnseen;
    });
    for (std::int64_t r = 0; r < rows; ++r) shrink[r] = maximum[r];
    for (std::int64_t k = 0; k < count; ++k)
      for (std::int64_t r = 0; r < rows; ++r)
        maximum[r] = s[k * rows + r] > maximum[r] ? s[k * rows + r] : maximum[r];
    for (std::int64_t r = 0; r < rows; ++r) {
      shrink[r] = weight_of(shrink[r], maximum[r]);
      sum[r] *= shrink[r];
    }
    for (std::int64_t k = 0; k < count; ++k)
      for (std::int64_t r = 0; r < rows; ++r) {
        const float weight = weight_of(s[k * rows + r], maximum[r]);
        s[k * rows + r] = weight;
        sum[r] += weight;
      }
    multiply(values, 1, value_size, s, rows, weighted, rows, value_size, rows, count, shrink);
  }
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    for (std::int64_t d = 0; d < value_size; ++d) line[d] = weighted[d * rows + r];
    write_row(problem, tile, r, maximum[r], sum[r], line);
  }
}

std::int64_t scratch_floats(const Attention &problem, std::int64_t rows) {
  const std::int64_t sizes = padded(problem.k.size) + padded(problem.v.size);
  return (padded(rows) + kKeys) * (sizes + 8) + 2 * kKeys * padded(rows) + 2 * sizes;
}

void tile_of(const Attention &problem, const AttentionTile &tile, float *scratch) {
  if (tile.rows <= kLanes) few(problem, tile, scratch);
  else many(problem, tile, scratch);
}

void combine(const Attention &problem, const AttentionTile &tile, const float *partials, std::int64_t pieces,
             std::int64_t piece_floats, float *scratch) {
  const std::int64_t size = problem.v.size, width = size + 2;
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    float top = kUnseen, sum = 0.0f;
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
      const float maximum = partials[piece * piece_floats + r * width];
      top = maximum > top ? maximum : top;
    }
    std::memset(scratch, 0, static_cast<std::size_t>(size) * sizeof(float));
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
      const float *from = partials + piece * piece_floats + r * width;
      const float share = weight_of(from[0], top);
      sum += share * from[1];
      for (std::int64_t d = 0; d < size; ++d) scratch[d] += share * from[2 + d];
    }
    write_row(problem, tile, r, top, sum, scratch);
  }
}

// ------------------------------------------------------------------------------------------------------------- storing

inline void store_codes(const float *values, std::int64_t size, std::int8_t *codes, float *scale_to) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < size; ++i) {
    const float magnitude = float_of(bits_of(values[i]) & 0x7fffffffu);
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
  }
  const float smallest = 1.17549435e-38f; // a head of zeros keeps a scale that can be divided by
  float scale = largest / 127.0f;
  scale = scale < smallest ? smallest : scale;
  *scale_to = scale;
  const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, to even where halfway
  for (std::int64_t i = 0; i < size; ++i) {
    float code = values[i] / scale;
    code = code > 127.0f ? 127.0f : code;
    code = code < -127.0f ? -127.0f : code;
    codes[i] = static_cast<std::int8_t>(static_cast<std::int32_t>((code + magic) - magic));
  }
}

void store_tokens(const void *x, FloatType type, std::int64_t x_stride, const KVRows &rows, const std::int64_t *slots,
                  std::int64_t kv_heads, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = rows.size, width = kv_heads * size;
  alignas(64) float values[kStrip];
  for (std::int64_t token = begin; token < end; ++token) {
    const std::int64_t slot = slots[token], from = token * x_stride, to = slot * rows.row_stride;
    if (slot < 0) continue;
    if (rows.element == KVElement::int8) {
      for (std::int64_t head = 0; head < kv_heads; ++head) {
        read_strip(x, from + head * size, size, type, values);
        store_codes(values, size, static_cast<std::int8_t *>(rows.data) + to + head * size,
                    rows.scales + slot * rows.scale_stride + head);
      }
    } else if (static_cast<int>(rows.element) == static_cast<int>(type)) {
      const std::int64_t bytes = bytes_of(type);
      // What is stored may come out of the pages themselves.
      std::memmove(static_cast<char *>(rows.data) + to * bytes, static_cast<const char *>(x) + from * bytes,
                   static_cast<std::size_t>(width * bytes));
    } else {
      for (std::int64_t at = 0; at < width; at += kStrip) {
        const std::int64_t count = strip_at(at, width);
        read_strip(x, from + at, count, type, values);
        write_strip(values, rows.data, to + at, count, static_cast<FloatType>(rows.element));
      }
    }
  }
}

constexpr AttentionPath kAttention = {kLanes, kManyRows, scratch_floats, tile_of, combine, store_tokens};
