#include "stored_codes.h"

#include <algorithm>

#include "threads.h"

namespace pymllm::stored_codes {
namespace {

// These loops take long enough to wake threads that sleep, so the pool is not told of how few bytes.
Team team_for(std::int64_t bytes, int threads) { return {worthwhile_threads(bytes, threads).threads}; }

// A tile of words is transposed in the first-level cache: 64 rows of one cache line of columns.
constexpr std::int64_t kTileRows = 64, kTileColumns = 16;

// The shifts are constants, so that compilers make vector code of the loops.
template <int Bits>
void split_row(const std::uint8_t *bytes, std::int64_t n, bool planes, std::uint8_t *codes) {
  constexpr int kFields = 8 / Bits;
  constexpr auto kMask = static_cast<std::uint8_t>((1 << Bits) - 1);
  if (planes)
    for (int field = 0; field < kFields; ++field)
      for (std::int64_t j = 0; j < n; ++j)
        codes[field * n + j] = static_cast<std::uint8_t>(bytes[j] >> (Bits * field) & kMask);
  else
    for (std::int64_t j = 0; j < n; ++j)
      for (int field = 0; field < kFields; ++field)
        codes[j * kFields + field] = static_cast<std::uint8_t>(bytes[j] >> (Bits * field) & kMask);
}

// tile: [columns][kTileRows], of words [rows, columns].
void transpose(const std::uint32_t *words, std::int64_t rows, std::int64_t columns, std::int64_t stride,
               std::uint32_t (&tile)[kTileColumns][kTileRows]) {
  if (columns == kTileColumns) // a whole tile's loop is unrolled
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < kTileColumns; ++c) tile[c][r] = words[r * stride + c];
  else
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < columns; ++c) tile[c][r] = words[r * stride + c];
}

// Calls body(column, columns of the tile, row, rows of the tile, tile) for all tiles, a range of columns a thread.
template <class Body>
void over_tiles(const std::uint32_t *words, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                std::int64_t written, int threads, const Body &body) {
  const std::int64_t across = (columns + kTileColumns - 1) / kTileColumns;
  parallel_for(across, team_for(rows * columns * 4 + written, threads),
               [&](std::int64_t begin, std::int64_t end) {
                 std::uint32_t tile[kTileColumns][kTileRows];
                 for (std::int64_t c = begin * kTileColumns; c < std::min(columns, end * kTileColumns);
                      c += kTileColumns) {
                   const std::int64_t width = std::min(kTileColumns, columns - c);
                   for (std::int64_t r = 0; r < rows; r += kTileRows) {
                     const std::int64_t height = std::min(kTileRows, rows - r);
                     transpose(words + r * stride + c, height, width, stride, tile);
                     body(c, width, r, height, tile);
                   }
                 }
               });
}

} // namespace

void split_fields(const std::uint8_t *bytes, std::int64_t rows, std::int64_t n, std::int64_t stride, int bits,
                  bool planes, std::uint8_t *codes, int threads) {
  const std::int64_t made = n * (8 / bits);
  parallel_for(rows, team_for(rows * (n + made), threads), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::uint8_t *from = bytes + r * stride;
      std::uint8_t *to = codes + r * made;
      if (bits == 4) split_row<4>(from, n, planes, to);
      else if (bits == 2) split_row<2>(from, n, planes, to);
      else split_row<1>(from, n, planes, to);
    }
  });
}

void split_rows(const std::uint32_t *words, std::int64_t rows, std::int64_t columns, std::int64_t stride, int bits,
                std::uint8_t *codes, int threads) {
  const std::int64_t per_word = 32 / bits;
  over_tiles(words, rows, columns, stride, rows * columns * per_word, threads,
             [&](std::int64_t column, std::int64_t width, std::int64_t row, std::int64_t height, auto &tile) {
               for (std::int64_t c = 0; c < width; ++c) {
                 const auto *from = reinterpret_cast<const std::uint8_t *>(tile[c]);
                 std::uint8_t *to = codes + ((column + c) * rows + row) * per_word;
                 if (bits == 4) split_row<4>(from, 4 * height, false, to);
                 else if (bits == 2) split_row<2>(from, 4 * height, false, to);
                 else std::copy(from, from + 4 * height, to);
               }
             });
}

void split_columns(const std::uint32_t *words, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                   const int *order, std::uint8_t *codes, int threads) {
  over_tiles(words, rows, columns, stride, rows * columns * 8, threads,
             [&](std::int64_t column, std::int64_t width, std::int64_t row, std::int64_t height, auto &tile) {
               for (std::int64_t c = 0; c < width; ++c)
                 for (int field = 0; field < 8; ++field) {
                   const std::uint32_t *from = tile[c];
                   std::uint8_t *to = codes + ((column + c) * 8 + order[field]) * rows + row;
                   const int shift = 4 * field;
                   if (height == kTileRows)
                     for (std::int64_t r = 0; r < kTileRows; ++r)
                       to[r] = static_cast<std::uint8_t>(from[r] >> shift & 15);
                   else
                     for (std::int64_t r = 0; r < height; ++r)
                       to[r] = static_cast<std::uint8_t>(from[r] >> shift & 15);
                 }
             });
}

} // namespace pymllm::stored_codes
