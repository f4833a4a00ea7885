// The products of an adapted layer in float32, of values in float32 or bf16, over the primitives that the including
// file defines for its instruction set (nf4_kernels.h has the rest of them):
//
//   forward   y  = x W'^T + u up^T      u = x down^T               W' = diag(gain) W
//   backward  dx = dy W'  + v down      v = dy up     dB = dy^T u     dA = v^T x     dm = sum_t dy y
//
//   kPanelBytes                   of decoded panels that a thread keeps in the second cache
//   kTileRows, kTileVectors       a sum is kTileRows tokens x kTileVectors F16: what the registers hold
//   transpose16(in, stride, out, stride)
//                                 16 x 16 floats
//
// A thread decodes a few panels of columns of y, at most kDepthMost deep, into the second cache, and multiplies all
// tokens with them; tokens lie in the first cache, copied to rows kStride apart, whose lines never meet in one set,
// whatever the width of x. An adapter's factor lies below the panel and its product is in the same sums. The sums of a
// value of y depend on its place alone, not on who makes them. The alternative, a dense weight for the library's
// product and the adapter's after it, writes and reads the weight and y once more.
#pragma once
#include "layer.h"

namespace qlora {
namespace {

constexpr int64_t kWidth = 16 * kTileVectors, kStride = 832, kDepthMost = 768, kRanksBelow = kStride - kDepthMost;
constexpr int kSumRanks = kTileRows > 8 ? 8 : 4;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t pieces_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f of the values in their own type.
template <class F>
inline void as_they_lie(Values x, F f) {
  if (x.bf16)
    f(static_cast<const BF16*>(x.at));
  else
    f(static_cast<const float*>(x.at));
}

// out [kTileRows, kVectors] = before, or 0, + a [kTileRows, depth] b [depth, kVectors], whose rows lie kBetween apart.
// Not inlined: a compiler that sees more at once spills the sums.
template <int kVectors, int64_t kBetween = 16 * kVectors>
__attribute__((noinline)) void multiply(const float* a, const float* b, int64_t depth, const float* before,
                                        int64_t before_stride, float* out, int64_t stride) {
  F16 sum[kTileRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = before == nullptr ? F16::zero() : F16::load(before + r * before_stride + 16 * v);
#if defined(__aarch64__)
  add_product(a, kStride, b, depth, sum);  // by element
#else
  for (int64_t k = 0; k < depth; ++k, b += kBetween) {
    F16 column[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      column[v] = F16::load(b + 16 * v);
      __builtin_prefetch(b + 256 + 16 * v);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const F16 x = F16::broadcast(a[r * kStride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = madd(x, column[v], sum[r][v]);
    }
  }
#endif
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(out + r * stride + 16 * v);
}

// `depth` values of kTileRows rows of x from `token` on to rows kStride apart; zeros behind the last.
template <class T>
inline void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t depth, float* out) {
  for (int64_t r = 0; r < kTileRows; ++r, out += kStride) {
    int64_t k = 0;
    if (r < rows)
      for (; k + 16 <= depth; k += 16) load16(x + r * stride + k).store(out + k);
    for (; k < depth; ++k) out[k] = r < rows ? to_float(x[r * stride + k]) : 0.0f;
  }
}

// ---------------------------------------------------------------- decoding

inline Table<float> table_at(const Weight& w, int64_t row, int64_t at) {
  return Table<float>(w.levels, block_scale(w, at >> w.block_shift) * (w.gain == nullptr ? 1.0f : w.gain[row]), 1.0f);
}

// A panel of W'^T: kWidth rows of W, `depth` columns from `start` on; out [depth, kWidth].
inline void decode_rows(const Weight& w, int64_t panel, int64_t start, int64_t depth, float* out) {
  alignas(64) float values[16][64];
  for (int64_t v = 0; v < kTileVectors; ++v)
    for (int64_t d = 0; d < depth; d += 64) {
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = panel * kWidth + 16 * v + r, at = row * w.columns + start + d;
        __builtin_prefetch(w.packed + at / 2 + 64);
        expand<kPlain>(table_at(w, row, at), w.packed + at / 2, 32, values[r]);
      }
      for (int64_t q = 0; q < 64; q += 16) transpose16(values[0] + q, 64, out + (d + q) * kWidth + 16 * v, kWidth);
    }
}

// A panel of W': `depth` rows from `start` on; out [depth, kWidth].
inline void decode_columns(const Weight& w, int64_t panel, int64_t start, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t row = start + k, at = row * w.columns + panel * kWidth;
    __builtin_prefetch(w.packed + at / 2 + 8 * w.columns);
    expand<kPlain>(table_at(w, row, at), w.packed + at / 2, kWidth / 2, out + k * kWidth);
  }
}

// Ranks `first`.. of an adapter's wide factor in that panel; out [ranks, kWidth].
inline void factor_of(const LayerProduct& p, int64_t panel, int64_t first, int64_t ranks, float* out) {
  for (int64_t k = 0; k < ranks; ++k)
    for (int64_t c = 0; c < kWidth; ++c)
      out[k * kWidth + c] = p.transposed ? p.factor[(panel * kWidth + c) * p.rank + first + k]
                                         : p.factor[(first + k) * p.outer + panel * kWidth + c];
}

// ---------------------------------------------------------------- products

// What is multiplied at a time: a part of W', and ranks of the factor below it.
struct Depth {
  int64_t start, size, rank, ranks;
};

inline int64_t parts_of(int64_t inner) { return pieces_of(inner, kDepthMost); }

inline int64_t depths_of(int64_t inner, int64_t rank) {
  return parts_of(inner) + (rank > kRanksBelow ? pieces_of(rank, kDepthMost) : 0);
}

inline Depth depth_of(int64_t inner, int64_t rank, int64_t i) {
  const int64_t parts = parts_of(inner), unit = inner % 64 == 0 ? 64 : 32, units = inner / unit;
  if (i >= parts) return {inner, 0, (i - parts) * kDepthMost, least(kDepthMost, rank - (i - parts) * kDepthMost)};
  const int64_t start = units * i / parts * unit, stop = units * (i + 1) / parts * unit;
  return {start, stop - start, 0, i + 1 == parts && rank <= kRanksBelow ? rank : 0};
}

int64_t room(int64_t inner, int64_t) {
  const int64_t copies = kTileRows * kStride, edges = 2 * kTileRows * kWidth, panel = kStride * kWidth,
                strip = 16 * (inner + kTileRows);  // of a narrow factor, and its sums
  return int64_t(sizeof(float)) * most(copies + edges + most(panel, kPanelBytes / 4) + panel, strip);
}

template <class T>
void wide_of(const LayerProduct& p, const T* x, int64_t token, int64_t tokens, int64_t panel, int64_t panels,
             char* work) {
  float *const rows = reinterpret_cast<float*>(work), *const edge = rows + kTileRows * kStride,
               *const decoded = edge + kTileRows * kWidth;
  const int64_t depths = depths_of(p.inner, p.rank);
  int64_t deepest = 0;
  for (int64_t i = 0; i < depths; ++i) {
    const Depth d = depth_of(p.inner, p.rank, i);
    deepest = most(deepest, d.size + d.ranks);
  }
  const int64_t size = deepest * kWidth, group = most(1, kPanelBytes / 4 / size);
  for (int64_t done = 0; done < panels; done += group) {
    const int64_t count = least(group, panels - done);
    for (int64_t i = 0; i < depths; ++i) {
      const Depth d = depth_of(p.inner, p.rank, i);
      for (int64_t c = 0; c < count; ++c) {
        float* const to = decoded + c * size;
        if (d.size > 0) (p.transposed ? decode_rows : decode_columns)(p.weight, panel + done + c, d.start, d.size, to);
        factor_of(p, panel + done + c, d.rank, d.ranks, to + d.size * kWidth);
      }
      for (int64_t t = token; t < token + tokens; t += kTileRows) {
        const int64_t n = least(kTileRows, token + tokens - t);
        copy_rows(x + t * p.inner + d.start, p.inner, n, d.size, rows);
        copy_rows(p.left + t * p.rank + d.rank, p.rank, n, d.ranks, rows + d.size);
        for (int64_t c = 0; c < count; ++c) {
          float* const y = p.y + t * p.outer + (panel + done + c) * kWidth;
          if (n == kTileRows) {
            multiply<kTileVectors>(rows, decoded + c * size, d.size + d.ranks, i == 0 ? nullptr : y, p.outer, y,
                                   p.outer);
            continue;
          }
          for (int64_t r = 0; i > 0 && r < n; ++r)
            for (int64_t k = 0; k < kWidth; ++k) edge[r * kWidth + k] = y[r * p.outer + k];
          multiply<kTileVectors>(rows, decoded + c * size, d.size + d.ranks, i == 0 ? nullptr : edge, kWidth, edge,
                                 kWidth);
          for (int64_t r = 0; r < n; ++r)
            for (int64_t k = 0; k < kWidth; ++k) y[r * p.outer + k] = edge[r * kWidth + k];
        }
      }
    }
  }
}

void wide(const LayerProduct& p, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work) {
  as_they_lie(p.x, [&](const auto* x) { wide_of(p, x, token, tokens, panel, panels, work); });
}

// 16 ranks of a narrow factor from `first` on, zeros behind the last; out [inner, 16].
inline void strip_of(const NarrowFactor& f, int64_t inner, int64_t first, float* out) {
  const int64_t ranks = least(16, f.rank - first);
  alignas(64) float rows[16][16] = {};
  for (int64_t i = 0; f.transposed && i < inner; i += 16) {
    for (int64_t k = 0; k < ranks; ++k) F16::load(f.at + (first + k) * inner + i).store(rows[k]);
    transpose16(rows[0], 16, out + 16 * i, 16);
  }
  for (int64_t i = 0; !f.transposed && i < inner; ++i) {
    const float* const from = f.at + i * f.rank + first;
    (ranks == 16 ? F16::load(from) : load_some(from, ranks)).store(out + 16 * i);
  }
}

// sums [kTileRows, 16] = `rows` rows of x times strip [inner, 16]. Rows are laid side by side as they are multiplied,
// 16 columns at a time, and the next tile's are fetched: what memory takes lies behind the products.
template <class T>
__attribute__((noinline)) void multiply_strip(const T* x, int64_t inner, int64_t rows, const float* strip,
                                              float* sums) {
  alignas(64) float values[kTileRows][16];
  F16 sum[kTileRows][1];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sum[r][0] = F16::zero();
  for (int64_t k = 0; k < inner; k += 16, strip += 256) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const T* const from = x + (r < rows ? r : 0) * inner + k;  // rows past the last are nobody's
      load16(from).store(values[r]);
      __builtin_prefetch(from + kTileRows * inner);
    }
#if defined(__aarch64__)
    // 16 always; a compiler that knows it warns of the loop for what is left, which then never runs.
    add_product(values[0], 16, strip, least(16, inner - k), sum);
#else
    for (int i = 0; i < 16; ++i) {
      const F16 column = F16::load(strip + 16 * i);
      __builtin_prefetch(strip + 16 * i + 256);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) sum[r][0] = madd(F16::broadcast(values[r][i]), column, sum[r][0]);
    }
#endif
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sum[r][0].store(sums + 16 * r);
}

