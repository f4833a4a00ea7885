// The products of a frozen dense weight W [rows, columns] by 16-bit integers, as nf4_gemm_vnni.h has those of codes:
//
//   y = x W^T    the logits of a head          y = x W    their gradient to the states
//
// W is read where it lies, kDenseDepth of the inner dimension at a time, and rounded into a few panels in the second
// cache that all tokens are multiplied with; x is rounded a tile at a time, into the first. No copy of W is made, and
// none of x: rounding W once for good would take half of W more, and saves a tenth of the time at 256 tokens. Of W^T a
// scale is that of 64 of a row; of W 64 rows x 32 columns have one.
#pragma once

namespace qlora {
namespace {

constexpr int64_t kDenseDepth = 1024, kDenseParts = kDenseDepth / 64;

// 32 rows of W, of which `rows` are there, `depth` columns from W on: a panel of W^T and its scales [depth / 64, 32].
inline void dense_rows(const float* W, int64_t stride, int64_t rows, int64_t depth, int32_t* out, float* scales) {
  alignas(64) float pairs[16][kPairs];
  for (int64_t n = 0; n < depth / 64; ++n)
    for (int64_t v = 0; v < 2; ++v) {
      for (int64_t r = 0; r < 16; ++r) {
        const float* const from = W + (16 * v + r) * stride + 64 * n;
        for (int i = 0; i < 4; ++i) __builtin_prefetch(from + 32 * stride + 16 * i, 0, 2);  // the next panel
        __m512 value[4];
        for (int i = 0; i < 4; ++i) value[i] = 16 * v + r < rows ? _mm512_loadu_ps(from + 16 * i) : _mm512_setzero_ps();
        scales[32 * n + 16 * v + r] = round_64(value, kMostW, reinterpret_cast<int16_t*>(pairs[r]));
      }
      for (int64_t q = 0; q < kPairs; q += 16)
        transpose16(pairs[0] + q, kPairs, reinterpret_cast<float*>(out + 32 * (kPairs * n + q) + 16 * v), 32);
    }
}

// 64 rows of W, of which `rows` are there, and 32 columns: those of a panel of W, and their scale 32 times.
inline void dense_columns(const float* W, int64_t stride, int64_t rows, int32_t* out, float* scales) {
  __m512i bits = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t i = 0; i < 32; i += 16) {
      __builtin_prefetch(W + (k + 64) * stride + i, 0, 2);
      bits =
          _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(W + k * stride + i)), magnitude));
    }
  const float largest = float_of(_mm512_reduce_max_epu32(bits));
  const __m512 inverse = _mm512_set1_ps(float(kMostW) / (largest > 1e-30f ? largest : 1e-30f)),
               zero = _mm512_setzero_ps();
  for (int64_t c = 0; c < 32; ++c) scales[c] = largest * (1.0f / kMostW);
  for (int64_t k = 0; k < 64; k += 2, out += 32)
    for (int64_t i = 0; i < 32; i += 16) {
      const float* const from = W + k * stride + i;
      const __m512i even = _mm512_cvtps_epi32(_mm512_mul_ps(k < rows ? _mm512_loadu_ps(from) : zero, inverse)),
                    odd = _mm512_cvtps_epi32(
                        _mm512_mul_ps(k + 1 < rows ? _mm512_loadu_ps(from + stride) : zero, inverse));
      _mm512_store_si512(out + i, _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16)));
    }
}

constexpr int64_t kDensePanel = 32 * kDenseParts * (kPairs + 1);  // 4-byte places of a panel and its scales
constexpr int64_t kDenseGroup = kPanelBytes / 4 / kDensePanel;

int64_t dense_room() {
  return 4 * (kTileRows * (32 * kDenseParts + kDenseParts + 3 * kWidth) + kDenseGroup * kDensePanel);
}

void dense_wide(const DenseProduct& p, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work) {
  int16_t* const values = reinterpret_cast<int16_t*>(work);
  float *const xs = reinterpret_cast<float*>(work) + 32 * kTileRows * kDenseParts,
               *const sums = xs + kTileRows * kDenseParts, *const edge = sums + kTileRows * kWidth;
  int32_t* const products = reinterpret_cast<int32_t*>(edge + kTileRows * kWidth);
  float* const made = edge + 2 * kTileRows * kWidth;
  for (int64_t start = 0; start < p.inner; start += kDenseDepth) {
    const int64_t depth = least(kDenseDepth, p.inner - start), parts = pieces_of(depth, 64);
    for (int64_t done = 0; done < panels; done += kDenseGroup) {
      const int64_t count = least(kDenseGroup, panels - done), first = (panel + done) * kWidth;
      const auto integers_at = [&](int64_t c) {
        return reinterpret_cast<int32_t*>(made + c * kDensePanel + 32 * kDenseParts);
      };
      if (p.transposed)
        for (int64_t c = 0; c < count; ++c) {
          const int64_t row = first + c * kWidth;
          dense_rows(p.weight + row * p.inner + start, p.inner, least(kWidth, p.outer - row), depth, integers_at(c),
                     made + c * kDensePanel);
        }
      else
        for (int64_t n = 0; n < parts; ++n)  // a row of W after the other, as memory has them
          for (int64_t c = 0; c < count; ++c)
            dense_columns(p.weight + (start + 64 * n) * p.outer + first + c * kWidth, p.outer,
                          least(64, depth - 64 * n), integers_at(c) + 32 * kPairs * n, made + c * kDensePanel + 32 * n);
      for (int64_t t = token; t < token + tokens; t += kTileRows) {
        const int64_t n = least(kTileRows, token + tokens - t);
        integer_tile(p.x + t * p.inner + start, p.inner, n, depth, values, xs);
        for (int64_t c = 0; c < count; ++c) {
          const int64_t column = first + c * kWidth, width = least(kWidth, p.outer - column);
          float* const y = p.y + t * p.outer + column;
          const bool whole = n == kTileRows && width == kWidth;
          for (int64_t r = 0; r < kTileRows; ++r)
            for (int64_t i = 0; i < kWidth; i += 16)
              _mm512_store_ps(sums + r * kWidth + i,
                              start > 0 && r < n ? some_of(y + r * p.outer + i, width - i) : _mm512_setzero_ps());
          add_integers(values, xs, integers_at(c), made + c * kDensePanel, parts, products, sums, whole ? y : edge,
                       whole ? p.outer : kWidth);
          for (int64_t r = 0; !whole && r < n; ++r)
            for (int64_t k = 0; k < width; ++k) y[r * p.outer + k] = edge[r * kWidth + k];
        }
      }
    }
  }
}

}  // namespace
}  // namespace qlora
