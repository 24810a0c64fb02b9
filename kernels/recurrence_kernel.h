// The loops of recurrence.h; included inside an anonymous namespace by one file for each instruction set.

#include "strips.h"

constexpr int kVectors = Lanes::kLanes >= 8 ? 2 : 4;        // of a state's columns, side by side
constexpr std::int64_t kColumns = kVectors * Lanes::kLanes; // 16 or 32
constexpr std::int64_t kFewTokens = 3; // up to so many, packing a state would cost more than it saves

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

inline void clear(float *to, std::int64_t count) { std::memset(to, 0, static_cast<std::size_t>(count) * sizeof(float)); }

inline void copy(float *to, const float *from, std::int64_t count) {
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}

// A row of a token as float32, filled up with zeros to `padded`.
inline void read_row(const TokenRows &rows, std::int64_t token, std::int64_t at, std::int64_t count,
                     std::int64_t padded, float *to) {
  read_strip(rows.data, token * rows.stride + at, count, rows.type, to);
  clear(to + count, padded - count);
}

// The sum of products; both have a multiple of 16 elements, filled up with zeros.
inline float dot(const float *a, const float *b, std::int64_t count) {
  Vec sums[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
  int next = 0;
  for (std::int64_t i = 0; i < count; i += Lanes::kLanes, next = (next + 1) % 4)
    sums[next] = Lanes::fma(Lanes::load(a + i), Lanes::load(b + i), sums[next]);
  return Lanes::total(Lanes::add(Lanes::add(sums[0], sums[1]), Lanes::add(sums[2], sums[3])));
}

inline void scale_row(float *row, std::int64_t count, float factor) {
  const Vec factors = Lanes::set1(factor);
  for (std::int64_t i = 0; i < count; i += Lanes::kLanes) Lanes::store(row + i, Lanes::mul(Lanes::load(row + i), factors));
}

// One pass over `rows` rows of a state's columns: first what the last token changes (state * decay + key delta), then
// the products with the next token's key and query. decay: of each row, or one for all.
template <bool kOfRows, bool kChange, bool kMultiply>
inline void pass(float *state, std::int64_t stride, std::int64_t rows, const float *decay, const float *key,
                 const Vec (&delta)[kVectors], const float *next_key, const float *next_query,
                 Vec (&by_key)[kVectors], Vec (&by_query)[kVectors]) {
  Vec keys[kVectors], queries[kVectors];
  Vec decays = Lanes::set1(*decay);
  PYMLLM_UNROLL_LANES
  for (int v = 0; v < kVectors; ++v) keys[v] = queries[v] = Lanes::zero();
  for (std::int64_t row = 0; row < rows; ++row) {
    float *at = state + row * stride;
    if (kOfRows && kChange) decays = Lanes::set1(decay[row]);
    PYMLLM_UNROLL_LANES
    for (int v = 0; v < kVectors; ++v) {
      Vec s = Lanes::load(at + v * Lanes::kLanes);
      if (kChange) {
        s = Lanes::fma(Lanes::set1(key[row]), delta[v], Lanes::mul(s, decays));
        Lanes::store(at + v * Lanes::kLanes, s);
      }
      if (kMultiply) {
        keys[v] = Lanes::fma(s, Lanes::set1(next_key[row]), keys[v]);
        queries[v] = Lanes::fma(s, Lanes::set1(next_query[row]), queries[v]);
      }
    }
  }
  PYMLLM_UNROLL_LANES
  for (int v = 0; v < kVectors; ++v) {
    by_key[v] = keys[v];
    by_query[v] = queries[v];
  }
}

// What tokens of a window bring, as float32: keys, and keys and queries times the decay, [tokens, size]; the products of
// keys and queries, and beta, [tokens]. decay: decay_stride apart, one of each row or one.
struct DeltaWindow {
  std::int64_t tokens, size;
  const float *keys, *faded_keys, *faded_queries, *products, *beta, *decay;
  std::int64_t decay_stride;
};

// A window over kColumns columns of a state. values, outputs: `width` apart. With S before a token:
// delta = beta (v - S (decay k)), output = S (decay q) + (k q) delta.
template <bool kOfRows>
inline void delta_columns(const DeltaWindow &window, float *state, std::int64_t stride, std::int64_t rows,
                          const float *values, float *outputs, std::int64_t width) {
  Vec by_key[kVectors], by_query[kVectors], delta[kVectors];
  PYMLLM_UNROLL_LANES
  for (int v = 0; v < kVectors; ++v) delta[v] = Lanes::zero();
  pass<kOfRows, false, true>(state, stride, rows, window.decay, window.keys, delta, window.faded_keys,
                             window.faded_queries, by_key, by_query);
  for (std::int64_t t = 0; t < window.tokens; ++t) {
    const Vec betas = Lanes::set1(window.beta[t]), product = Lanes::set1(window.products[t]);
    PYMLLM_UNROLL_LANES
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t at = t * width + v * Lanes::kLanes;
      delta[v] = Lanes::mul(betas, Lanes::sub(Lanes::load(values + at), by_key[v]));
      Lanes::store(outputs + at, Lanes::fma(product, delta[v], by_query[v]));
    }
    const float *key = window.keys + t * window.size, *decay = window.decay + t * window.decay_stride;
    const std::int64_t next = (t + 1) * window.size;
    if (t + 1 < window.tokens)
      pass<kOfRows, true, true>(state, stride, rows, decay, key, delta, window.faded_keys + next,
                                window.faded_queries + next, by_key, by_query);
    else
      pass<kOfRows, true, false>(state, stride, rows, decay, key, delta, key, key, by_key, by_query);
  }
}

