// What product.cpp has for nf4.cpp, which cuts the work.
#pragma once
#include "nf4.h"

namespace qlora {

// y [tokens, outer] = x [tokens, inner] times W^T or W, plus left times an adapter's wide factor. All bf16; tokens at least 32.
struct Product {
  Weight weight;         // [rows, columns], with a gain per row or none
  bool transposed;       // W^T: inner = columns, outer = rows; else the other way round. Columns in 64s, blocks of no less; rows in 32s
  const uint16_t* x;
  int64_t tokens, inner, outer;
  const uint16_t* left;  // [tokens, rank in 32s, the rest zeros], or null
  const uint16_t* right; // [rows, rank] with W^T, [rank, columns] with W
  int64_t rank;
  uint16_t* y;
};

constexpr int64_t kProductBlock = 32;        // tokens and columns of y that are summed at a time
constexpr int64_t kProductPanels = 1 << 19;  // bytes of decoded panels that a thread keeps

struct MatrixProduct {
  // Bytes of `work`, aligned to 64, that a thread needs for either.
  int64_t (*room)(int64_t inner, int64_t rank);
  // u = x down^T of some tokens to [tokens, rank] and, in 32s, to `left`. down [rank, inner].
  void (*narrow)(const uint16_t* x, const uint16_t* down, int64_t inner, int64_t rank, int64_t token, int64_t tokens, char* work, uint16_t* u, uint16_t* left);
  // u of some tokens to `left`.
  void (*widen)(const uint16_t* u, int64_t rank, int64_t token, int64_t tokens, uint16_t* left);
  // Some tokens and panels of 32 columns of y.
  void (*wide)(const Product&, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work);
};
extern const MatrixProduct matrix_product;  // empty where the compiler cannot make it

}  // namespace qlora
