// Products of paths that decode one group of one row block into the L1 cache, then multiply it with all rows, four at a
// time. Included after integer_kernel.h; V brings as well
//   decode_lines(format, lines, group, decoded)   the values of the block: lines of 64 bytes as integer.h has them (or
//                                                 in an order of V's own), in `decoded` or where they lie
//   dots<R, kLarge>(values, zeros, codes, negative_sums, group, out)
//     of R rows, `group` codes each, the sums of value - zero times code, as floats. kLarge: values may exceed 127

constexpr int kVectors = kBlockRows / V::kLanes;

struct Tile {
  const std::uint8_t *values;
  alignas(64) std::int32_t zeros[kBlockRows];
  alignas(64) float scales[kBlockRows];
  alignas(64) float offsets[kBlockRows];
  alignas(64) std::uint8_t decoded[kMaxGroup * kBlockRows];
};

// One group for R rows from `at` = group * rows + row on; adds to sums [R][16].
template <int R, bool kLarge>
void tile_rows(const Tile &tile, const Activations &x, std::int64_t at, int group, float *sums) {
  Vec dots[R][kVectors];
  V::template dots<R, kLarge>(tile.values, tile.zeros, x.codes + at * group, x.negative_sums + at, group, dots);
  PYMLLM_UNROLL
  for (int m = 0; m < R; ++m) {
    const Vec scale = V::set1(x.scales[at + m]);
    PYMLLM_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float *sum = sums + m * kBlockRows + v * V::kLanes;
      V::store(sum, V::fma(V::mul(dots[m][v], V::load(tile.scales + v * V::kLanes)), scale, V::load(sum)));
    }
  }
}

template <bool kLarge>
void multiply_tile(const Tile &tile, const Activations &x, std::int64_t g, int group, float *sums) {
  for (std::int64_t row = 0; row < x.rows; row += 4) {
    const std::int64_t at = g * x.rows + row;
    switch (x.rows - row) {
    case 1: tile_rows<1, kLarge>(tile, x, at, group, sums + row * kBlockRows); break;
    case 2: tile_rows<2, kLarge>(tile, x, at, group, sums + row * kBlockRows); break;
    case 3: tile_rows<3, kLarge>(tile, x, at, group, sums + row * kBlockRows); break;
    default: tile_rows<4, kLarge>(tile, x, at, group, sums + row * kBlockRows);
    }
  }
}

std::size_t scratch_bytes(const Weights &, std::int64_t rows, std::int64_t) {
  return static_cast<std::size_t>(rows * kBlockRows) * sizeof(float);
}

void multiply(const Weights &weights, const Activations &x, const Floats &floats, std::int64_t first,
              std::int64_t last, void *scratch) {
  const Format &format = weights.format;
  const int group = static_cast<int>(weights.group);
  const std::int64_t groups = weights.groups(), header = format.header_bytes(), bytes = weights.block_bytes();
  float *sums = static_cast<float *>(scratch);  // [R][16]
  Tile tile;
  for (std::int64_t n = first; n < last; ++n) {
    std::memset(sums, 0, scratch_bytes(weights, x.rows, 1));
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::uint8_t *block = weights.blocks + (n * groups + g) * bytes;
      decode_header(format, block, tile.zeros, tile.scales, tile.offsets);
      tile.values = V::decode_lines(format, block + header, group, tile.decoded);
      if (format.large_values) multiply_tile<true>(tile, x, g, group, sums);
      else multiply_tile<false>(tile, x, g, group, sums);
      if (format.zeros == Zeros::offsets) add_offsets<kBlockRows>(tile.offsets, x, g, sums);
    }
    for (std::int64_t token = 0; token < floats.tokens; ++token)
      finish(sums + token * x.slices * kBlockRows, kBlockRows, x.slices, floats, weights, token, n);
  }
}