// exp of logarithms of decays. Below -87 it is 0, and NaN stays.
inline void decays_of(float *g, std::int64_t count) {
  alignas(64) float within[kStrip];
  for (std::int64_t at = 0; at < count; at += kStrip) {
    const std::int64_t these = strip_at(at, count);
    float *values = g + at;
    for (std::int64_t i = 0; i < these; ++i) within[i] = values[i] > -87.0f ? values[i] : -87.0f;
    for (std::int64_t i = 0; i < these; ++i) within[i] = within[i] < 88.0f ? within[i] : 88.0f;
    for (std::int64_t i = 0; i < these; ++i) within[i] = exponential_within(within[i]);
    for (std::int64_t i = 0; i < these; ++i)
      values[i] = values[i] < -87.0f ? 0.0f : values[i] == values[i] ? within[i] : values[i];
  }
}

// Between a state, [rows, columns], and blocks of kColumns of its columns, [blocks, rows, kColumns].
inline void pack_columns(const float *state, std::int64_t rows, std::int64_t columns, float *packed) {
  for (std::int64_t at = 0; at < columns; at += kColumns) {
    const std::int64_t count = columns - at < kColumns ? columns - at : kColumns;
    for (std::int64_t row = 0; row < rows; ++row, packed += kColumns) {
      copy(packed, state + row * columns + at, count);
      clear(packed + count, kColumns - count);
    }
  }
}

inline void unpack_columns(const float *packed, std::int64_t rows, std::int64_t columns, float *state) {
  for (std::int64_t at = 0; at < columns; at += kColumns) {
    const std::int64_t count = columns - at < kColumns ? columns - at : kColumns;
    for (std::int64_t row = 0; row < rows; ++row, packed += kColumns) copy(state + row * columns + at, packed, count);
  }
}

