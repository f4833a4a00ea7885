// An adapted layer: row norms, factors, its product and its gradients.

#include "api.h"
#include "dispatch.h"
#include "nf4_gemm_amx.h"
#include "skinny_gemm_amx.h"

using namespace qlora;

extern "C" {

// How many partial sums a sum over rows wants room for: [partials, sums, columns] floats. 1: none, it writes the result
// directly.
int64_t qlora_partials(int64_t rows) { return rows <= kDotRows ? 1 : ceil_div(rows, kDotRows); }

void qlora_column_dots(int dtype, const void* a, int64_t lda, const void* b, int64_t ldb, int64_t rows, int64_t columns,
                       float* partial, float* out, int threads) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  sum_rows(rows, columns, kDotColumns, 1, partial, out, threads,
           [&](int64_t row, int64_t count, int64_t column, int64_t size, float* to) {
             kernels->dots(Dtype(dtype), static_cast<const char*>(a) + (row * lda + column) * width, lda,
                           static_cast<const char*>(b) + (row * ldb + column) * width, ldb, count, size, to);
           });
}

// A [rank, columns], B [rows, rank]; room for the tiles [rank / 16, columns, 16] and for gram [rank, rank]; the rank a
// multiple of 16.
void qlora_row_norms_4bit(const Weight* weight, const float* A, float* tiles, const float* B, float* gram, int64_t rank,
                          float scaling, float* n, int threads) {
  const Weight w = *weight;
  const int64_t rows = w.rows, columns = w.columns;
  const int64_t step = 128, strips = ceil_div(columns, step);
  const int before = rank * columns <= kPiece ? 1 : threads;  // to wake another takes as long
  parallel(strips, before,
           [&](int64_t i) { tile_factor(A, rank, rank, columns, i * step, minimum(columns, (i + 1) * step), tiles); });
  parallel(ceil_div(rank, kGramRows), before, [&](int64_t i) {
    kernels->gram(A, tiles, rank, columns, i * kGramRows, minimum(rank, (i + 1) * kGramRows), gram);
  });
  parallel(ceil_div(rows, kNormRows), threads, [&](int64_t i) {
    kernels->norms(w, tiles, B, gram, rank, scaling, i * kNormRows, minimum(rows, (i + 1) * kNormRows), n);
  });
}

// down = A, up = scaling * B, times gain by row where m and n [rows] are given; gain = m / n of the m and n that are
// safe to divide by.
void qlora_fold_factors(int dtype, const float* A, int64_t count, const float* B, int64_t rows, int64_t rank,
                        float scaling, const float* m, const float* n, void* down, void* up, float* gain, float* safe,
                        int threads) {
  if (m != nullptr)
    for (int64_t j = 0; j < rows; ++j) fold(m[j], n[j], safe[j], gain[j]);
  const int64_t width = dtype == kFloat32 ? 4 : 2, step = ceil_div(kPiece, rank), first = ceil_div(rows, step);
  if (rows * rank + count <= 2 * kPiece) threads = 1;  // to wake another takes as long
  parallel(first + ceil_div(count, kPiece), threads, [&](int64_t i) {
    if (i < first)
      kernels->scaled(Dtype(dtype), B + i * step * rank, minimum(step, rows - i * step), rank, scaling,
                      m == nullptr ? nullptr : gain + i * step, static_cast<char*>(up) + i * step * rank * width);
    else
      kernels->scaled(Dtype(dtype), A + (i - first) * kPiece, 1, minimum(kPiece, count - (i - first) * kPiece), 1.0f,
                      nullptr, static_cast<char*>(down) + (i - first) * kPiece * width);
  });
}

// Floats of `work` for the two below.
int64_t qlora_narrow_room(int64_t tokens, int64_t columns, int64_t rank) {
  const int64_t padded = ceil_div(rank, 16) * 16;
  return ceil_div(columns, kStrip) * tokens * padded + ceil_div(tokens, kPart) * columns * (padded + 1);
}

