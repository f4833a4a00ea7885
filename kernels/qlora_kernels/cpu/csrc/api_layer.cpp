// An adapted layer, forward and backward, on every instruction set that has a `Layer`.

#include "dispatch.h"
#include "types.h"

using namespace qlora;

namespace {

inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// The memory that a call works in, handed out from the front in lines.
struct Work {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(next);
    next += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return taken;
  }
};

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

int64_t own_bytes(const Layer& l, int64_t inner, int64_t rank) {
  const int64_t sums = int64_t(sizeof(float)) * (in_eights(rank) + 1) * kStripColumns;
  return ceil_div(maximum(l.room(inner, rank), sums), 64) * 64;
}

Call call_of(int by_integers, int bf16, int64_t tokens, int64_t inner, int64_t rank, int threads, Work& work) {
  const Layer& l = bf16 && bf16_layer != nullptr ? *bf16_layer : by_integers ? *integer_layer : *layer;
  const int64_t own = own_bytes(l, inner, rank);
  return {l, tokens, rank, threads, own, work.take<char>(threads * own)};
}

// u [tokens, rank] = x factor, and x in integers; either x may be null.
void prepare(const Call& c, Values narrow, Values x, int64_t inner, NarrowFactor factor, float* u, Integers to) {
  constexpr int64_t kPieces = 4;  // of each thread
  const int64_t blocks = ceil_div(c.tokens, c.kernel.tile), threads = threads_for(blocks, c.threads),
                pieces = threads == 1 ? 1 : minimum(blocks, kPieces * threads);
  parallel_threads(pieces, c.threads, [&](int64_t i, int thread) {
    const int64_t token = blocks * i / pieces * c.kernel.tile,
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

// strip(i, thread) for `strips` strips, and a product, piece(token, tokens, panel, panels, thread), in pieces of panels
// and, where there are few, of parts of the tokens.
template <class G, class F>
void share(const Layer& l, int64_t tokens, int64_t outer, int wanted, int64_t least, int64_t strips, G strip, F piece) {
  constexpr int64_t kUnits = 8;  // of each thread
  const int64_t panels = ceil_div(outer, l.width), blocks = ceil_div(tokens, l.tile);
  const int threads = threads_for(panels * blocks, wanted);
  const int64_t parts = threads == 1 ? 1 : minimum(blocks, ceil_div(kUnits * threads, panels)), all = parts * panels;
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

// The product, rounded where y is in bf16, and strips.
template <class G>
void multiply(const Call& c, const LayerProduct& p, int64_t strips, G strip) {
  share(c.kernel, c.tokens, p.outer, c.threads, kLayerPanels, strips, strip,
        [&](int64_t token, int64_t tokens, int64_t panel, int64_t panels, int thread) {
          c.kernel.wide(p, token, tokens, panel, panels, c.room_of(thread));
          const int64_t start = panel * c.kernel.width, stop = minimum(p.outer, (panel + panels) * c.kernel.width);
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
  return work.next - static_cast<char*>(nullptr);
}

// y [tokens, rows] = x [tokens, columns] W'^T + u up^T, u [tokens, rank] = x_narrow down^T, W' = diag(gain) W; down
// [rank, columns], up [rows, rank]; rank 0: y = x W'^T. x, x_narrow and y are float32 or `bf16`, all else is float32.
void qlora_layer_forward(const Weight* weight, const float* gain, int by_integers, int bf16, const void* x,
                         int64_t tokens, const void* x_narrow, const float* down, const float* up, int64_t rank,
                         char* memory, float* u, void* y, int threads) {
  Weight w = *weight;
  w.gain = gain;
  Work work{memory};
  const Call c = call_of(by_integers, bf16, tokens, maximum(w.rows, w.columns), rank, threads, work);
  const Integers integers = integers_of(c, w.columns, work);
  const Result out = result_of(c, y, bf16, w.rows, work);
  const Values input{x, bf16 != 0};
  prepare(c, {rank > 0 ? x_narrow : nullptr, bf16 != 0}, input, w.columns, {down, rank, true}, u, integers);
  multiply(c, {w, true, input, tokens, w.columns, w.rows, rank, u, up, out.y, out.rounded, integers}, 0, no_strip);
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
          integers);
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
  multiply(c, {w, false, values(dy), tokens, w.rows, w.columns, rank, v, down, out.y, out.rounded, integers}, strips,
           sum);
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
