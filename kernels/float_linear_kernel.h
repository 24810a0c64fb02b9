// The loops of float_linear, over a vector type `V` that the including file defines (float_linear_avx512.cpp, ...).
//
// Included once by each of them, inside an anonymous namespace: every path compiles its own copy with its own flags.
// V brings: type `Vec` of `kLanes` floats, kTokens (T), zero(), load(p), store(p, v), fma(a, b, c), mul(a, b), set1(f),
// fold4(v0, v1, v2, v3, out): the sums of four vectors; and for each weight type
//   decode_bf16 / decode_f16 / decode_e4m3(const uint8_t *group, int part, Vec *out)
//     half of a group of weights: a group is kLanes * 2 weights of 16 bits, or kLanes * 4 of e4m3
//   decode_codebook: the same for 4-bit codes, of which a group has kLanes * 4, with a Table of what they mean
//   order_bf16 / order_e4m3 / order_codebook(i): which input of the group lane i meets, the lanes of its vectors counted in turn
//   span_e4m3(v): which 32 inputs of a group of e4m3 its vector v holds, all of one span
// e4m3 values arrive divided by 256, as f16 has them; the row's scale makes up for it.

constexpr int kTileRows = 4;
constexpr int kPrefetchBytes = 2048; // 1024 costs 20 % at four tokens, 4096 gains nothing

// kScalesTable: a block's scale goes into the table, once, and not to every weight: the same product.
struct Bf16 {
  static constexpr int bits = 16, parts = 2, per_part = 1, group = 2 * V::kLanes;
  static constexpr bool kScalesTable = false;
  static int span(int) { return 0; }
  static void decode(const std::uint8_t *p, int part, const V::Table &, Vec *out) { V::decode_bf16(p, part, out); }
  static int order(int lane) { return V::order_bf16(lane); }
};
struct F16 {
  static constexpr int bits = 16, parts = 2, per_part = 1, group = 2 * V::kLanes;
  static constexpr bool kScalesTable = false;
  static int span(int) { return 0; }
  static void decode(const std::uint8_t *p, int part, const V::Table &, Vec *out) { V::decode_f16(p, part, out); }
  static int order(int lane) { return lane; }
};
struct E4m3 {
  static constexpr int bits = 8, parts = 2, per_part = 2, group = 4 * V::kLanes;
  static constexpr bool kScalesTable = false;
  static int span(int vector) { return V::span_e4m3(vector); }
  static void decode(const std::uint8_t *p, int part, const V::Table &, Vec *out) { V::decode_e4m3(p, part, out); }
  static int order(int lane) { return V::order_e4m3(lane); }
};
struct Codebook {
  static constexpr int bits = 4, parts = 2, per_part = 2, group = 4 * V::kLanes;
  static constexpr bool kScalesTable = true;
  static int span(int) { return 0; }
  static void decode(const std::uint8_t *p, int part, const V::Table &table, Vec *out) {
    V::decode_codebook(p, part, table, out);
  }
  static int order(int lane) { return V::order_codebook(lane); }
};

// What shares a scale: a row; a block of inputs that groups divide; or a span of 32 inputs, several in a group.
enum class Scales { rows, blocks, spans };
constexpr std::int64_t kSpan = 32;
template <class W> constexpr int spans_of = W::group > kSpan ? W::group / kSpan : 1;

template <class W> constexpr std::int64_t bytes_of(std::int64_t weights) { return weights * W::bits / 8; }

inline V::Table table_of(const FloatLinear &problem) {
  V::Table table{};
  if (problem.table != nullptr) table = V::load_table(problem.table);
  return table;
}