// All of a layer's gradients that are sums over dy = x [tokens, columns]: v = dy up, dB = diag(scaling gain) dyt left,
// dm_c = sum_t dy y / safe; with out, not v, dB and dm: out [rank, columns] = leftt x.
void qlora_narrow(const void* x, const void* y, const void* left, const void* up, int64_t tokens, int64_t columns,
                  int64_t rank, float scaling, const float* gain, const float* safe, float* work, void* v, float* dB,
                  float* dm, float* out, int threads) {
  const auto bf16 = [](const void* p) { return static_cast<const uint16_t*>(p); };
  const Narrow n{bf16(x), bf16(y), bf16(left), bf16(up), tokens, columns, rank};
  const int64_t padded = ceil_div(rank, 16) * 16, parts = ceil_div(tokens, kPart), strips = ceil_div(columns, kStrip);
  const int64_t width =
      ceil_div(ceil_div(columns, strips), 32) * 32;  // strips of one size, and so the last is never much narrower
  float *partial_v = work, *partial_p = work + strips * tokens * padded,
        *partial_dots = partial_p + parts * columns * padded;
  if (tokens * columns < kPiece) threads = 1;
  parallel(parts * strips, threads, [&](int64_t i) {
    const int64_t part = i / strips, strip = i % strips, token = part * kPart, column = strip * width;
    if (column < columns)
      matrix_products.piece(n, token, minimum(kPart, tokens - token), column, minimum(width, columns - column),
                            partial_v + strip * tokens * padded, partial_p + part * columns * padded,
                            partial_dots + part * columns);
  });
  const int64_t used = ceil_div(columns, width), step = 256, pieces = ceil_div(columns, step);
  parallel(pieces + (v == nullptr ? 0 : ceil_div(tokens, step)), threads, [&](int64_t i) {
    if (i >= pieces)
      return matrix_products.finish_tokens(n, partial_v, used, (i - pieces) * step,
                                           minimum(step, tokens - (i - pieces) * step), static_cast<uint16_t*>(v));
    const int64_t stop = minimum(columns, (i + 1) * step);
    matrix_products.finish_columns(n, partial_p, parts, i * step, stop - i * step, out == nullptr, scaling, gain,
                                   out == nullptr ? dB : out);
    for (int64_t c = i * step; y != nullptr && c < stop; ++c) {
      float sum = partial_dots[c];
      for (int64_t p = 1; p < parts; ++p) sum += partial_dots[p * columns + c];
      dm[c] = sum / safe[c];
    }
  });
}

// Bytes of `work` for the product below.
int64_t qlora_product_bytes(int64_t tokens, int64_t inner, int64_t rank, int threads) {
  const int64_t strips = ceil_div(rank, 16);
  return tokens * ceil_div(rank, 32) * 64 + strips * (32 * inner + 16 * 64 * strips) +
         threads * matrix_product.room(inner, rank);
}

