// What nf4_gemm_amx.cpp has for api_adapter.cpp, which cuts the work.
#pragma once
#include "kernels.h"

namespace qlora {

// y [tokens, outer] = x [tokens, inner] times W'^T or W', W' = diag(gain) W, plus left times an adapter's wide factor.
// All bf16 but what is float; tokens at least 32. Columns in 64s, blocks of no less; rows in 32s.
struct Product {
  Weight weight;    // [rows, columns], with a gain per row or none
  bool transposed;  // W^T: inner = columns, outer = rows; else the other way round
  const uint16_t* x;
  int64_t tokens, inner, outer;
  int64_t rank;
  const uint16_t* left;  // [tokens, rank in 32s, the rest zeros]
  const uint16_t* down;  // with W: [rank, columns]
  const float* B;        // with W^T: [rows, rank]
  float scaling;
  uint16_t* y;
};

// The factors of a layer [out, in] in a forward pass: what it leaves for the backward pass is made on its way.
struct Factors {
  const float *A, *m;      // A [rank, in]; m [out] or null: no gain
  const float* base;       // ||W_j||, where n is to be made; or null
  uint16_t *down, *up;     // A, and diag(gain) s B, in bf16
  float *gain, *safe, *n;  // see `fold`
  uint16_t* rows;          // with base: A in bf16 [rank in 16s, the rest zeros; in]
  float* gram;             // with base: A A^T [rank in 16s] squared
};

constexpr int64_t kProductBlock = 32;  // tokens and columns of y that are summed at a time

struct MatrixProduct {
  // Bytes of `work`, aligned to 64, that a thread needs for either.
  int64_t (*room)(int64_t inner, int64_t rank);
  // u = x A^T of some tokens to [tokens, rank] and, in 32s, to `left`.
  void (*narrow)(const uint16_t* x, const float* A, int64_t inner, int64_t rank, int64_t token, int64_t tokens,
                 char* work, uint16_t* u, uint16_t* left);
  // u of some tokens to `left`.
  void (*widen)(const uint16_t* u, int64_t rank, int64_t token, int64_t tokens, uint16_t* left);
  // Ranks 16 strip.. of what is made of A [rank, inner].
  void (*factors)(const Factors&, int64_t inner, int64_t rank, int64_t strip);
  // Some tokens and panels of 32 columns of y; the factors of a forward pass or null. False where the sums of an n
  // cancel, so that it is not exact.
  bool (*wide)(const Product&, const Factors*, int64_t token, int64_t tokens, int64_t panel, int64_t panels,
               char* work);
};
extern const MatrixProduct matrix_product;  // empty where the compiler cannot make it

}  // namespace qlora