template <class W>
void prepare_as(const FloatLinear &problem, std::int64_t first, std::int64_t tokens, float *prepared,
                std::int64_t stride) {
  const std::int64_t inputs = problem.in_features, whole = inputs / W::group * W::group;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t row = (first + t) * inputs;
    float *out = prepared + t * stride;
    const auto gather = [&](auto read) {
      for (std::int64_t g = 0; g < whole; g += W::group)
        for (int lane = 0; lane < W::group; ++lane) out[g + lane] = read(row + g + W::order(lane));
      if (whole < inputs)
        for (int lane = 0; lane < W::group; ++lane) {
          const std::int64_t i = whole + W::order(lane);
          out[whole + lane] = i < inputs ? read(row + i) : 0.0f;
        }
    };
    if (problem.type == FloatType::f32)
      gather([x = static_cast<const float *>(problem.x)](std::int64_t i) { return x[i]; });
    else if (problem.type == FloatType::bf16)
      gather([x = static_cast<const std::uint16_t *>(problem.x)](std::int64_t i) { return from_bf16(x[i]); });
    else
      gather([x = static_cast<const std::uint16_t *>(problem.x)](std::int64_t i) { return from_f16(x[i]); });
  }
}

// What stands between a row's sum and its output.
struct Epilogue {
  const FloatLinear &problem;
  bool scaled_rows; // one scale a row; with several, the weights were scaled as they were decoded

  float finish(float sum, std::int64_t row) const {
    if (problem.scales != nullptr && scaled_rows) sum *= *scales(row) * factor();
    if (problem.row_nan != nullptr) sum += problem.row_nan[row];
    if (problem.bias != nullptr) sum += read_float(problem.bias, problem.type, row);
    return sum;
  }

  // The scales of the blocks that hold this row, one for every `side` inputs.
  std::int64_t columns() const {
    const std::int64_t side = problem.block_in > 0 ? problem.block_in : problem.in_features;
    return side > 0 ? (problem.in_features + side - 1) / side : 0;
  }
  const float *scales(std::int64_t row) const {
    return problem.scales + (problem.block_out > 0 ? row / problem.block_out : 0) * columns();
  }
  // Of e4m3, times 256 (see the top).
  float factor() const { return problem.weight_type == WeightType::e4m3 ? 256.0f : 1.0f; }

  void write(std::int64_t token, std::int64_t row, float value) const {
    write_float(value, problem.y, problem.type, token * problem.out_features + row);
  }
};

template <class W> void decode_group(const std::uint8_t *p, const V::Table &table, float *out) {
  PYMLLM_UNROLL
  for (int part = 0; part < W::parts; ++part) {
    Vec w[W::per_part];
    W::decode(p, part, table, w);
    PYMLLM_UNROLL
    for (int u = 0; u < W::per_part; ++u) V::store(out + (part * W::per_part + u) * V::kLanes, w[u]);
  }
}

// `count` inputs of one weight row (the last group may be partial), as float32.
template <class W> void decode_row(const std::uint8_t *p, std::int64_t count, const V::Table &table, float *out) {
  std::int64_t i = 0;
  for (; i + W::group <= count; i += W::group) decode_group<W>(p + bytes_of<W>(i), table, out + i);
  if (i < count) {
    alignas(64) std::uint8_t last[bytes_of<W>(W::group)] = {};
    std::memcpy(last, p + bytes_of<W>(i), static_cast<std::size_t>(bytes_of<W>(count - i)));
    decode_group<W>(last, table, out + i);
  }
}