// With A, a layer forward: y [tokens, rows] = x [tokens, columns] W'^T + u up^T, u = x_narrow A^T, W' = diag(gain) W; A
// [rank, columns], B [rows, rank], and `down`, up, gain and safe as fold_factors makes them of m and n. With base =
// ||W_j||, n is made on the way; 0 where it is not exact. Without A: y [tokens, columns] = x [tokens, rows] W' + u
// down, u [tokens, rank], or, transposed, y = x W'^T. All but the factors in bf16. `work` is aligned to 64.
int qlora_product(const Weight* weight, float* gain, int transposed, const uint16_t* x, int64_t tokens,
                  const uint16_t* x_narrow, uint16_t* u, uint16_t* down, int64_t rank, const float* A, const float* B,
                  float scaling, const float* m, const float* base, float* safe, float* n, uint16_t* up, char* work,
                  uint16_t* y, int threads) {
  Weight w = *weight;
  w.gain = gain;
  const int64_t rows = w.rows, columns = w.columns;
  const int64_t inner = transposed ? columns : rows, outer = transposed ? rows : columns,
                room = matrix_product.room(inner, rank), strips = ceil_div(rank, 16);
  uint16_t *const left = reinterpret_cast<uint16_t*>(work), *const padded = left + tokens * ceil_div(rank, 32) * 32;
  float* const gram = reinterpret_cast<float*>(padded + strips * 16 * inner);
  char* const rooms = reinterpret_cast<char*>(gram + 256 * strips * strips);
  const Product product{w, transposed != 0, x, tokens, inner, outer, rank, left, down, B, scaling, y};
  const Factors factors{A, m, base, down, up, gain, safe, n, padded, gram};
  for (int64_t j = 0; A != nullptr && m != nullptr && base == nullptr && j < rows; ++j)
    fold(m[j], n[j], safe[j], gain[j]);
  const int64_t blocks = ceil_div(tokens, kProductBlock), panels = outer / kProductBlock,
                cut = threads_for(blocks, threads);
  if (rank > 0)
    parallel(cut + (A == nullptr ? 0 : strips), threads, [&](int64_t i) {
      if (i >= cut) return matrix_product.factors(factors, inner, rank, i - cut);
      const int64_t token = blocks * i / cut * kProductBlock,
                    stop = minimum(tokens, blocks * (i + 1) / cut * kProductBlock);
      if (A != nullptr)
        matrix_product.narrow(x_narrow, A, inner, rank, token, stop - token, rooms + i * room, u, left);
      else
        matrix_product.widen(u, rank, token, stop - token, left);
    });
  int exact = 1;
  const auto wide = [&](const Factors* made, int64_t token, int64_t stop, int64_t panel, int64_t count, char* own) {
    if (!matrix_product.wide(product, made, token, stop - token, panel, count, own))
      __atomic_store_n(&exact, 0, __ATOMIC_RELAXED);
  };
  // A thread's share: panels, and where there are too few, parts of the tokens too, of which none can make factors for
  // the others.
  const int64_t parts = minimum(blocks, ceil_div(threads, panels)), shares = threads_for(parts * panels, threads);
  const Factors* made = A == nullptr ? nullptr : &factors;
  if (made != nullptr && parts > 1) {
    parallel(panels, threads, [&](int64_t i) { wide(made, 0, 0, i, 1, rooms + i * room); });
    made = nullptr;
  }
  parallel(shares, threads, [&](int64_t i) {
    for (int64_t at = parts * panels * i / shares, stop = parts * panels * (i + 1) / shares; at < stop;) {
      const int64_t part = at / panels, count = minimum(stop, (part + 1) * panels) - at;
      wide(made, blocks * part / parts * kProductBlock, minimum(tokens, blocks * (part + 1) / parts * kProductBlock),
           at % panels, count, rooms + i * room);
      at += count;
    }
  });
  return exact;
}

// Bytes of `work`, aligned to 64, for the pass below.
int64_t qlora_adapted_backward_bytes(int64_t tokens, int64_t rows, int64_t columns, int64_t rank, int threads) {
  const int64_t sums = 4 * qlora_narrow_room(tokens, rows > columns ? rows : columns, rank),
                product = qlora_product_bytes(tokens, rows, rank, threads);
  return ceil_div(2 * tokens * rank, 64) * 64 + (sums > product ? sums : product);
}

// The backward pass of an adapted layer, of what its forward pass left: dB and, given y, dm as above, dA = vt x, and dx
// = dy W' + v down unless null.
void qlora_adapted_backward(const Weight* weight, float* gain, const uint16_t* dy, const uint16_t* x, uint16_t* down,
                            const void* up, const void* u, const void* y, int64_t tokens, int64_t rank, float scaling,
                            const float* safe, char* work, uint16_t* dx, float* dA, float* dB, float* dm, int threads) {
  const int64_t rows = weight->rows, columns = weight->columns;
  uint16_t* const v = reinterpret_cast<uint16_t*>(work);
  work += ceil_div(2 * tokens * rank, 64) * 64;
  float* const sums = reinterpret_cast<float*>(work);
  qlora_narrow(dy, y, u, up, tokens, rows, rank, scaling, gain, safe, sums, v, dB, dm, nullptr, threads);
  qlora_narrow(x, nullptr, v, nullptr, tokens, columns, rank, 1.0f, nullptr, nullptr, sums, nullptr, nullptr, nullptr,
               dA, threads);
  if (dx != nullptr)
    qlora_product(weight, gain, 0, dy, tokens, nullptr, v, down, rank, nullptr, nullptr, 1.0f, nullptr, nullptr,
                  nullptr, nullptr, nullptr, work, dx, threads);
}

}  // extern "C"
