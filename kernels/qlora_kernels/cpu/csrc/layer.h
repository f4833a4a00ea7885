// What nf4_gemm.h, nf4_gemm_integers.h and nf4_gemm_bf16.h have for api_layer.cpp, which cuts the work: an adapted
// layer of values that lie in float32 or bf16, with sums in float32.
#pragma once
#include "kernels.h"
#include "types.h"

namespace qlora {

// A matrix as it lies, row by row.
struct Values {
  const void* at;
  bool bf16;  // else float32
};

// An adapter's narrow factor [inner, rank], or transposed [rank, inner].
struct NarrowFactor {
  const float* at;
  int64_t rank;
  bool transposed;
};

// x in integers, see nf4_gemm_integers.h: [tile][64 of inner][row of the tile][64], and a scale for each 64.
struct Integers {
  int16_t* values;
  float* scales;
};

// y [tokens, outer] = x [tokens, inner] times W'^T or W', W' = diag(gain) W, plus left times an adapter's wide factor.
// Columns in 64s, blocks of no less; rows in 32s.
struct LayerProduct {
  Weight weight;    // [rows, columns], with a gain per row or none
  bool transposed;  // W^T: inner = columns, outer = rows; else the other way round
  Values x;
  int64_t tokens, inner, outer;
  int64_t rank;
  const float* left;    // [tokens, rank]
  const float* factor;  // with W^T: [rows, rank]; with W: [rank, columns]
  float* y;             // null where y is in bf16 and the product rounds it
  BF16* rounded;        // y in bf16, or null
  Integers integers;    // of x, where the product is by integers
};

// y [tokens, outer] = x [tokens, inner] times W^T or W of a dense W [rows, columns], in float32 or bf16; columns in
// 64s.
struct DenseProduct {
  Values weight;
  bool transposed;  // as above
  const float* x;
  int64_t tokens, inner, outer;
  float* y;
};

// For some columns of x [tokens, columns]: out [rank in 8s, kStripColumns] = left^T x, and dots_c = sum_t x_tc y_tc.
struct LayerSums {
  Values x, y;        // y or null
  const float* left;  // [tokens, rank in 8s, the rest zeros]
  int64_t tokens, columns, ranks;
};
constexpr int64_t kStripColumns = 128;

struct Layer {
  int64_t tile, width;  // tokens and columns of y that are summed at a time; work is cut at tiles
  bool rounds;          // `wide` itself rounds a y in bf16
  // Bytes that a thread needs for each of those below, aligned to 64.
  int64_t (*room)(int64_t inner, int64_t rank);
  // u [tokens, rank] = x factor of some tokens.
  void (*narrow)(Values x, int64_t inner, NarrowFactor factor, int64_t token, int64_t tokens, char* work, float* u);
  // Some tokens of x in integers; null where the product takes x as it is.
  void (*integers)(Values x, int64_t inner, int64_t token, int64_t tokens, Integers out);
  void (*wide)(const LayerProduct&, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work);
  void (*sums)(const LayerSums&, int64_t column, int64_t columns, float* out, float* dots);
  // As `room` and `wide` of a dense weight; null where the library's product is as fast.
  int64_t (*dense_room)();
  void (*dense)(const DenseProduct&, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work);
};

#if defined(__x86_64__)
extern const Layer avx2_layer, avx2_integer_layer, avx_vnni_layer, avx512_layer, avx512_vnni_layer, avx512_bf16_layer;
#elif defined(__aarch64__)
extern const Layer neon_layer;
#endif

}  // namespace qlora
