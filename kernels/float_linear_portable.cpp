// float_linear in plain C++, four lanes that a compiler can map onto any 128-bit vector unit.
#include <cstdint>
#include <cstring>

#include "float_linear.h"
#include "float_scalar.h"
#include "vector_portable.h"

namespace pymllm {
namespace {

struct V : Lanes {
  static constexpr int kTokens = 2;
  static std::uint16_t word(const std::uint8_t *p, int i) {
    std::uint16_t bits;
    std::memcpy(&bits, p + 2 * i, 2);
    return bits;
  }
  static void decode_bf16(const std::uint8_t *p, int part, Vec *out) {
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(word(p, 4 * part + i)) << 16;
      std::memcpy(&out[0].lane[i], &bits, 4);
    }
  }
  static int order_bf16(int lane) { return lane; }
  static void decode_f16(const std::uint8_t *p, int part, Vec *out) {
    for (int i = 0; i < 4; ++i) out[0].lane[i] = from_f16(word(p, 4 * part + i));
  }
  // As float_linear_avx512.cpp does it.
  static void decode_e4m3(const std::uint8_t *p, int part, Vec *out) {
    for (int i = 0; i < 8; ++i) {
      const std::uint8_t code = p[8 * part + i];
      out[i / 4].lane[i % 4] = from_f16(static_cast<std::uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7));
    }
  }
  static int order_e4m3(int lane) { return lane; }
  static int span_e4m3(int) { return 0; }

  struct Table {
    float values[16];
  };
  static Table load_table(const float *p) {
    Table table;
    std::memcpy(table.values, p, sizeof table.values);
    return table;
  }
  static Table scaled(Table table, Vec scale) {
    for (float &value : table.values) value *= scale.lane[0];
    return table;
  }
  // 8 bytes of two codes, in order.
  static void decode_codebook(const std::uint8_t *p, int part, const Table &table, Vec *out) {
    for (int i = 0; i < 8; ++i) {
      const std::uint8_t byte = p[4 * part + i / 2];
      out[i / 4].lane[i % 4] = table.values[i % 2 == 0 ? byte & 15 : byte >> 4];
    }
  }
  static int order_codebook(int lane) { return lane; }
};

#include "float_linear_kernel.h"

} // namespace

const FloatLinearPath &float_linear_portable() { return kPath; }

} // namespace pymllm