// Few tokens: four streams of rows, each running through a quarter of [begin, end), so that prefetching past the end
// of a row is right.
template <class W, int Tokens, Scales Kind>
void direct_rows(const FloatLinear &problem, const float *x, std::int64_t stride, std::int64_t first,
                 std::int64_t begin, std::int64_t end) {
  const std::int64_t inputs = problem.in_features, whole = inputs / W::group * W::group;
  const auto *weight = static_cast<const std::uint8_t *>(problem.weight);
  constexpr bool Blocks = Kind != Scales::rows;
  constexpr int kSpans = Kind == Scales::spans ? spans_of<W> : 1; // scales of a group
  const Epilogue epilogue{problem, !Blocks};
  const float factor = epilogue.factor();
  const V::Table table = table_of(problem);
  const std::int64_t quarter = (end - begin + kTileRows - 1) / kTileRows;
  const std::int64_t side = !Blocks ? whole : Kind == Scales::spans ? W::group : problem.block_in;
  const std::int64_t columns = Blocks ? epilogue.columns() : 0;

  for (std::int64_t i = 0; i < quarter; ++i) {
    std::int64_t rows[kTileRows];
    const std::uint8_t *p[kTileRows];
    const float *scales[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      rows[r] = begin + r * quarter + i;
      const std::int64_t row = rows[r] < end ? rows[r] : end - 1; // read again rather than branch
      p[r] = weight + row * bytes_of<W>(inputs);
      scales[r] = Blocks ? epilogue.scales(row) : nullptr;
    }
    Vec sums[kTileRows][Tokens];
    for (int r = 0; r < kTileRows; ++r)
      for (int t = 0; t < Tokens; ++t) sums[r][t] = V::zero();

    std::int64_t column = 0;
    for (std::int64_t at = 0; at < whole;) {
      Vec scale[kTileRows][kSpans];
      V::Table tables[kTileRows];
      std::int64_t stop = whole;
      for (int r = 0; r < kTileRows; ++r) tables[r] = table;
      if (Blocks) {
        stop = at + side < whole ? at + side : whole;
        for (int r = 0; r < kTileRows; ++r) {
          for (int span = 0; span < kSpans; ++span) scale[r][span] = V::set1(scales[r][column + span] * factor);
          if (W::kScalesTable) tables[r] = V::scaled(table, scale[r][0]);
        }
        column += kSpans;
      }
      for (; at < stop; at += W::group) {
        PYMLLM_UNROLL
        for (int r = 0; r < kTileRows; ++r) prefetch_line(p[r] + bytes_of<W>(at) + kPrefetchBytes);
        PYMLLM_UNROLL
        for (int part = 0; part < W::parts; ++part) {
          Vec w[kTileRows][W::per_part];
          PYMLLM_UNROLL
          for (int r = 0; r < kTileRows; ++r) {
            W::decode(p[r] + bytes_of<W>(at), part, tables[r], w[r]);
            if (Blocks && !W::kScalesTable)
              PYMLLM_UNROLL
              for (int u = 0; u < W::per_part; ++u)
                w[r][u] = V::mul(w[r][u], scale[r][kSpans > 1 ? W::span(part * W::per_part + u) : 0]);
          }
          PYMLLM_UNROLL
          for (int u = 0; u < W::per_part; ++u)
            PYMLLM_UNROLL
            for (int t = 0; t < Tokens; ++t) {
              const Vec value = V::load(x + t * stride + at + (part * W::per_part + u) * V::kLanes);
              PYMLLM_UNROLL
              for (int r = 0; r < kTileRows; ++r) sums[r][t] = V::fma(w[r][u], value, sums[r][t]);
            }
        }
      }
    }
    if (whole < inputs)
      for (int r = 0; r < kTileRows; ++r) {
        alignas(64) float last[W::group];
        decode_row<W>(p[r] + bytes_of<W>(whole), inputs - whole, table, last);
        for (int v = 0; v < W::parts * W::per_part; ++v) {
          Vec w = V::load(last + v * V::kLanes);
          if (Blocks) {
            const std::int64_t last_column = Kind == Scales::spans ? whole / kSpan + W::span(v) : whole / side;
            w = V::mul(w, V::set1(scales[r][last_column < columns ? last_column : columns - 1] * factor));
          }
          for (int t = 0; t < Tokens; ++t)
            sums[r][t] = V::fma(w, V::load(x + t * stride + whole + v * V::kLanes), sums[r][t]);
        }
      }
    for (int t = 0; t < Tokens; ++t) {
      float out[kTileRows];
      V::fold4(sums[0][t], sums[1][t], sums[2][t], sums[3][t], out);
      for (int r = 0; r < kTileRows; ++r)
        if (rows[r] < end) epilogue.write(first + t, rows[r], epilogue.finish(out[r], rows[r]));
    }
  }
}