template <class T>
void narrow_of(const T* x, int64_t inner, const NarrowFactor& factor, int64_t token, int64_t tokens, char* work,
               float* u) {
  float *const sums = reinterpret_cast<float*>(work), *const strip = sums + 16 * kTileRows;
  const int64_t rank = factor.rank;
  for (int64_t first = 0; first < rank; first += 16) {
    strip_of(factor, inner, first, strip);
    for (int64_t t = token; t < token + tokens; t += kTileRows) {
      const int64_t n = least(kTileRows, token + tokens - t);
      multiply_strip(x + t * inner, inner, n, strip, sums);
      for (int64_t r = 0; r < n; ++r)
        for (int64_t k = first; k < least(rank, first + 16); ++k) u[(t + r) * rank + k] = sums[16 * r + k - first];
    }
  }
}

void narrow(Values values, int64_t inner, NarrowFactor factor, int64_t token, int64_t tokens, char* work, float* u) {
  as_they_lie(values, [&](const auto* x) { narrow_of(x, inner, factor, token, tokens, work, u); });
}

// ---------------------------------------------------------------- sums over tokens

// out [kSumRanks, kTileVectors], rows kStripColumns apart, += left^T x; dots += the sums of x y.
template <bool kDots, class T>
__attribute__((noinline)) void sum_tokens(const LayerSums& s, const float* left, const T* x, const T* y, int64_t tokens,
                                          float* out, float* dots) {
  constexpr int64_t kAheadRows = 48;  // whose lines are fetched: no prefetcher sees them coming
  const int64_t ranks = s.ranks, columns = s.columns;
  F16 sum[kSumRanks][kTileVectors], dot[kTileVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kSumRanks; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = F16::load(out + r * kStripColumns + 16 * v);
#pragma GCC unroll 2
  for (int v = 0; kDots && v < kTileVectors; ++v) dot[v] = F16::load(dots + 16 * v);
  for (int64_t t = 0; t < tokens; ++t, x += columns, left += ranks) {
    F16 row[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      row[v] = load16(x + 16 * v);
      __builtin_prefetch(x + kAheadRows * columns + 16 * v);
      if (!kDots) continue;
      dot[v] = madd(row[v], load16(y + 16 * v), dot[v]);
      __builtin_prefetch(y + kAheadRows * columns + 16 * v);
    }
    if (kDots) y += columns;
#pragma GCC unroll 16
    for (int r = 0; r < kSumRanks; ++r) {
      const F16 factor = F16::broadcast(left[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = madd(factor, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kSumRanks; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sum[r][v].store(out + r * kStripColumns + 16 * v);
#pragma GCC unroll 2
  for (int v = 0; kDots && v < kTileVectors; ++v) dot[v].store(dots + 16 * v);
}

template <class T>
void sums_of(const LayerSums& s, const T* x, const T* y, int64_t column, int64_t columns, float* out, float* dots) {
  constexpr int64_t kTokens = 64;  // of a strip of columns, which then lie in the first cache
  for (int64_t i = 0; i < s.ranks * kStripColumns; ++i) out[i] = 0.0f;
  for (int64_t c = 0; c < columns; ++c) dots[c] = 0.0f;
  for (int64_t t = 0; t < s.tokens; t += kTokens) {
    const int64_t n = least(kTokens, s.tokens - t), at = t * s.columns + column;
    for (int64_t c = 0; c < columns; c += kWidth)
      for (int64_t r = 0; r < s.ranks; r += kSumRanks) {
        const float* const left = s.left + t * s.ranks + r;
        float* const to = out + r * kStripColumns + c;
        if (r == 0 && y != nullptr)
          sum_tokens<true>(s, left, x + at + c, y + at + c, n, to, dots + c);
        else
          sum_tokens<false>(s, left, x + at + c, x, n, to, nullptr);
      }
  }
}

void sums(const LayerSums& s, int64_t column, int64_t columns, float* out, float* dots) {
  as_they_lie(s.x, [&](const auto* x) { sums_of(s, x, static_cast<decltype(x)>(s.y.at), column, columns, out, dots); });
}

}  // namespace
}  // namespace qlora
