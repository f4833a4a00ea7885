// An adapted layer, forward and backward, on every instruction set that has a `Layer`.

#include <string.h>

#include "api.h"
#include "dispatch.h"
#include "types.h"

using namespace qlora;

namespace {

inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

struct Call {
  const Layer& kernel;
  int64_t tokens, rank;
  int threads;
  int64_t own;  // bytes of each thread
  char* rooms;
  char* room_of(int64_t thread) const { return rooms + thread * own; }
};

void no_strip(int64_t, int) {}

int64_t in_eights(int64_t rank) { return ceil_div(rank, 8) * 8; }
int64_t in_sixteens(int64_t rank) { return ceil_div(rank, 16) * 16; }

int64_t own_bytes(const Layer& l, int64_t inner, int64_t rank) {
  const int64_t sums = int64_t(sizeof(float)) * (in_eights(rank) + 1) * kStripColumns;
  return ceil_div(maximum(l.room(inner, rank), sums), 64) * 64;
}

Call call_of(int by_integers, int bf16, int64_t tokens, int64_t inner, int64_t rank, int threads, Work& work) {
  const Layer& l = bf16 && bf16_layer != nullptr ? *bf16_layer : by_integers ? *integer_layer : *layer;
  const int64_t own = own_bytes(l, inner, rank);
  return {l, tokens, rank, threads, own, work.take<char>(threads * own)};
}

// An adapter as it learns, and what its layer's product takes: down = A and up = s g B, g = m / n, rounded where values
// are bf16. Where DoRA's n is not given, whoever multiplies with some rows of W makes it of them first: alone it would
// be one more call for each layer, in which W is read and nothing multiplied.
struct Adapter {
  Weight weight;           // without g
  const float *A, *B, *m;  // m null in LoRA
  int64_t rank;
  float scaling;
  bool makes_n;
  float *gain, *safe, *n;  // see `fold`
  float *down, *up;
  BF16* rounded;                 // up as it is kept, or null
  float *tiles, *gram, *wide_B;  // what `norms` takes, of a rank in sixteens
};

// In `work`; down and up are kept in `down` and `up`, in bf16 or not, and g, the m that is safe to divide by, and n, in
// `factors` [3, rows].
Adapter adapter_of(const Weight& w, const float* A, const float* B, const float* m, int makes_n, int64_t rank,
                   float scaling, int bf16, float* factors, void* down, void* up, Work& work) {
  const int64_t ranks = in_sixteens(rank), count = rank * w.columns;
  float *const wide_down = work.take<float>(count), *const wide_up = work.take<float>(w.rows * rank),
               *const tiles = work.take<float>(ranks * w.columns), *const gram = work.take<float>(ranks * ranks),
               *const wide_B = work.take<float>(w.rows * ranks);
  return {w,
          A,
          B,
          m,
          rank,
          scaling,
          makes_n != 0,
          factors,
          factors + w.rows,
          factors + 2 * w.rows,
          bf16 ? wide_down : static_cast<float*>(down),
          bf16 ? wide_up : static_cast<float*>(up),
          bf16 ? static_cast<BF16*>(up) : nullptr,
          tiles,
          gram,
          wide_B};
}

void prepare_norms(const Adapter& a) {
  const int64_t ranks = in_sixteens(a.rank), columns = a.weight.columns;
  tile_factor(a.A, a.rank, ranks, columns, 0, columns, a.tiles);
  kernels->gram(a.A, a.tiles, ranks, columns, 0, a.rank, a.gram);
  memset(a.gram + a.rank * ranks, 0, sizeof(float) * (ranks - a.rank) * ranks);
}

// n, g and up of rows first..last.
void make_factors(const Adapter& a, int64_t first, int64_t last) {
  const int64_t ranks = in_sixteens(a.rank), at = first * a.rank, end = last * a.rank;
  for (int64_t j = first; a.makes_n && ranks > a.rank && j < last; ++j) {
    memset(a.wide_B + j * ranks, 0, sizeof(float) * ranks);
    memcpy(a.wide_B + j * ranks, a.B + j * a.rank, sizeof(float) * a.rank);
  }
  for (int64_t j = first; a.makes_n && j < last; j += kNormRows)
    kernels->norms(a.weight, a.tiles, ranks > a.rank ? a.wide_B : a.B, a.gram, ranks, a.scaling, j,
                   minimum(last, j + kNormRows), a.n);
  for (int64_t j = first; a.m != nullptr && j < last; ++j) fold(a.m[j], a.n[j], a.safe[j], a.gain[j]);
  const float* const gain = a.m == nullptr ? nullptr : a.gain + first;
  if (a.rounded == nullptr)
    return kernels->scaled(kFloat32, a.B + at, last - first, a.rank, a.scaling, gain, a.up + at);
  kernels->scaled(kBFloat16, a.B + at, last - first, a.rank, a.scaling, gain, a.rounded + at);
  for (int64_t i = at; i < end; ++i) a.up[i] = to_float(a.rounded[i]);
}

// u [tokens, rank] = x factor, and x in integers; either x may be null. Beside them first(), if there is `more`.
template <class F>
void prepare(const Call& c, Values narrow, Values x, int64_t inner, NarrowFactor factor, float* u, Integers to,
             bool more, F first) {
  constexpr int64_t kPieces = 4;  // of each thread
  const int64_t blocks = ceil_div(c.tokens, c.kernel.tile), threads = threads_for(blocks, c.threads),
                pieces = threads == 1 ? 1 : minimum(blocks, kPieces * threads);
  parallel_threads(pieces + more, c.threads, [&](int64_t k, int thread) {
    if (more && k == 0) return first();
    const int64_t i = k - more, token = blocks * i / pieces * c.kernel.tile,
                  stop = minimum(c.tokens, blocks * (i + 1) / pieces * c.kernel.tile);
    if (narrow.at != nullptr) c.kernel.narrow(narrow, inner, factor, token, stop - token, c.room_of(thread), u);
    if (x.at != nullptr && c.kernel.integers != nullptr) c.kernel.integers(x, inner, token, stop - token, to);
  });
}

// Panels of the smallest piece. Each piece lays x out once more, and of a head's gradients x is as wide as the
// vocabulary.
constexpr int64_t kLayerPanels = 2, kDensePanels = 8;

struct Range {
  int64_t start, stop;
};

// Piece k of `all` units, in rounds of a piece for each thread, each round half of what is left: threads that are
// equally fast end at the same time, and a slow one takes fewer; none has less than `least` but in the last. Empty
// behind that.
Range dealt(int64_t all, int64_t threads, int64_t least, int64_t k) {
  for (int64_t at = 0;; k -= threads) {
    const int64_t left = all - at, half = left / (2 * threads),
                  size = threads == 1 || half < least ? ceil_div(left, threads) : half;
    if (k < threads || size * threads >= left) return {minimum(all, at + k * size), minimum(all, at + (k + 1) * size)};
    at += size * threads;
  }
}

// In how many parts the tokens of a product are cut: more than one where it has few panels.
int64_t parts_of(const Layer& l, int64_t tokens, int64_t outer, int wanted) {
  constexpr int64_t kUnits = 8;  // of each thread
  const int64_t panels = ceil_div(outer, l.width), blocks = ceil_div(tokens, l.tile);
  const int threads = threads_for(panels * blocks, wanted);
  return threads == 1 ? 1 : minimum(blocks, ceil_div(kUnits * threads, panels));
}

// strip(i, thread) for `strips` strips, and a product, piece(token, tokens, panel, panels, thread), in pieces of panels
// and of parts of the tokens.
template <class G, class F>
void share(const Layer& l, int64_t tokens, int64_t outer, int wanted, int64_t least, int64_t strips, G strip, F piece) {
  const int64_t panels = ceil_div(outer, l.width), blocks = ceil_div(tokens, l.tile);
  const int threads = threads_for(panels * blocks, wanted);
  const int64_t parts = parts_of(l, tokens, outer, wanted), all = parts * panels;
  int64_t pieces = 0;
  while (dealt(all, threads, least, pieces).start < all) ++pieces;
  parallel_threads(strips + pieces, threads, [&](int64_t i, int thread) {
    if (i < strips) return strip(i, thread);
    const Range some = dealt(all, threads, least, i - strips);
    for (int64_t at = some.start; at < some.stop;) {
      const int64_t part = at / panels, count = minimum(some.stop, (part + 1) * panels) - at;
      const int64_t token = blocks * part / parts * l.tile, end = minimum(tokens, blocks * (part + 1) / parts * l.tile);
      piece(token, end - token, at % panels, count, thread);
      at += count;
    }
  });
}

// The product, rounded where y is in bf16, and strips. `adapter`: whose factors are yet to be made, or null.
template <class G>
void multiply(const Call& c, const LayerProduct& p, const Adapter* adapter, int64_t strips, G strip) {
  if (adapter != nullptr && parts_of(c.kernel, c.tokens, p.outer, c.threads) > 1) {  // of one panel several need them
    parallel(ceil_div(p.outer, c.kernel.width), c.threads, [&](int64_t i) {
      make_factors(*adapter, i * c.kernel.width, minimum(p.outer, (i + 1) * c.kernel.width));
    });
    adapter = nullptr;
  }
  share(c.kernel, c.tokens, p.outer, c.threads, kLayerPanels, strips, strip,
        [&](int64_t token, int64_t tokens, int64_t panel, int64_t panels, int thread) {
          const int64_t start = panel * c.kernel.width, stop = minimum(p.outer, (panel + panels) * c.kernel.width);
          if (adapter != nullptr) make_factors(*adapter, start, stop);
          c.kernel.wide(p, token, tokens, panel, panels, c.room_of(thread));
          for (int64_t t = token; p.y != nullptr && p.rounded != nullptr && t < token + tokens; ++t)
            for (int64_t k = start; k < stop; ++k) p.rounded[t * p.outer + k] = round_to<BF16>(p.y[t * p.outer + k]);
        });
}

// Sums over tokens of `columns` columns; left [tokens, rank], padded to eights.
LayerSums sums_of(const Call& c, Values x, Values y, const float* left, int64_t columns, Work& work) {
  const int64_t ranks = in_eights(c.rank);
  float* const padded = work.take<float>(c.tokens * ranks);
  for (int64_t t = 0; ranks != c.rank && t < c.tokens; ++t)
    for (int64_t k = 0; k < ranks; ++k) padded[t * ranks + k] = k < c.rank ? left[t * c.rank + k] : 0.0f;
  return {x, y, ranks == c.rank ? left : padded, c.tokens, columns, ranks};
}

int64_t strips_of(const LayerSums& s) { return ceil_div(s.columns, kStripColumns); }

// A strip of them, in the room of a thread: put(column, columns, sums [rank in 8s, kStripColumns], dots [columns]).
template <class F>
void sum_strip(const Call& c, const LayerSums& s, int64_t strip, int64_t thread, F put) {
  float *const out = reinterpret_cast<float*>(c.room_of(thread)), *const dots = out + s.ranks * kStripColumns;
  const int64_t column = strip * kStripColumns, columns = minimum(kStripColumns, s.columns - column);
  c.kernel.sums(s, column, columns, out, dots);
  put(column, columns, out, dots);
}

// Where a product writes: a y in bf16 that the kernel does not round goes through float32.
struct Result {
  float* y;
  BF16* rounded;
};

Result result_of(const Call& c, void* y, int bf16, int64_t outer, Work& work) {
  if (!bf16) return {static_cast<float*>(y), nullptr};
  return {c.kernel.rounds ? nullptr : work.take<float>(c.tokens * outer), static_cast<BF16*>(y)};
}

Integers integers_of(const Call& c, int64_t inner, Work& work) {
  if (c.kernel.integers == nullptr) return {};
  const int64_t rows = ceil_div(c.tokens, c.kernel.tile) * c.kernel.tile, parts = ceil_div(inner, 64);
  int16_t* const values = work.take<int16_t>(rows * parts * 64);
  return {values, work.take<float>(rows * parts)};
}

}  // namespace

