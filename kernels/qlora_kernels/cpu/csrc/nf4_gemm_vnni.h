// The large product of nf4_gemm.h by 16-bit integers (VPDPWSSD of AVX-512 VNNI): two products where float32 has one.
//
//   x_tk  = xs_tn X_tk      per token t and 64 k (n): |X| <= kMostX, xs the scale
//   w'_kc = ws_nc V_kc      |V| <= kMostW
//   y_tc  = sum_n xs_tn ws_nc (sum over the 64 k of n: X_tk V_kc) + sum_r left_tr factor_rc
//
// A sum of 64 is at most 64 kMostX kMostW < 2^31, so no integer overflows; the sums of 64 are added up in float32, and
// so is the adapter's product. Of W'^T (forward) a scale is a block's own, with the gain, and V are the 16 levels in 13
// bits; of W' (backward) 64 rows x 32 columns have one scale, that of the largest among them. What is lost is 2^-13 of
// the largest of 64: 2e-4 of y where bf16's path loses 2e-3 (docs/log.md). Two 8-bit products cost as much and lose
// 6e-3, since 8 bits do not hold the levels. What is not finite stays so: its scale is not.
#pragma once

namespace qlora {
namespace {

constexpr int kMostW = 4095, kMostX = 8191, kPairs = 32;
static_assert(int64_t(64) * kMostW * kMostX < int64_t(1) << 31);
static_assert(kWidth == 32);

// Inline: compilers copy the sum of the intrinsic, and spill.
inline void dot(__m512i& sum, __m512i a, __m512i b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// out [kTileRows, 32] = a [kTileRows, 64] b [32 pairs, 32 columns, 2].
__attribute__((noinline)) void multiply_integers(const int32_t* a, const int32_t* b, int32_t* out) {
  __m512i sum[kTileRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
  for (int k = 0; k < kPairs; ++k, b += 32) {
    const __m512i first = _mm512_load_si512(b), second = _mm512_load_si512(b + 16);
    __builtin_prefetch(b + 256);
    __builtin_prefetch(b + 272);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i x = _mm512_set1_epi32(a[kPairs * r + k]);
      dot(sum[r][0], x, first);
      dot(sum[r][1], x, second);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    _mm512_store_si512(out + 32 * r, sum[r][0]);
    _mm512_store_si512(out + 32 * r + 16, sum[r][1]);
  }
}

// out = before + diag(xs) integers diag(ws).
__attribute__((noinline)) void add_scaled(const int32_t* integers, const float* ws, const float* xs,
                                          const float* before, float* out, int64_t stride) {
  const __m512 first = _mm512_loadu_ps(ws), second = _mm512_loadu_ps(ws + 16);
  for (int r = 0; r < kTileRows; ++r, integers += 32, before += 32, out += stride) {
    const __m512 x = _mm512_set1_ps(xs[r]);
    const __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(integers)), x),
                 b = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(integers + 16)), x);
    _mm512_storeu_ps(out, _mm512_fmadd_ps(a, first, _mm512_load_ps(before)));
    _mm512_storeu_ps(out + 16, _mm512_fmadd_ps(b, second, _mm512_load_ps(before + 16)));
  }
}

// The first n of 16 values, zeros behind them; n may be anything.
inline __m512 some_of(const float* x, int64_t n) {
  return n >= 16 ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(__mmask16(n <= 0 ? 0 : (1u << n) - 1), x);
}

inline __m256i words(__m512 x) { return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)); }

// 64 values in integers up to `most`; their scale.
inline float round_64(const __m512* value, int most, int16_t* out) {
  __m512i bits = _mm512_setzero_si512();  // as integers a NaN is larger than any number
  for (int i = 0; i < 4; ++i)
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(value[i]), _mm512_set1_epi32(0x7fffffff)));
  const float largest = float_of(_mm512_reduce_max_epu32(bits));
  const float inverse = float(most) / (largest > 1e-30f ? largest : 1e-30f);
  for (int i = 0; i < 4; ++i)
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16 * i),
                       words(_mm512_mul_ps(value[i], _mm512_set1_ps(inverse))));
  return largest * (1.0f / most);
}

