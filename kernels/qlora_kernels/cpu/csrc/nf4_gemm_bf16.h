// The products of nf4_gemm.h of values and weights in bf16, with sums in float32, where a processor adds two products
// of bf16 in the time of one FMA of float32: VDPBF16PS of Zen 4. Intel's takes four times as long (dispatch.cpp).
//
//   y_tc = sum_i (x_t,2i w'_2i,c + x_t,2i+1 w'_2i+1,c) + the same of left and factor
//
// W' is decoded into bf16 as `dequantize_4bit` does it, u and v are rounded to bf16 before they are multiplied, and y
// once, at the end. Subnormal numbers count as zeros: the instructions do so. A panel is [pairs, kWidth, 2], the
// factor's pairs below those of W'. A tile of x is [lines, kTileRows, kLine, 2], so that it is read from front to back.
// The alternative, a dense weight for oneDNN, writes and reads the weight once more and makes y in two products.
//
// The including file defines, for its instruction set:
//
//   load_words(words)            32 words
//   dot_bf16(sum, a, b)          sum += the products of pairs of bf16
//   round_words(F16 a, F16 b)    32 words: a, then b, rounded
//   pair_words(words)            pairs of words (i, 16 + i)
//   pair_rows(a, b, lower, upper)
//                                pairs of words of a and b, 32 columns in an order of its own; in_columns restores it
#pragma once