void gated_delta_head(const GatedDelta &problem, std::int64_t head, const Span &span, const float *decay,
                      const float *beta, float *scratch) {
  const std::int64_t rows = problem.key_dim, columns = problem.value_dim;
  const std::int64_t size = round_up(rows, 16), width = round_up(columns, kColumns);
  const std::int64_t decay_stride = problem.channel_decay ? size : 1;
  float *keys = scratch, *faded_keys = keys + kWindow * size, *queries = faded_keys + kWindow * size;
  float *decays = queries + kWindow * size, *values = decays + kWindow * size, *outputs = values + kWindow * width;
  float *products = outputs + kWindow * width, *packed = products + kWindow;
  const bool in_place = span.state != nullptr && columns == width && span.end - span.begin <= kFewTokens;
  float *state = in_place ? span.state : packed;
  const std::int64_t stride = in_place ? columns : kColumns, block = in_place ? kColumns : rows * kColumns;
  if (span.fresh || span.state == nullptr) clear(state, rows * width);
  else if (!in_place) pack_columns(span.state, rows, columns, packed);

  const std::int64_t shared = head / (problem.value_heads / problem.key_heads) * rows;
  const float scale = 1.0f / square_root(static_cast<float>(rows));
  for (std::int64_t first = span.begin; first < span.end; first += kWindow) {
    const std::int64_t tokens = span.end - first < kWindow ? span.end - first : kWindow;
    const std::int64_t at = first - span.begin;
    for (std::int64_t t = 0; t < tokens; ++t) {
      float *key = keys + t * size, *query = queries + t * size, *faded = faded_keys + t * size;
      read_row(problem.k, first + t, shared, rows, size, key);
      read_row(problem.q, first + t, shared, rows, size, query);
      read_row(problem.v, first + t, head * columns, columns, width, values + t * width);
      float factor = scale;
      if (problem.normalise_eps >= 0.0f) {
        scale_row(key, size, 1.0f / square_root(dot(key, key, size) + problem.normalise_eps));
        factor /= square_root(dot(query, query, size) + problem.normalise_eps);
      }
      scale_row(query, size, factor);
      products[t] = dot(key, query, size);
      float *fading = decays + t * decay_stride;
      if (problem.channel_decay) {
        read_row(problem.g, first + t, head * rows, rows, size, fading);
        decays_of(fading, size);
        for (std::int64_t i = 0; i < size; ++i) faded[i] = key[i] * fading[i];
        for (std::int64_t i = 0; i < size; ++i) query[i] *= fading[i];
      } else {
        *fading = decay[at + t];
        copy(faded, key, size);
        scale_row(faded, size, *fading);
        scale_row(query, size, *fading);
      }
    }
    const DeltaWindow window{tokens, size, keys, faded_keys, queries, products, beta + at, decays, decay_stride};
    for (std::int64_t column = 0; column < width; column += kColumns) {
      float *columns_of = state + column / kColumns * block;
      if (problem.channel_decay)
        delta_columns<true>(window, columns_of, stride, rows, values + column, outputs + column, width);
      else
        delta_columns<false>(window, columns_of, stride, rows, values + column, outputs + column, width);
    }
    for (std::int64_t t = 0; t < tokens; ++t)
      write_strip(outputs + t * width, problem.y, ((first + t) * problem.value_heads + head) * columns, columns,
                  problem.q.type);
  }
  if (span.state != nullptr && !in_place) unpack_columns(packed, rows, columns, span.state);
}

constexpr int kRows = 4; // of a scan's state, together

// Tokens of a window over kRows rows of a state. b, c: [tokens, size]. x, y: [tokens, width], kRows of them; x times dt.
inline void scan_rows(float *state, std::int64_t stride, std::int64_t size, std::int64_t tokens, const float *b,
                      const float *c, const float *x, float *y, std::int64_t width, const float *decay) {
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Vec decays = Lanes::set1(decay[t]);
    Vec inputs[kRows], sums[kRows];
    PYMLLM_UNROLL_LANES
    for (int row = 0; row < kRows; ++row) {
      inputs[row] = Lanes::set1(x[t * width + row]);
      sums[row] = Lanes::zero();
    }
    for (std::int64_t i = 0; i < size; i += Lanes::kLanes) {
      const Vec to_state = Lanes::load(b + t * size + i), from_state = Lanes::load(c + t * size + i);
      PYMLLM_UNROLL_LANES
      for (int row = 0; row < kRows; ++row) {
        float *at = state + row * stride + i;
        const Vec s = Lanes::fma(inputs[row], to_state, Lanes::mul(Lanes::load(at), decays));
        Lanes::store(at, s);
        sums[row] = Lanes::fma(s, from_state, sums[row]);
      }
    }
    Lanes::fold4(sums[0], sums[1], sums[2], sums[3], y + t * width);
  }
}