// `rows` rows of x, `depth` values each: [64 of depth][row of the tile][64], and a scale for each 64. Zeros where there
// are none.
inline void integer_tile(const float* x, int64_t stride, int64_t rows, int64_t depth, int16_t* values, float* scales) {
  for (int64_t n = 0; n < pieces_of(depth, 64); ++n)
    for (int64_t r = 0; r < kTileRows; ++r, values += 64, ++scales) {
      __m512 value[4];
      for (int i = 0; i < 4; ++i)
        value[i] = r < rows ? some_of(x + r * stride + 64 * n + 16 * i, depth - 64 * n - 16 * i) : _mm512_setzero_ps();
      *scales = round_64(value, kMostX, values);
    }
}

void integers(const float* x, int64_t inner, int64_t token, int64_t tokens, Integers out) {
  for (int64_t t = token; t < token + tokens; t += kTileRows) {
    const int64_t at = t / kTileRows * pieces_of(inner, 64) * kTileRows;
    integer_tile(x + t * inner, inner, least(kTileRows, token + tokens - t), inner, out.values + 64 * at,
                 out.scales + at);
  }
}

// out = before + the product of a tile with a panel, `parts` times 64 deep; `before` is overwritten.
inline void add_integers(const int16_t* values, const float* xs, const int32_t* panel, const float* ws, int64_t parts,
                         int32_t* products, float* before, float* out, int64_t stride) {
  for (int64_t i = 0; i < parts; ++i) {
    multiply_integers(reinterpret_cast<const int32_t*>(values + 64 * kTileRows * i), panel + 32 * kPairs * i, products);
    const bool last = i + 1 == parts;
    add_scaled(products, ws + 32 * i, xs + kTileRows * i, before, last ? out : before, last ? stride : kWidth);
  }
}

// 16 words twice, of the levels times a factor.
inline __m512i words_of(const float* levels, float factor) {
  return _mm512_broadcast_i64x4(words(_mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(factor))));
}

inline __m512i decode_words(const uint8_t* bytes, __m512i values) {
  return expand32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), values);
}

inline float scale_at(const Weight& w, int64_t row, int64_t at) {
  return block_scale(w, at >> w.block_shift) * (w.gain == nullptr ? 1.0f : w.gain[row]);
}

// A panel of W'^T and its scales [inner / 64, 32].
inline void integer_rows(const Weight& w, int64_t panel, int32_t* out, float* scales) {
  alignas(64) float pairs[16][kPairs];
  const __m512i values = words_of(w.levels, kMostW);
  for (int64_t n = 0; n < w.columns / 64; ++n)
    for (int64_t v = 0; v < 2; ++v) {
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = 32 * panel + 16 * v + r, at = row * w.columns + 64 * n;
        __builtin_prefetch(w.packed + at / 2 + 64);
        scales[32 * n + 16 * v + r] = scale_at(w, row, at) * (1.0f / kMostW);
        for (int64_t i = 0; i < 2; ++i)
          _mm512_store_si512(&pairs[r][16 * i], decode_words(w.packed + at / 2 + 16 * i, values));
      }
      for (int64_t q = 0; q < kPairs; q += 16)
        transpose16(pairs[0] + q, kPairs, reinterpret_cast<float*>(out + 32 * (kPairs * n + q) + 16 * v), 32);
    }
}