extern "C" {

// Bytes of `work`, aligned to 64, for either pass below.
int64_t qlora_layer_bytes(int by_integers, int bf16, int64_t tokens, int64_t rows, int64_t columns, int64_t rank,
                          int threads) {
  const int64_t inner = maximum(rows, columns), ranks = in_eights(rank);
  Work work{nullptr};
  const Call c = call_of(by_integers, bf16, tokens, inner, rank, threads, work);
  integers_of(c, inner, work);
  work.take<float>(tokens * rank);
  for (int pass = 0; pass < 2; ++pass) work.take<float>(tokens * ranks);
  if (bf16 && !c.kernel.rounds) work.take<float>(tokens * inner);
  Weight w = {};
  w.rows = rows, w.columns = columns;
  adapter_of(w, nullptr, nullptr, nullptr, 0, rank, 1.0f, bf16, nullptr, nullptr, nullptr, work);
  return work.bytes();
}

// y [tokens, rows] = x [tokens, columns] W'^T + u up^T, u [tokens, rank] = x_narrow down^T, down = A, up = diag(scaling
// gain) B, W' = diag(gain) W; A [rank, columns], B [rows, rank]; with rank 0 y = x W'^T. `factors` [3, rows]: the gain
// m / n and the m that is safe to divide by, made where there is an m, and n, given or `makes_n`; or without m a gain
// or null. x, x_narrow, down, up and y are float32 or `bf16`, all else is float32.
void qlora_layer_forward(const Weight* weight, float* factors, int by_integers, int bf16, const void* x, int64_t tokens,
                         const void* x_narrow, const float* A, const float* B, const float* m, int makes_n,
                         int64_t rank, float scaling, char* memory, void* down, void* up, float* u, void* y,
                         int threads) {
  Weight w = *weight;
  Work work{memory};
  const Call c = call_of(by_integers, bf16, tokens, maximum(w.rows, w.columns), rank, threads, work);
  const Integers integers = integers_of(c, w.columns, work);
  const Result out = result_of(c, y, bf16, w.rows, work);
  const Values input{x, bf16 != 0};
  const Adapter adapter = adapter_of(w, A, B, m, makes_n, rank, scaling, bf16, factors, down, up, work);
  const int64_t count = rank * w.columns;
  if (count > 0) kernels->scaled(bf16 ? kBFloat16 : kFloat32, A, 1, count, 1.0f, nullptr, down);
  for (int64_t i = 0; bf16 && i < count; ++i) adapter.down[i] = to_float(static_cast<const BF16*>(down)[i]);
  prepare(c, {rank > 0 ? x_narrow : nullptr, bf16 != 0}, input, w.columns, {adapter.down, rank, true}, u, integers,
          rank > 0, [&] { makes_n ? prepare_norms(adapter) : make_factors(adapter, 0, w.rows); });
  w.gain = factors;
  multiply(c, {w, true, input, tokens, w.columns, w.rows, rank, u, adapter.up, out.y, out.rounded, integers},
           makes_n ? &adapter : nullptr, 0, no_strip);
}

// Of that forward pass: v = dy up, dB = diag(scaling gain) dy^T u, given y dm = sum_t dy y / safe, dA = v^T x, and dx =
// dy W' + v down unless null. rank 0: dx = dy W'. dy, x, y and dx are float32 or `bf16`.
void qlora_layer_backward(const Weight* weight, const float* gain, int by_integers, int bf16, const void* dy,
                          const void* x, const float* down, const float* up, const float* u, const void* y,
                          int64_t tokens, int64_t rank, float scaling, const float* safe, char* memory, void* dx,
                          float* dA, float* dB, float* dm, int threads) {
  Weight w = *weight;
  w.gain = gain;
  Work work{memory};
  const Call c = call_of(by_integers, bf16, tokens, maximum(w.rows, w.columns), rank, threads, work);
  const Integers integers = integers_of(c, w.rows, work);
  float* const v = work.take<float>(tokens * rank);
  const auto values = [&](const void* at) { return Values{at, bf16 != 0}; };
  prepare(c, values(rank > 0 ? dy : nullptr), values(dx != nullptr ? dy : nullptr), w.rows, {up, rank, false}, v,
          integers, false, [] {});
  const LayerSums of_B = sums_of(c, values(dy), values(y), u, w.rows, work),
                  of_A = sums_of(c, values(x), values(nullptr), v, w.columns, work);
  const auto put_B = [&](int64_t row, int64_t rows, const float* sums, const float* dots) {
    for (int64_t j = row; j < row + rows; ++j) {
      const float factor = gain == nullptr ? scaling : scaling * gain[j];
      for (int64_t k = 0; k < rank; ++k) dB[j * rank + k] = factor * sums[k * kStripColumns + j - row];
      if (y != nullptr) dm[j] = dots[j - row] / safe[j];
    }
  };
  const auto put_A = [&](int64_t column, int64_t columns, const float* sums, const float*) {
    for (int64_t k = 0; k < rank; ++k)
      for (int64_t i = 0; i < columns; ++i) dA[k * w.columns + column + i] = sums[k * kStripColumns + i];
  };
  // In one region with the product: threads wait for each other once.
  const int64_t strips_B = rank > 0 ? strips_of(of_B) : 0, strips = rank > 0 ? strips_B + strips_of(of_A) : 0;
  const auto sum = [&](int64_t i, int thread) {
    i < strips_B ? sum_strip(c, of_B, i, thread, put_B) : sum_strip(c, of_A, i - strips_B, thread, put_A);
  };
  if (dx == nullptr) return parallel_threads(strips, threads, sum);
  const Result out = result_of(c, dx, bf16, w.columns, work);
  multiply(c, {w, false, values(dy), tokens, w.rows, w.columns, rank, v, down, out.y, out.rounded, integers}, nullptr,
           strips, sum);
}

// Bytes of `work`, aligned to 64, for the product below.
int64_t qlora_dense_bytes(int by_integers, int threads) {
  return threads * (by_integers ? integer_layer : layer)->dense_room();
}

// y = x W^T [tokens, rows], or x W [tokens, columns], of a dense W [rows, columns].
void qlora_dense(int by_integers, const void* weight, int bf16, int64_t rows, int64_t columns, int transposed,
                 const float* x, int64_t tokens, char* work, float* y, int threads) {
  const int64_t inner = transposed ? columns : rows, outer = transposed ? rows : columns;
  const DenseProduct product{{weight, bf16 != 0}, transposed != 0, x, tokens, inner, outer, y};
  const Layer& l = *(by_integers ? integer_layer : layer);
  share(l, tokens, outer, threads, kDensePanels, 0, no_strip,
        [&](int64_t token, int64_t count, int64_t panel, int64_t panels, int thread) {
          l.dense(product, token, count, panel, panels, work + thread * l.dense_room());
        });
}

}  // extern "C"
