// What the files of the C interface share: the kernels in use, and work dealt to threads.
//
// Threads are OpenMP's, at most as many as the caller says (torch's own number: both use one libgomp, so its setting
// rules), and none for small work. The next piece of the work goes to whoever is free: where one core is slower than
// the others, as the efficiency cores of a laptop are, it does less, and does not hold them. No sum depends on who
// makes it, or on how many there are. After a fork the threads of libgomp are gone and a parallel region would wait for
// them for ever: there everything runs on one thread. The alternative, torch's own at::parallel_for, would tie the
// library to one build of torch.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#else  // a compiler without it, such as Apple's: all on one thread
inline int omp_get_thread_num() { return 0; }
#endif

#include "attention.h"
#include "kernels.h"
#include "layer.h"

namespace qlora {

extern const Kernels* kernels;                        // of the instruction set in use
extern const Layer *layer, *integer_layer;            // a layer in float32, and by narrower products; or null
extern const Layer* bf16_layer;                       // of bf16, by its own products; or null: by those above
extern const Attention *attention, *float_attention;  // in bf16 and in float32; or null

// How many of `wanted` threads to use for these pieces: one in a process that is a fork.
int threads_for(int64_t pieces, int wanted);

namespace {

// piece(i, thread) for each i, in order; a thread's number is below threads_for(pieces, wanted).
template <class F>
void parallel_threads(int64_t pieces, int wanted, F piece) {
  const int threads = threads_for(pieces, wanted);
  if (threads == 1) {
    for (int64_t i = 0; i < pieces; ++i) piece(i, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(monotonic : dynamic)
  for (int64_t i = 0; i < pieces; ++i) piece(i, omp_get_thread_num());
}

template <class F>
void parallel(int64_t pieces, int wanted, F piece) {
  parallel_threads(pieces, wanted, [&](int64_t i, int) { piece(i); });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory handed out from the front in lines.
struct Work {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(next);
    next += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return taken;
  }
  int64_t bytes() const { return next - static_cast<char*>(nullptr); }  // of what was begun at null
};

constexpr int64_t kPiece = 1 << 15;  // elements decoded or encoded in one go; a multiple of every block size

// From so many bytes on a result is written past the caches: an ordinary store reads the line first, and too little of
// the result would stay there for the product that reads it. Below, the product loses more than decoding gains
// (measured on two cores that share a large cache; a smaller one would allow less). Not into fresh memory: the kernel
// has just cleared it, so its lines are in the cache.
constexpr int64_t kPastCaches = int64_t(80) << 20;
// From so many bytes on its lines are fetched; fewer may lie in the second cache, where that costs a tenth.
constexpr int64_t kFetch = int64_t(4) << 20;
constexpr int64_t kDotRows = 128;      // rows of one partial sum
constexpr int64_t kGramRows = 48;      // a multiple of every kPanelRows
constexpr int64_t kDotColumns = 4096;  // columns of one piece: their sums fill half of the first cache

// `sums` sums over rows, [sums, columns]: piece(row, rows, column, columns, to) writes the first of its part to `to`.
// kDotRows rows a part, the parts added up in order: the result does not depend on the number of threads.
template <class F>
void sum_rows(int64_t rows, int64_t columns, int64_t tile, int64_t sums, float* partial, float* out, int threads,
              F piece) {
  const int64_t parts = rows <= kDotRows ? 1 : ceil_div(rows, kDotRows), tiles = ceil_div(columns, tile),
                width = sums * columns;
  if (rows * columns < kPiece) threads = 1;
  parallel(parts * tiles, threads, [&](int64_t i) {
    const int64_t row = i / tiles * kDotRows, column = i % tiles * tile;
    piece(row, minimum(kDotRows, rows - row), column, minimum(tile, columns - column),
          (parts > 1 ? partial + i / tiles * width : out) + column);
  });
  if (parts == 1) return;
  parallel(ceil_div(width, kDotColumns), threads, [&](int64_t i) {
    for (int64_t c = i * kDotColumns; c < minimum(width, (i + 1) * kDotColumns); ++c) {
      float sum = partial[c];
      for (int64_t p = 1; p < parts; ++p) sum += partial[p * width + c];
      out[c] = sum;
    }
  });
}

// Columns first..last of A [rank, columns] in the tiles that `norms` and `gram` take, [ranks / 16, columns, 16]; zeros
// from `rank` on. A row of A after the other: rows a power of two apart would drive each other out of the cache.
inline void tile_factor(const float* A, int64_t rank, int64_t ranks, int64_t columns, int64_t first, int64_t last,
                        float* tiles) {
  for (int64_t k = 0; k < ranks; ++k) {
    float* const to = tiles + k / 16 * 16 * columns + k % 16;
    for (int64_t c = first; c < last; ++c) to[16 * c] = k < rank ? A[k * columns + c] : 0.0f;
  }
}

}  // namespace
}  // namespace qlora