// How weights are made float32: `rows` of them at a time, `chunk` inputs each. Few tokens: what is made stays in L1.
// Many: in L2, where it serves longer.
struct Blocking {
  std::int64_t rows, chunk;
};
inline Blocking blocking_for(std::int64_t tokens) {
  return tokens <= kFewTokens ? Blocking{kFewRows, kFewChunk} : Blocking{kRowBlock, kChunk};
}

// kTileRows rows by Tokens tokens over `count` inputs (whole vectors), added to `sums` [tokens][block_rows] of vectors.
// ahead: two rows of bytes that will be wanted next, `lines` cache lines each.
template <int Tokens>
void tile(const Blocking &blocking, const float *weight, const float *x, std::int64_t stride, std::int64_t count,
          float *sums, bool fresh, const std::uint8_t *const ahead[2], std::int64_t lines) {
  const std::int64_t chunk = blocking.chunk, block_rows = blocking.rows;
  Vec acc[kTileRows][Tokens];
  PYMLLM_UNROLL
  for (int t = 0; t < Tokens; ++t)
    PYMLLM_UNROLL
    for (int r = 0; r < kTileRows; ++r)
      acc[r][t] = fresh ? V::zero() : V::load(sums + (t * block_rows + r) * V::kLanes);
  const auto step = [&](std::int64_t i) {
    if constexpr (kTileRows <= Tokens) {
      Vec w[kTileRows];
      PYMLLM_UNROLL
      for (int r = 0; r < kTileRows; ++r) w[r] = V::load(weight + r * chunk + i);
      PYMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        const Vec value = V::load(x + t * stride + i);
        PYMLLM_UNROLL
        for (int r = 0; r < kTileRows; ++r) acc[r][t] = V::fma(w[r], value, acc[r][t]);
      }
    } else {
      Vec value[Tokens];
      PYMLLM_UNROLL
      for (int t = 0; t < Tokens; ++t) value[t] = V::load(x + t * stride + i);
      PYMLLM_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        const Vec w = V::load(weight + r * chunk + i);
        PYMLLM_UNROLL
        for (int t = 0; t < Tokens; ++t) acc[r][t] = V::fma(w, value[t], acc[r][t]);
      }
    }
  };
  std::int64_t i = 0;
  for (int half = 0; half < 2; ++half) // one line a step: its latency hides behind the arithmetic
    for (std::int64_t line = 0; line < lines && i < count; ++line, i += V::kLanes) {
      prefetch_line(ahead[half] + line * 64);
      step(i);
    }
  for (; i < count; i += V::kLanes) step(i);
  PYMLLM_UNROLL
  for (int t = 0; t < Tokens; ++t)
    PYMLLM_UNROLL
    for (int r = 0; r < kTileRows; ++r) V::store(sums + (t * block_rows + r) * V::kLanes, acc[r][t]);
}

template <int Tokens>
void tile_of(const Blocking &blocking, int tokens, const float *weight, const float *x, std::int64_t stride, std::int64_t count, float *sums,
             bool fresh, const std::uint8_t *const ahead[2], std::int64_t lines) {
  if (tokens == Tokens) return tile<Tokens>(blocking, weight, x, stride, count, sums, fresh, ahead, lines);
  if constexpr (Tokens > 1) tile_of<Tokens - 1>(blocking, tokens, weight, x, stride, count, sums, fresh, ahead, lines);
}