namespace qlora {
namespace {

constexpr int64_t kLine = 16;  // pairs of a row that lie together: a line of the cache

inline int64_t lines_of(int64_t inner) { return pieces_of(inner, 2 * kLine); }

// out [kTileRows, kVectors] = a tile times a panel `pairs` deep; rounded, of 2 vectors.
template <int kVectors, class T>
__attribute__((noinline)) void multiply_bf16(const int32_t* a, const int32_t* b, int64_t pairs, T* out,
                                             int64_t stride) {
  F16 sum[kTileRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = F16::zero();
  for (; pairs > 0; pairs -= kLine, a += kTileRows * kLine)
    for (int64_t k = 0, n = least(kLine, pairs); k < n; ++k, b += 16 * kVectors) {
      I16 column[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        column[v] = I16::load(b + 16 * v);
        __builtin_prefetch(b + 256 + 16 * v);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const I16 x = I16::broadcast(a[kLine * r + k]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) dot_bf16(sum[r][v], x, column[v]);
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    if constexpr (sizeof(T) == 2)
      store_words(out + r * stride, round_words(sum[r][0], sum[r][kVectors - 1]));
    else
      sum[r][0].store(out + r * stride);
  }
}

// A tile of `rows` rows of x, `depth` values each; zeros where there are none. Depth in 32s.
inline void tile_of(const BF16* x, int64_t stride, int64_t rows, int64_t depth, int32_t* out) {
  for (int64_t i = 0; i < depth; i += 2 * kLine)
    for (int64_t r = 0; r < kTileRows; ++r, out += kLine)
      (r < rows ? load_words(x + r * stride + i) : I16::zero()).store(out);
}

// The same of float32, rounded; any depth.
inline void tile_of(const float* x, int64_t stride, int64_t rows, int64_t depth, int32_t* out) {
  for (int64_t i = 0; i < depth; i += 2 * kLine)
    for (int64_t r = 0; r < kTileRows; ++r, out += kLine) {
      const float* const from = x + r * stride + i;
      (r < rows ? round_words(some_of(from, depth - i), some_of(from + 16, depth - i - 16)) : I16::zero()).store(out);
    }
}

inline Table<BF16> bf16_table(const Weight& w, int64_t row, int64_t at) {
  return Table<BF16>(w.levels, block_scale(w, at >> w.block_shift), w.gain == nullptr ? 1.0f : w.gain[row]);
}

// A panel of W'^T.
inline void bf16_rows(const Weight& w, int64_t panel, int32_t* out) {
  alignas(64) float pairs[16][kPairs];
  for (int64_t n = 0; n < w.columns / 64; ++n)
    for (int64_t v = 0; v < kTileVectors; ++v) {
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = kWidth * panel + 16 * v + r, at = row * w.columns + 64 * n;
        __builtin_prefetch(w.packed + at / 2 + 64);
        expand<kPlain>(bf16_table(w, row, at), w.packed + at / 2, 32, reinterpret_cast<BF16*>(pairs[r]));
      }
      for (int64_t q = 0; q < kPairs; q += 16)
        transpose16(pairs[0] + q, kPairs, reinterpret_cast<float*>(out + kWidth * (kPairs * n + q) + 16 * v), kWidth);
    }
}

// A panel of W'.
inline void bf16_columns(const Weight& w, int64_t panel, int32_t* out) {
  for (int64_t row = 0; row < w.rows; row += 2, out += kWidth) {
    const int64_t at = row * w.columns + kWidth * panel, next = at + w.columns;
    __builtin_prefetch(w.packed + at / 2 + 8 * w.columns);
    __builtin_prefetch(w.packed + next / 2 + 8 * w.columns);
    expand_pairs(bf16_table(w, row, at), w.packed + at / 2, bf16_table(w, row + 1, next), w.packed + next / 2, out);
  }
}

// An adapter's wide factor in that panel: pairs of ranks, the last one with zeros where their number is odd.
inline void bf16_factor(const LayerProduct& p, int64_t panel, int32_t* out) {
  for (int64_t k = 0; k < p.rank; k += 2, out += kWidth) {
    alignas(64) float two[2][kWidth] = {};
    factor_of(p, panel, k, least(2, p.rank - k), two[0]);
    for (int64_t c = 0; c < kWidth; c += 16)
      pair_words(round_words(F16::load(two[0] + c), F16::load(two[1] + c))).store(out + c);
  }
}

int64_t bf16_pairs(int64_t inner, int64_t rank) { return inner / 2 + pieces_of(rank, 2); }

int64_t bf16_room(int64_t inner, int64_t rank) {
  const int64_t tile = kTileRows * kLine * (lines_of(inner) + lines_of(rank)), edge = kTileRows * kWidth,
                panel = kWidth * bf16_pairs(inner, rank);
  const int64_t strip = (16 + 8) * inner + 16 * kTileRows;  // of a narrow factor, twice, and its sums
  return 4 * (tile + edge + most(most(panel, kPanelBytes / 4), strip));
}

void bf16_wide(const LayerProduct& p, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work) {
  int32_t *const tile = reinterpret_cast<int32_t*>(work), *const left = tile + kTileRows * kLine * lines_of(p.inner),
                 *const decoded = left + kTileRows * (kLine * lines_of(p.rank) + kWidth);
  BF16* const edge = reinterpret_cast<BF16*>(decoded - kTileRows * kWidth);
  const BF16* const x = static_cast<const BF16*>(p.x.at);
  const int64_t pairs = bf16_pairs(p.inner, p.rank), size = kWidth * pairs, group = most(1, kPanelBytes / 4 / size);
  for (int64_t done = 0; done < panels; done += group) {
    const int64_t count = least(group, panels - done);
    for (int64_t c = 0; c < count; ++c) {
      (p.transposed ? bf16_rows : bf16_columns)(p.weight, panel + done + c, decoded + c * size);
      bf16_factor(p, panel + done + c, decoded + c * size + kWidth * (p.inner / 2));
    }
    for (int64_t t = token; t < token + tokens; t += kTileRows) {
      const int64_t n = least(kTileRows, token + tokens - t);
      tile_of(x + t * p.inner, p.inner, n, p.inner, tile);
      tile_of(p.left + t * p.rank, p.rank, n, p.rank, left);
      for (int64_t c = 0; c < count; ++c) {
        BF16* const y = p.rounded + t * p.outer + (panel + done + c) * kWidth;
        multiply_bf16<kTileVectors>(tile, decoded + c * size, pairs, n == kTileRows ? y : edge,
                                    n == kTileRows ? p.outer : kWidth);
        for (int64_t r = 0; n < kTileRows && r < n; ++r)
          for (int64_t k = 0; k < kWidth; ++k) y[r * p.outer + k] = edge[r * kWidth + k];
      }
    }
  }
}

void bf16_narrow(Values values, int64_t inner, NarrowFactor factor, int64_t token, int64_t tokens, char* work,
                 float* u) {
  int32_t *const tile = reinterpret_cast<int32_t*>(work), *const pairs = tile + kTileRows * kLine * lines_of(inner);
  float *const sums = reinterpret_cast<float*>(pairs + 8 * inner), *const strip = sums + 16 * kTileRows;
  const BF16* const x = static_cast<const BF16*>(values.at);
  const int64_t rank = factor.rank;
  for (int64_t first = 0; first < rank; first += 16) {
    strip_of(factor, inner, first, strip);
    for (int64_t k = 0; k < inner; k += 2)
      pair_words(round_words(F16::load(strip + 16 * k), F16::load(strip + 16 * k + 16))).store(pairs + 8 * k);
    for (int64_t t = token; t < token + tokens; t += kTileRows) {
      const int64_t n = least(kTileRows, token + tokens - t);
      tile_of(x + t * inner, inner, n, inner, tile);
      multiply_bf16<1>(tile, pairs, inner / 2, sums, 16);
      for (int64_t r = 0; r < n; ++r)
        for (int64_t k = first; k < least(rank, first + 16); ++k) u[(t + r) * rank + k] = sums[16 * r + k - first];
    }
  }
}

// out [kSumRanks, kWidth], rows kStripColumns apart, += left^T x, left [tokens / 2, 16] in pairs of tokens; dots += the
// sums of x y.
template <bool kDots>
__attribute__((noinline)) void sum_bf16(const int32_t* left, const BF16* x, const BF16* y, int64_t columns,
                                        int64_t tokens, float* out, float* dots) {
  constexpr int64_t kAheadRows = 16;  // as in sum_tokens
  F16 sum[kSumRanks][2], dot[2] = {F16::zero(), F16::zero()};
#pragma GCC unroll 16
  for (int r = 0; r < kSumRanks; ++r) sum[r][0] = sum[r][1] = F16::zero();
  for (int64_t t = 0; t < tokens; t += 2, left += 16, x += 2 * columns) {
    const bool two = t + 1 < tokens;
    I16 row[2], other[2];
    pair_rows(load_words(x), two ? load_words(x + columns) : I16::zero(), row[0], row[1]);
    __builtin_prefetch(x + kAheadRows * columns);
    __builtin_prefetch(x + (kAheadRows + 1) * columns);
    if (kDots) {
      pair_rows(load_words(y), two ? load_words(y + columns) : I16::zero(), other[0], other[1]);
      __builtin_prefetch(y + kAheadRows * columns);
      __builtin_prefetch(y + (kAheadRows + 1) * columns);
      dot_bf16(dot[0], row[0], other[0]);
      dot_bf16(dot[1], row[1], other[1]);
      y += 2 * columns;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kSumRanks; ++r) {
      const I16 factor = I16::broadcast(left[r]);
      dot_bf16(sum[r][0], factor, row[0]);
      dot_bf16(sum[r][1], factor, row[1]);
    }
  }
  const auto add_to = [](float* to, F16 lower, F16 upper) {
    const F32 ordered = in_columns(lower, upper);
    add(F16::load(to), ordered.a).store(to);
    add(F16::load(to + 16), ordered.b).store(to + 16);
  };
#pragma GCC unroll 16
  for (int r = 0; r < kSumRanks; ++r) add_to(out + r * kStripColumns, sum[r][0], sum[r][1]);
  if (kDots) add_to(dots, dot[0], dot[1]);
}

void bf16_sums(const LayerSums& s, int64_t column, int64_t columns, float* out, float* dots) {
  constexpr int64_t kTokens = 64;  // as in sums_of
  const BF16 *const x = static_cast<const BF16*>(s.x.at), *const y = static_cast<const BF16*>(s.y.at);
  for (int64_t i = 0; i < s.ranks * kStripColumns; ++i) out[i] = 0.0f;
  for (int64_t c = 0; c < columns; ++c) dots[c] = 0.0f;
  for (int64_t t = 0; t < s.tokens; t += kTokens) {
    const int64_t n = least(kTokens, s.tokens - t), at = t * s.columns + column;
    for (int64_t r = 0; r < s.ranks; r += 16) {
      alignas(64) int32_t left[kTokens / 2][16];
      for (int64_t k = 0; k < n; k += 2) {
        const float* const from = s.left + (t + k) * s.ranks + r;
        const F16 second = k + 1 < n ? some_of(from + s.ranks, s.ranks - r) : F16::zero();
        pair_words(round_words(some_of(from, s.ranks - r), second)).store(left[k / 2]);
      }
      for (int64_t c = 0; c < columns; c += kWidth)
        for (int64_t q = 0; q < least(16, s.ranks - r); q += kSumRanks) {
          float* const to = out + (r + q) * kStripColumns + c;
          if (r + q == 0 && y != nullptr)
            sum_bf16<true>(left[0], x + at + c, y + at + c, s.columns, n, to, dots + c);
          else
            sum_bf16<false>(left[0] + q, x + at + c, nullptr, s.columns, n, to, nullptr);
        }
    }
  }
}

}  // namespace
}  // namespace qlora
