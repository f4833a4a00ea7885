// What product.cpp has for nf4.cpp, which cuts the work.
#pragma once
#include "nf4.h"

namespace qlora {

// y [tokens, outer] = x [tokens, inner] times W'^T or W', W' = diag(gain) W, plus left times an adapter's wide factor. All bf16 but what is float;
// tokens at least 32. Columns in 64s, blocks of no less; rows in 32s.
struct Product {
  Weight weight;          // [rows, columns], with a gain per row or none
  bool transposed;        // W^T: inner = columns, outer = rows; else the other way round
  const uint16_t* x;
  int64_t tokens, inner, outer;
  const uint16_t* left;   // [tokens, rank in 32s, the rest zeros]
  const uint16_t* down;   // with W: [rank, columns]
  const float* B;         // with W^T: [rows, rank], to be scaled
  int64_t rank;
  float scaling;
  uint16_t* y;
};

// What makes DoRA's n = ||W_j + s B_j A||, the factors m / n and up = diag(m / n) s B on the way, where the gain is not yet known.
struct ProductNorms {
  const uint16_t* split;  // A in two bf16: of each 16 ranks 16 rows of high parts, 16 of low ones, [columns] each
  const float* gram;      // A A^T [rank in 16s] squared
  const float *base, *m;  // ||W_j||, m
  float *n, *gain, *safe;
  uint16_t* up;
};

constexpr int64_t kProductBlock = 32;  // tokens and columns of y that are summed at a time

struct MatrixProduct {
  // Bytes of `work`, aligned to 64, that a thread needs for either.
  int64_t (*room)(int64_t inner, int64_t rank);
  // u = x down^T of some tokens to [tokens, rank] and, in 32s, to `left`. down [rank, inner].
  void (*narrow)(const uint16_t* x, const uint16_t* down, int64_t inner, int64_t rank, int64_t token, int64_t tokens, char* work, uint16_t* u, uint16_t* left);
  // u of some tokens to `left`.
  void (*widen)(const uint16_t* u, int64_t rank, int64_t token, int64_t tokens, uint16_t* left);
  // Ranks 16 strip.. of A [rank, inner]: their two parts, and their rows of A A^T.
  void (*split)(const float* A, int64_t inner, int64_t rank, int64_t strip, uint16_t* split, float* gram);
  // Some tokens and panels of 32 columns of y; norms or null. False where the sums of an n cancel, so that it is not exact.
  bool (*wide)(const Product&, const ProductNorms*, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work);
};
extern const MatrixProduct matrix_product;  // empty where the compiler cannot make it

}  // namespace qlora