// scratch: the block's weights [rows][chunk] as float32, then the sums [tokens][rows] as vectors.
template <class W, Scales Kind>
void blocked_rows(const FloatLinear &problem, const float *x, std::int64_t stride, std::int64_t first,
                  std::int64_t tokens, std::int64_t begin, std::int64_t end, float *scratch) {
  const std::int64_t inputs = problem.in_features;
  const auto *weight = static_cast<const std::uint8_t *>(problem.weight);
  const Epilogue epilogue{problem, Kind == Scales::rows};
  const float factor = epilogue.factor();
  const std::int64_t columns = Kind == Scales::rows ? 0 : epilogue.columns();
  const Blocking blocking = blocking_for(tokens);
  float *floats = scratch, *sums = scratch + blocking.rows * blocking.chunk;
  // Even tiles: 8 tokens are 4 + 4, not 6 + 2.
  const std::int64_t token_tiles = (tokens + V::kTokens - 1) / V::kTokens;
  const std::int64_t line_bytes = bytes_of<W>(inputs);
  const V::Table table = table_of(problem);

  for (std::int64_t block = begin; block < end; block += blocking.rows) {
    const std::int64_t rows = end - block < blocking.rows ? end - block : blocking.rows;
    const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (std::int64_t at = 0; at == 0 || at < inputs; at += blocking.chunk) {
      const std::int64_t count = inputs - at < blocking.chunk ? inputs - at : blocking.chunk;
      for (std::int64_t r = 0; r < tiles * kTileRows; ++r) {
        const std::int64_t row = block + (r < rows ? r : rows - 1);
        float *out = floats + r * blocking.chunk;
        decode_row<W>(weight + row * line_bytes + bytes_of<W>(at), count, table, out);
        const std::int64_t padded = (count + W::group - 1) / W::group * W::group;
        const float *scales = Kind == Scales::rows ? nullptr : epilogue.scales(row);
        if (Kind == Scales::blocks)
          for (std::int64_t i = 0; i < count;) {
            const std::int64_t side = problem.block_in, column = (at + i) / side, stop = (column + 1) * side - at;
            const Vec scale = V::set1(scales[column] * factor);
            for (; i < stop && i < padded; i += V::kLanes) V::store(out + i, V::mul(V::load(out + i), scale));
          }
        if (Kind == Scales::spans)
          for (std::int64_t i = 0; i < padded; i += W::group)
            for (int v = 0; v < W::parts * W::per_part; ++v) {
              const std::int64_t column = (at + i) / kSpan + W::span(v);
              const Vec scale = V::set1(scales[column < columns ? column : columns - 1] * factor);
              float *part = out + i + v * V::kLanes;
              V::store(part, V::mul(V::load(part), scale));
            }
      }
      const std::int64_t vectors = (count + W::group - 1) / W::group * W::group;
      // Next: the same rows' next chunk, or the first chunk of the next block.
      const bool last_chunk = at + blocking.chunk >= inputs;
      const std::int64_t next_row = last_chunk ? block + blocking.rows : block, next_at = last_chunk ? 0 : at + blocking.chunk;
      const std::int64_t next_count = inputs - next_at < blocking.chunk ? inputs - next_at : blocking.chunk;
      const bool any_next = next_row < end;
      for (std::int64_t token_tile = 0; token_tile < token_tiles; ++token_tile) {
        const std::int64_t t = tokens * token_tile / token_tiles;
        const int some = static_cast<int>(tokens * (token_tile + 1) / token_tiles - t);
        for (std::int64_t r = 0; r < tiles; ++r) {
          const std::uint8_t *ahead[2] = {nullptr, nullptr};
          std::int64_t lines = 0;
          const std::int64_t pair = token_tile; // the first two token tiles fetch two of the four rows each
          if (any_next && pair < 2) {
            lines = (bytes_of<W>(next_count) + 63) / 64;
            for (int half = 0; half < 2; ++half) {
              const std::int64_t row = next_row + r * kTileRows + pair * 2 + half;
              ahead[half] = weight + (row < end ? row : end - 1) * line_bytes + bytes_of<W>(next_at);
            }
          }
          tile_of<V::kTokens>(blocking, some, floats + r * kTileRows * blocking.chunk, x + t * stride + at, stride, vectors,
                              sums + (t * blocking.rows + r * kTileRows) * V::kLanes, at == 0, ahead, lines);
        }
      }
    }
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t r = 0; r < tiles; ++r) {
        const float *four = sums + (t * blocking.rows + r * kTileRows) * V::kLanes;
        float out[kTileRows];
        V::fold4(V::load(four), V::load(four + V::kLanes), V::load(four + 2 * V::kLanes),
                 V::load(four + 3 * V::kLanes), out);
        for (std::int64_t i = 0; i < kTileRows && r * kTileRows + i < rows; ++i) {
          const std::int64_t row = block + r * kTileRows + i;
          epilogue.write(first + t, row, epilogue.finish(out[i], row));
        }
      }
  }
}

