// The products of a frozen dense weight W [rows, columns] by 16-bit integers, as nf4_gemm_integers.h has those of
// codes:
//
//   y = x W^T    the logits of a head          y = x W    their gradient to the states        W in float32 or bf16
//
// W is read where it lies, kDenseDepth of the inner dimension at a time, and rounded into a few panels in the second
// cache that all tokens are multiplied with; x is rounded a tile at a time, into the first. No copy of W is made, and
// none of x: rounding W once for good would take half of W more, and saves a tenth of the time at 256 tokens. Of W^T a
// scale is that of 64 of a row; of W 64 rows x kWidth columns have one.
#pragma once

namespace qlora {
namespace {

constexpr int64_t kDenseDepth = 1024, kDenseParts = kDenseDepth / 64;

// kWidth rows of W, of which `rows` are there, `depth` columns from W on: a panel of W^T and its scales [depth / 64,
// kWidth].
template <class T>
inline void dense_rows(const T* W, int64_t stride, int64_t rows, int64_t depth, int32_t* out, float* scales) {
  alignas(64) float pairs[16][kPairs];
  for (int64_t n = 0; n < depth / 64; ++n)
    for (int64_t v = 0; v < kTileVectors; ++v) {
      for (int64_t r = 0; r < 16; ++r) {
        const T* const from = W + (16 * v + r) * stride + 64 * n;
        for (int i = 0; i < 4; ++i) __builtin_prefetch(from + kWidth * stride + 16 * i, 0, 2);  // the next panel
        F16 value[4];
        for (int i = 0; i < 4; ++i) value[i] = 16 * v + r < rows ? load16(from + 16 * i) : F16::zero();
        scales[kWidth * n + 16 * v + r] = round_64(value, kMostW, reinterpret_cast<int16_t*>(pairs[r]));
      }
      for (int64_t q = 0; q < kPairs; q += 16)
        transpose16(pairs[0] + q, kPairs, reinterpret_cast<float*>(out + kWidth * (kPairs * n + q) + 16 * v), kWidth);
    }
}

// 64 rows of W, of which `rows` are there, and kWidth columns: those of a panel of W, and their scale kWidth times.
template <class T>
inline void dense_columns(const T* W, int64_t stride, int64_t rows, int32_t* out, float* scales) {
  Largest largest;
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t i = 0; i < kWidth; i += 16) {
      __builtin_prefetch(W + (k + 64) * stride + i, 0, 2);
      largest.see(load16(W + k * stride + i));
    }
  const F16 inverse = F16::broadcast(inverse_of(largest.value(), kMostW));
  for (int64_t c = 0; c < kWidth; ++c) scales[c] = largest.value() * (1.0f / kMostW);
  for (int64_t k = 0; k < 64; k += 2, out += kWidth)
    for (int64_t i = 0; i < kWidth; i += 16) {
      const T* const from = W + k * stride + i;
      store_pairs(out + i, k < rows ? mul(load16(from), inverse) : F16::zero(),
                  k + 1 < rows ? mul(load16(from + stride), inverse) : F16::zero());
    }
}

constexpr int64_t kDensePanel = kWidth * kDenseParts * (kPairs + 1);  // 4-byte places of a panel and its scales
constexpr int64_t kDenseGroup = kPanelBytes / 4 / kDensePanel;
static_assert(kDenseGroup > 0);

int64_t dense_room() {
  return 4 * (kTileRows * (32 * kDenseParts + kDenseParts + 2 * kWidth) + kDenseGroup * kDensePanel);
}

template <class T>
void dense_product(const DenseProduct& p, const T* weight, int64_t token, int64_t tokens, int64_t panel, int64_t panels,
                   char* work) {
  int16_t* const values = reinterpret_cast<int16_t*>(work);
  float *const xs = reinterpret_cast<float*>(work) + 32 * kTileRows * kDenseParts,
               *const sums = xs + kTileRows * kDenseParts, *const edge = sums + kTileRows * kWidth;
  float* const made = edge + kTileRows * kWidth;
  for (int64_t start = 0; start < p.inner; start += kDenseDepth) {
    const int64_t depth = least(kDenseDepth, p.inner - start), parts = pieces_of(depth, 64);
    for (int64_t done = 0; done < panels; done += kDenseGroup) {
      const int64_t count = least(kDenseGroup, panels - done), first = (panel + done) * kWidth;
      const auto integers_at = [&](int64_t c) {
        return reinterpret_cast<int32_t*>(made + c * kDensePanel + kWidth * kDenseParts);
      };
      if (p.transposed)
        for (int64_t c = 0; c < count; ++c) {
          const int64_t row = first + c * kWidth;
          dense_rows(weight + row * p.inner + start, p.inner, least(kWidth, p.outer - row), depth, integers_at(c),
                     made + c * kDensePanel);
        }
      else
        for (int64_t n = 0; n < parts; ++n)  // a row of W after the other, as memory has them
          for (int64_t c = 0; c < count; ++c)
            dense_columns(weight + (start + 64 * n) * p.outer + first + c * kWidth, p.outer, least(64, depth - 64 * n),
                          integers_at(c) + kWidth * kPairs * n, made + c * kDensePanel + kWidth * n);
      for (int64_t t = token; t < token + tokens; t += kTileRows) {
        const int64_t n = least(kTileRows, token + tokens - t);
        integer_tile(p.x + t * p.inner + start, p.inner, n, depth, values, xs);
        for (int64_t c = 0; c < count; ++c) {
          const int64_t column = first + c * kWidth, width = least(kWidth, p.outer - column);
          float* const y = p.y + t * p.outer + column;
          const bool whole = n == kTileRows && width == kWidth;
          for (int64_t r = 0; r < kTileRows; ++r)
            for (int64_t i = 0; i < kWidth; i += 16)
              (start > 0 && r < n ? some_of(y + r * p.outer + i, width - i) : F16::zero()).store(sums + r * kWidth + i);
          add_integers(values, xs, integers_at(c), made + c * kDensePanel, parts, sums, whole ? y : edge,
                       whole ? p.outer : kWidth);
          for (int64_t r = 0; !whole && r < n; ++r)
            for (int64_t k = 0; k < width; ++k) y[r * p.outer + k] = edge[r * kWidth + k];
        }
      }
    }
  }
}

void dense_wide(const DenseProduct& p, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work) {
  as_they_lie(p.weight, [&](const auto* weight) { dense_product(p, weight, token, tokens, panel, panels, work); });
}

}  // namespace
}  // namespace qlora
