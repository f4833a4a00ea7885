// The large product of nf4_gemm.h by 16-bit integers, where a processor multiplies and adds more of them than of
// float32: VPDPWSSD of AVX-512 VNNI has two products where an FMA has one; of AVX2, VPMADDWD and VPADDD are two
// instructions for what two FMAs do, but run on more units.
//
//   x_tk  = xs_tn X_tk      per token t and 64 k (n): |X| <= kMostX, xs the scale
//   w'_kc = ws_nc V_kc      |V| <= kMostW
//   y_tc  = sum_n xs_tn ws_nc (sum over the 64 k of n: X_tk V_kc) + sum_r left_tr factor_rc
//
// A sum of 64 is at most 64 kMostX kMostW < 2^31, so no integer overflows; the sums of 64 are added up in float32, and
// so is the adapter's product. Of W'^T (forward) a scale is a block's own, with the gain, and V are the 16 levels in 13
// bits; of W' (backward) 64 rows x kWidth columns have one scale, that of the largest among them. What is lost is 2^-13
// of the largest of 64: 2e-4 of y where bf16's path loses 2e-3 (docs/log.md). Two 8-bit products cost as much and lose
// 6e-3, since 8 bits do not hold the levels. What is not finite stays so: its scale is not.
//
// The including file defines, for its instruction set:
//
//   I16                        16 integers of 32 bits, or 32 words of 16; I16::zero, broadcast, load; to_float
//   dot(sum, a, b)             sum += the products of pairs of words
//   Largest                    the largest |x| of all F16 it sees; as integers a NaN is larger than any number
//   store_words(out, F16)      16 words, rounded
//   store_pairs(out, F16 a, F16 b)
//                              16 pairs of words (a, b), rounded
//   Words(levels, factor)      the levels times a factor, in words
//   expand_words(words, bytes, out)
//                              32 words of 16 bytes of codes
//   expand_pairs(words, bytes, more_words, more_bytes, out)
//                              kWidth pairs, of the codes of two rows
#pragma once

