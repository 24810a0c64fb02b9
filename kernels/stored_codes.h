// From the fields of a checkpoint's words and bytes to one byte a code, outputs first: what formats share, whatever they
// call it. Little-endian words; every function splits its rows between threads.
//
// R rows, C columns, n bytes
#pragma once

#include <cstdint>

namespace pymllm::stored_codes {

// bytes: [R, n], rows `stride` bytes apart. bits: 1, 2 or 4. codes: [R, n * 8 / bits] contiguous.
// planes: the lowest fields of all n bytes, then the next ones; else all fields of a byte, the lowest first, then those of
// the next byte.
void split_fields(const std::uint8_t *bytes, std::int64_t rows, std::int64_t n, std::int64_t stride, int bits,
                  bool planes, std::uint8_t *codes, int threads);

// words: [R, C] of 32 bits, rows `stride` words apart; their fields lie along the rows: codes: [C, R * 32 / bits], of
// each column the fields of its words, the lowest first. bits: 2, 4 or 8.
void split_rows(const std::uint32_t *words, std::int64_t rows, std::int64_t columns, std::int64_t stride, int bits,
                std::uint8_t *codes, int threads);

// words: [R, C] of eight 4-bit fields, rows `stride` words apart; their fields lie along the columns: codes: [8 C, R],
// where field k of word c is row 8 c + order[k].
void split_columns(const std::uint32_t *words, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                   const int *order, std::uint8_t *codes, int threads);

} // namespace pymllm::stored_codes