template <class W, Scales Kind, int Tokens>
void rows_direct(const FloatLinear &problem, const float *x, std::int64_t stride, std::int64_t first,
                 std::int64_t tokens, std::int64_t begin, std::int64_t end) {
  if (tokens == Tokens) return direct_rows<W, Tokens, Kind>(problem, x, stride, first, begin, end);
  if constexpr (Tokens > 1) rows_direct<W, Kind, Tokens - 1>(problem, x, stride, first, tokens, begin, end);
}

template <class W, Scales Kind>
void rows_as(const FloatLinear &problem, const float *x, std::int64_t stride, std::int64_t first, std::int64_t tokens,
             std::int64_t begin, std::int64_t end, float *scratch) {
  if (tokens <= V::kTokens) rows_direct<W, Kind, V::kTokens>(problem, x, stride, first, tokens, begin, end);
  else blocked_rows<W, Kind>(problem, x, stride, first, tokens, begin, end, scratch);
}

void prepare(const FloatLinear &problem, std::int64_t first, std::int64_t tokens, float *prepared,
             std::int64_t stride) {
  if (problem.weight_type == WeightType::bf16) prepare_as<Bf16>(problem, first, tokens, prepared, stride);
  else if (problem.weight_type == WeightType::f16) prepare_as<F16>(problem, first, tokens, prepared, stride);
  else if (problem.weight_type == WeightType::codebook) prepare_as<Codebook>(problem, first, tokens, prepared, stride);
  else prepare_as<E4m3>(problem, first, tokens, prepared, stride);
}

void rows(const FloatLinear &problem, const float *x, std::int64_t stride, std::int64_t first, std::int64_t tokens,
          std::int64_t begin, std::int64_t end, float *scratch) {
  if (problem.weight_type == WeightType::bf16)
    rows_as<Bf16, Scales::rows>(problem, x, stride, first, tokens, begin, end, scratch);
  else if (problem.weight_type == WeightType::f16)
    rows_as<F16, Scales::rows>(problem, x, stride, first, tokens, begin, end, scratch);
  else if (problem.weight_type == WeightType::codebook && problem.block_in > 0)
    rows_as<Codebook, Scales::blocks>(problem, x, stride, first, tokens, begin, end, scratch);
  else if (problem.weight_type == WeightType::codebook)
    rows_as<Codebook, Scales::rows>(problem, x, stride, first, tokens, begin, end, scratch);
  else if (problem.block_in == 0) rows_as<E4m3, Scales::rows>(problem, x, stride, first, tokens, begin, end, scratch);
  else if (problem.block_in % E4m3::group == 0)
    rows_as<E4m3, Scales::blocks>(problem, x, stride, first, tokens, begin, end, scratch);
  else if constexpr (spans_of<E4m3> > 1)
    rows_as<E4m3, Scales::spans>(problem, x, stride, first, tokens, begin, end, scratch);
}

constexpr FloatLinearPath kPath = {prepare, rows, V::kTokens,
                                   kRowBlock * kChunk + kPanel * kRowBlock * V::kLanes};