void mamba2_scan_head(const Mamba2Scan &problem, std::int64_t head, const Span &span, const float *decay,
                      const float *dt, float *scratch) {
  const std::int64_t rows = problem.head_dim, columns = problem.state_size;
  const std::int64_t size = round_up(columns, 16), width = round_up(rows, kRows);
  float *b = scratch, *c = b + kWindow * size, *x = c + kWindow * size, *stepped = x + kWindow * width;
  float *y = stepped + kWindow * width, *padded = y + kWindow * width;
  // Whole groups of rows whose columns need no filling are changed where they lie; others in `padded`, [width, size].
  const std::int64_t whole = span.state != nullptr && columns % Lanes::kLanes == 0 ? rows / kRows * kRows : 0;
  if (span.state != nullptr && span.fresh) clear(span.state, rows * columns);
  clear(padded, (width - whole) * size);
  if (span.state != nullptr && !span.fresh)
    for (std::int64_t row = whole; row < rows; ++row)
      copy(padded + (row - whole) * size, span.state + row * columns, columns);

  const std::int64_t shared = head / (problem.heads / problem.groups) * columns;
  const float skip = read_float(problem.d.data, problem.d.type, head);
  // Of filled up columns none is needed where rows lie as they are.
  const std::int64_t used = whole > 0 ? columns : size;
  for (std::int64_t first = span.begin; first < span.end; first += kWindow) {
    const std::int64_t tokens = span.end - first < kWindow ? span.end - first : kWindow, at = first - span.begin;
    for (std::int64_t t = 0; t < tokens; ++t) {
      read_row(problem.b, first + t, shared, columns, used, b + t * used);
      read_row(problem.c, first + t, shared, columns, used, c + t * used);
      read_row(problem.x, first + t, head * rows, rows, width, x + t * width);
      for (std::int64_t i = 0; i < width; ++i) stepped[t * width + i] = x[t * width + i] * dt[at + t];
    }
    for (std::int64_t row = 0; row < width; row += kRows) {
      const bool there = row < whole;
      float *state = there ? span.state + row * columns : padded + (row - whole) * size;
      scan_rows(state, there ? columns : size, used, tokens, b, c, stepped + row, y + row, width, decay + at);
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t i = 0; i < width; ++i) y[t * width + i] += skip * x[t * width + i];
      write_strip(y + t * width, problem.y, ((first + t) * problem.heads + head) * rows, rows, problem.x.type);
    }
  }
  if (span.state != nullptr)
    for (std::int64_t row = whole; row < rows; ++row)
      copy(span.state + row * columns, padded + (row - whole) * size, columns);
}

// From [count, size] to [size, kChannels], and back. Compilers make shuffles of a size that they know.
template <int kSize>
inline void channels_last_of(const float *__restrict from, std::int64_t count, float *__restrict to) {
  for (std::int64_t i = 0; i < count; ++i)
    for (int at = 0; at < kSize; ++at) to[at * kChannels + i] = from[i * kSize + at];
}

template <int kSize>
inline void channels_first_of(const float *__restrict from, std::int64_t count, float *__restrict to) {
  for (std::int64_t i = 0; i < count; ++i)
    for (int at = 0; at < kSize; ++at) to[i * kSize + at] = from[at * kChannels + i];
}

