// What skinny_gemm_amx.cpp has for api_adapter.cpp, which cuts the work.
#pragma once
#include <stdint.h>

namespace qlora {

constexpr int64_t kPart = 512, kStrip = 256;  // tokens and columns of a piece, multiples of 32

struct Narrow {
  const uint16_t* x;     // bf16 [tokens, columns]
  const uint16_t* y;     // the same, or null: no dots
  const uint16_t* left;  // bf16 [tokens, rank]
  const uint16_t* up;    // bf16 [columns, rank], or null: no v
  int64_t tokens, columns, rank;
};

struct NarrowProducts {
  // Some tokens and columns: v [tokens, rank] of the strip, p [rank, columns] and dots [columns] of the part; ranks of
  // v and p padded to 16s.
  void (*piece)(const Narrow&, int64_t token, int64_t tokens, int64_t column, int64_t columns, float* v, float* p,
                float* dots);
  // The sum of v over strips to bf16 [tokens, rank].
  void (*finish_tokens)(const Narrow&, const float* v, int64_t strips, int64_t token, int64_t tokens, uint16_t* out);
  // The sum of p over parts to [rank, columns] or, transposed, to [columns, rank] times scaling and the gains of
  // columns, if given.
  void (*finish_columns)(const Narrow&, const float* p, int64_t parts, int64_t column, int64_t columns, bool transposed,
                         float scaling, const float* gain, float* out);
};
extern const NarrowProducts matrix_products;  // empty where the compiler cannot make it

}  // namespace qlora