namespace qlora {
namespace {

constexpr int kMostW = 4095, kMostX = 8191, kPairs = 32;
static_assert(int64_t(64) * kMostW * kMostX < int64_t(1) << 31);

// out [kTileRows, kWidth] = before + diag(xs) (a [kTileRows, 64] b [kPairs, kWidth, 2]) diag(ws).
__attribute__((noinline)) void multiply_integers(const int32_t* a, const int32_t* b, const float* xs, const float* ws,
                                                 const float* before, float* out, int64_t stride) {
  I16 sum[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = I16::zero();
  for (int k = 0; k < kPairs; ++k, b += kWidth) {
    I16 column[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      column[v] = I16::load(b + 16 * v);
      __builtin_prefetch(b + 256 + 16 * v);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const I16 x = I16::broadcast(a[kPairs * r + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) dot(sum[r][v], x, column[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const F16 x = F16::broadcast(xs[r]);
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v)
      madd(mul(to_float(sum[r][v]), x), F16::load(ws + 16 * v), F16::load(before + r * kWidth + 16 * v))
          .store(out + r * stride + 16 * v);
  }
}

// The first n of 16 values, zeros behind them; n may be anything.
template <class T>
inline F16 some_of(const T* x, int64_t n) {
  return n >= 16 ? load16(x) : n <= 0 ? F16::zero() : load_some(x, n);
}

// What takes values up to `largest` to integers up to `most`.
inline float inverse_of(float largest, int most) { return float(most) / (largest > 1e-30f ? largest : 1e-30f); }

// 64 values in integers up to `most`; their scale.
inline float round_64(const F16* value, int most, int16_t* out) {
  Largest largest;
  for (int i = 0; i < 4; ++i) largest.see(value[i]);
  const F16 inverse = F16::broadcast(inverse_of(largest.value(), most));
  for (int i = 0; i < 4; ++i) store_words(out + 16 * i, mul(value[i], inverse));
  return largest.value() * (1.0f / most);
}

// `rows` rows of x, `depth` values each: [64 of depth][row of the tile][64], and a scale for each 64. Zeros where there
// are none.
template <class T>
inline void integer_tile(const T* x, int64_t stride, int64_t rows, int64_t depth, int16_t* values, float* scales) {
  for (int64_t n = 0; n < pieces_of(depth, 64); ++n)
    for (int64_t r = 0; r < kTileRows; ++r, values += 64, ++scales) {
      F16 value[4];
      for (int i = 0; i < 4; ++i)
        value[i] = r < rows ? some_of(x + r * stride + 64 * n + 16 * i, depth - 64 * n - 16 * i) : F16::zero();
      *scales = round_64(value, kMostX, values);
    }
}

void integers(Values values, int64_t inner, int64_t token, int64_t tokens, Integers out) {
  as_they_lie(values, [&](const auto* x) {
    for (int64_t t = token; t < token + tokens; t += kTileRows) {
      const int64_t at = t / kTileRows * pieces_of(inner, 64) * kTileRows;
      integer_tile(x + t * inner, inner, least(kTileRows, token + tokens - t), inner, out.values + 64 * at,
                   out.scales + at);
    }
  });
}

// out = before + the product of a tile with a panel, `parts` times 64 deep; `before` is overwritten.
inline void add_integers(const int16_t* values, const float* xs, const int32_t* panel, const float* ws, int64_t parts,
                         float* before, float* out, int64_t stride) {
  for (int64_t i = 0; i < parts; ++i) {
    const bool last = i + 1 == parts;
    multiply_integers(reinterpret_cast<const int32_t*>(values + 64 * kTileRows * i), panel + kWidth * kPairs * i,
                      xs + kTileRows * i, ws + kWidth * i, before, last ? out : before, last ? stride : kWidth);
  }
}

inline float scale_at(const Weight& w, int64_t row, int64_t at) {
  return block_scale(w, at >> w.block_shift) * (w.gain == nullptr ? 1.0f : w.gain[row]);
}

// A panel of W'^T and its scales [inner / 64, kWidth].
inline void integer_rows(const Weight& w, int64_t panel, int32_t* out, float* scales) {
  alignas(64) float pairs[16][kPairs];
  const Words words(w.levels, kMostW);
  for (int64_t n = 0; n < w.columns / 64; ++n)
    for (int64_t v = 0; v < kTileVectors; ++v) {
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = kWidth * panel + 16 * v + r, at = row * w.columns + 64 * n;
        __builtin_prefetch(w.packed + at / 2 + 64);
        scales[kWidth * n + 16 * v + r] = scale_at(w, row, at) * (1.0f / kMostW);
        for (int64_t i = 0; i < 2; ++i)
          expand_words(words, w.packed + at / 2 + 16 * i, reinterpret_cast<int16_t*>(&pairs[r][16 * i]));
      }
      for (int64_t q = 0; q < kPairs; q += 16)
        transpose16(pairs[0] + q, kPairs, reinterpret_cast<float*>(out + kWidth * (kPairs * n + q) + 16 * v), kWidth);
    }
}

// A panel of W' and its scales [rows / 64, kWidth].
inline void integer_columns(const Weight& w, int64_t panel, int32_t* out, float* scales) {
  for (int64_t n = 0; n < pieces_of(w.rows, 64); ++n) {
    const int64_t rows = least(64, w.rows - 64 * n);  // 64 or 32
    float scale[64], largest = 0.0f;
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t row = 64 * n + k, at = row * w.columns + kWidth * panel;
      scale[k] = scale_at(w, row, at);
      const float size = __builtin_fabsf(scale[k]);
      if (!(size <= largest)) largest = size;  // a NaN too
    }
    const float inverse = inverse_of(largest, kMostW);
    for (int64_t c = 0; c < kWidth; ++c) scales[kWidth * n + c] = largest * (1.0f / kMostW);
    for (int64_t k = 0; k < rows; k += 2, out += kWidth) {
      const uint8_t* bytes = w.packed + ((64 * n + k) * w.columns + kWidth * panel) / 2;
      __builtin_prefetch(bytes + 8 * w.columns);
      __builtin_prefetch(bytes + 8 * w.columns + w.columns / 2);
      expand_pairs(Words(w.levels, scale[k] * inverse), bytes, Words(w.levels, scale[k + 1] * inverse),
                   bytes + w.columns / 2, out);
    }
    for (int64_t k = rows; k < 64; k += 2)
      for (int64_t c = 0; c < kWidth; ++c) *out++ = 0;
  }
}

// 4-byte places of a panel: integers, scales and the factor.
inline int64_t integer_panel(int64_t inner, int64_t rank) {
  return kWidth * (pieces_of(inner, 64) * (kPairs + 1) + rank);
}

int64_t integer_room(int64_t inner, int64_t rank) {
  const int64_t panel = 4 * integer_panel(inner, rank), own = 4 * kTileRows * (kStride + 2 * kWidth);
  return most(own + most(panel, kPanelBytes), room(inner, rank));
}

void integer_wide(const LayerProduct& p, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work) {
  float *const rows = reinterpret_cast<float*>(work), *const edge = rows + kTileRows * kStride,
               *const sums = edge + kTileRows * kWidth, *const decoded = sums + kTileRows * kWidth;
  const int64_t parts = pieces_of(p.inner, 64), size = integer_panel(p.inner, p.rank),
                group = most(1, kPanelBytes / 4 / size);
  for (int64_t done = 0; done < panels; done += group) {
    const int64_t count = least(group, panels - done);
    for (int64_t c = 0; c < count; ++c) {
      float* const scales = decoded + c * size;
      int32_t* const to = reinterpret_cast<int32_t*>(scales + kWidth * (parts + p.rank));
      (p.transposed ? integer_rows : integer_columns)(p.weight, panel + done + c, to, scales);
      factor_of(p, panel + done + c, 0, p.rank, scales + kWidth * parts);
    }
    for (int64_t t = token; t < token + tokens; t += kTileRows) {
      const int64_t n = least(kTileRows, token + tokens - t), tile = t / kTileRows * parts * kTileRows;
      if (p.rank <= kStride) copy_rows(p.left + t * p.rank, p.rank, n, p.rank, rows);
      for (int64_t c = 0; c < count; ++c) {
        const float* const scales = decoded + c * size;
        const int32_t* const panel_of = reinterpret_cast<const int32_t*>(scales + kWidth * (parts + p.rank));
        if (p.rank <= kStride)
          multiply<kTileVectors>(rows, scales + kWidth * parts, p.rank, nullptr, 0, sums, kWidth);
        else
          for (int64_t k = 0; k < p.rank; k += kDepthMost) {
            copy_rows(p.left + t * p.rank + k, p.rank, n, least(kDepthMost, p.rank - k), rows);
            multiply<kTileVectors>(rows, scales + kWidth * (parts + k), least(kDepthMost, p.rank - k),
                                   k == 0 ? nullptr : sums, kWidth, sums, kWidth);
          }
        const int64_t at = t * p.outer + (panel + done + c) * kWidth;
        const bool in_place = n == kTileRows && p.rounded == nullptr;
        add_integers(p.integers.values + 64 * tile, p.integers.scales + tile, panel_of, scales, parts, sums,
                     in_place ? p.y + at : edge, in_place ? p.outer : kWidth);
        for (int64_t r = 0; !in_place && r < n; ++r)
          for (int64_t k = 0; k < kWidth; k += 16) {
            const F16 y = F16::load(edge + r * kWidth + k);
            p.rounded == nullptr ? y.store(p.y + at + r * p.outer + k) : store16(p.rounded + at + r * p.outer + k, y);
          }
      }
    }
  }
}

}  // namespace
}  // namespace qlora