inline void channels_last(const float *from, std::int64_t count, std::int64_t size, float *to) {
  if (size == 2) return channels_last_of<2>(from, count, to);
  if (size == 3) return channels_last_of<3>(from, count, to);
  if (size == 4) return channels_last_of<4>(from, count, to);
  for (std::int64_t at = 0; at < size; ++at)
    for (std::int64_t i = 0; i < count; ++i) to[at * kChannels + i] = from[i * size + at];
}

inline void channels_first(const float *from, std::int64_t count, std::int64_t size, float *to) {
  if (size == 2) return channels_first_of<2>(from, count, to);
  if (size == 3) return channels_first_of<3>(from, count, to);
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t at = 0; at < size; ++at) to[i * size + at] = from[at * kChannels + i];
}

// v * sigmoid(v) of kChannels values, each step in a loop of its own: compilers vectorise all of them.
inline void silu_channels(float *y) {
  alignas(64) float within[kChannels];
  for (std::int64_t i = 0; i < kChannels; i += Lanes::kLanes) {
    const Vec least = Lanes::max(Lanes::sub(Lanes::zero(), Lanes::load(y + i)), Lanes::set1(-87.0f));
    const Vec most = Lanes::max(Lanes::sub(Lanes::zero(), least), Lanes::set1(-88.0f));
    Lanes::store(within + i, Lanes::sub(Lanes::zero(), most));
  }
  for (std::int64_t i = 0; i < kChannels; ++i) within[i] = exponential_within(within[i]);
  for (std::int64_t i = 0; i < kChannels; ++i) y[i] = y[i] / (1.0f + within[i]);
}

void causal_conv_channels(const CausalConv &problem, std::int64_t first, const Span &span, float *scratch) {
  const std::int64_t size = problem.kernel, past = size - 1;
  const std::int64_t count = problem.channels - first < kChannels ? problem.channels - first : kChannels;
  float *weight = scratch, *bias = weight + size * kChannels, *inputs = bias + kChannels;
  float *y = inputs + (past + kWindow) * kChannels, *read = y + kChannels;
  if (count < kChannels) clear(scratch, read - scratch); // channels that are not there have zeros, as their results
  clear(inputs, past * kChannels);
  if (problem.bias.data == nullptr) clear(bias, kChannels);
  read_strip(problem.weight.data, first * size, count * size, problem.weight.type, read);
  channels_last(read, count, size, weight);
  if (problem.bias.data != nullptr) read_strip(problem.bias.data, first, count, problem.bias.type, bias);
  if (span.state != nullptr && !span.fresh) channels_last(span.state + first * past, count, past, inputs);
  for (std::int64_t token = span.begin; token < span.end; token += kWindow) {
    const std::int64_t tokens = span.end - token < kWindow ? span.end - token : kWindow;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float *oldest = inputs + t * kChannels;
      read_strip(problem.x.data, (token + t) * problem.x.stride + first, count, problem.x.type,
                 inputs + (past + t) * kChannels);
      for (std::int64_t i = 0; i < kChannels; i += Lanes::kLanes) {
        Vec sum = Lanes::load(bias + i);
        for (std::int64_t at = 0; at < size; ++at)
          sum = Lanes::fma(Lanes::load(weight + at * kChannels + i), Lanes::load(oldest + at * kChannels + i), sum);
        Lanes::store(y + i, sum);
      }
      if (problem.silu) silu_channels(y);
      write_strip(y, problem.y, (token + t) * problem.channels + first, count, problem.x.type);
    }
    std::memmove(inputs, inputs + tokens * kChannels, static_cast<std::size_t>(past * kChannels) * sizeof(float));
  }
  if (span.state != nullptr) channels_first(inputs, count, past, span.state + first * past);
}

constexpr RecurrencePath kRecurrence = {gated_delta_head, mamba2_scan_head, causal_conv_channels, kColumns};