// A panel of W' and its scales [rows / 64, 32].
inline void integer_columns(const Weight& w, int64_t panel, int32_t* out, float* scales) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kFirst), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t n = 0; n < pieces_of(w.rows, 64); ++n) {
    const int64_t rows = least(64, w.rows - 64 * n);
    float scale[64], largest = 0.0f;
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t row = 64 * n + k, at = row * w.columns + 32 * panel;
      scale[k] = scale_at(w, row, at);
      const float size = __builtin_fabsf(scale[k]);
      if (!(size <= largest)) largest = size;  // a NaN too
    }
    const float inverse = float(kMostW) / (largest > 1e-30f ? largest : 1e-30f);
    for (int64_t c = 0; c < 32; ++c) scales[32 * n + c] = largest * (1.0f / kMostW);
    for (int64_t k = 0; k < 64; k += 2, out += 32) {
      __m512i row[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t i = 0; i < 2 && k < rows; ++i) {
        const uint8_t* bytes = w.packed + ((64 * n + k + i) * w.columns + 32 * panel) / 2;
        __builtin_prefetch(bytes + 8 * w.columns);
        row[i] = decode_words(bytes, words_of(w.levels, scale[k + i] * inverse));
      }
      _mm512_store_si512(out, _mm512_permutex2var_epi16(row[0], low, row[1]));
      _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(row[0], high, row[1]));
    }
  }
}

// 4-byte places of a panel: integers, scales and the factor.
inline int64_t integer_panel(int64_t inner, int64_t rank) { return 32 * (pieces_of(inner, 64) * (kPairs + 1) + rank); }

int64_t integer_room(int64_t inner, int64_t rank) {
  const int64_t panel = 4 * integer_panel(inner, rank), own = 4 * kTileRows * (kStride + 4 * kWidth);
  return most(own + most(panel, kPanelBytes), room(inner, rank));
}

void integer_wide(const LayerProduct& p, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work) {
  float *const rows = reinterpret_cast<float*>(work), *const edge = rows + kTileRows * kStride,
               *const sums = edge + kTileRows * kWidth, *const decoded = sums + 2 * kTileRows * kWidth;
  int32_t* const products = reinterpret_cast<int32_t*>(sums + kTileRows * kWidth);
  const int64_t parts = pieces_of(p.inner, 64), size = integer_panel(p.inner, p.rank),
                group = most(1, kPanelBytes / 4 / size);
  for (int64_t done = 0; done < panels; done += group) {
    const int64_t count = least(group, panels - done);
    for (int64_t c = 0; c < count; ++c) {
      float* const scales = decoded + c * size;
      int32_t* const to = reinterpret_cast<int32_t*>(scales + 32 * (parts + p.rank));
      (p.transposed ? integer_rows : integer_columns)(p.weight, panel + done + c, to, scales);
      factor_of(p, panel + done + c, 0, p.rank, scales + 32 * parts);
    }
    for (int64_t t = token; t < token + tokens; t += kTileRows) {
      const int64_t n = least(kTileRows, token + tokens - t), tile = t / kTileRows * parts * kTileRows;
      if (p.rank <= kStride) copy_rows(p.left + t * p.rank, p.rank, n, p.rank, rows);
      for (int64_t c = 0; c < count; ++c) {
        const float* const scales = decoded + c * size;
        const int32_t* const panel_of = reinterpret_cast<const int32_t*>(scales + 32 * (parts + p.rank));
        if (p.rank <= kStride)
          multiply<2>(rows, scales + 32 * parts, p.rank, nullptr, 0, sums, kWidth);
        else
          for (int64_t k = 0; k < p.rank; k += kDepthMost) {
            copy_rows(p.left + t * p.rank + k, p.rank, n, least(kDepthMost, p.rank - k), rows);
            multiply<2>(rows, scales + 32 * (parts + k), least(kDepthMost, p.rank - k), k == 0 ? nullptr : sums, kWidth,
                        sums, kWidth);
          }
        float* const y = p.y + t * p.outer + (panel + done + c) * kWidth;
        add_integers(p.integers.values + 64 * tile, p.integers.scales + tile, panel_of, scales, parts, products, sums,
                     n == kTileRows ? y : edge, n == kTileRows ? p.outer : kWidth);
        for (int64_t r = 0; n < kTileRows && r < n; ++r)
          for (int64_t k = 0; k < kWidth; ++k) y[r * p.outer + k] = edge[r * kWidth + k];
      }
    }
  }
}

}  // namespace
}  // namespace qlora
