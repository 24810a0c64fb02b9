// The loops of paths that decode one group of one row block, then multiply it with all rows, four at a time. Included
// inside an anonymous namespace by files that define Tile, decode_tile, tile_rows, add_offsets and finish.

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
  const int group = static_cast<int>(weights.group);
  float *sums = static_cast<float *>(scratch);  // [R][16]
  Tile tile;
  for (std::int64_t n = first; n < last; ++n) {
    std::memset(sums, 0, scratch_bytes(weights, x.rows, 1));
    for (std::int64_t g = 0; g < weights.groups(); ++g) {
      decode_tile(weights.format, weights.block(n, g), group, tile);
      if (weights.format.large_values) multiply_tile<true>(tile, x, g, group, sums);
      else multiply_tile<false>(tile, x, g, group, sums);
      if (weights.format.zeros == Zeros::offsets) add_offsets(tile, x, g, sums);
    }
    for (std::int64_t token = 0; token < floats.tokens; ++token)
      finish(sums + token * x.slices * kBlockRows, x.slices, floats, weights, token, n);
  }
}
