// The integers of nf4_gemm_integers.h for dense_gemm.h, and the layer that has both. Rounding W once for good would
// take half of W more, and saves a tenth of the time at 256 tokens. Of W^T a scale is that of 64 of a row; of W 64 rows
// x kWidth columns have one.
#pragma once

namespace qlora {
namespace {

// A tile or panel is kParts scales of each row or column, then its integers, kParts times 64 deep.
struct DenseIntegers {
  static constexpr int64_t kDepth = 1024, kParts = kDepth / 64, kTile = kTileRows * kParts * (kPairs + 1),
                           kPanel = kWidth * kParts * (kPairs + 1);

  static int16_t* values_of(float* tile) { return reinterpret_cast<int16_t*>(tile + kTileRows * kParts); }
  static int32_t* pairs_of(float* panel) { return reinterpret_cast<int32_t*>(panel + kWidth * kParts); }

  static void tile(const float* x, int64_t stride, int64_t rows, int64_t depth, float* out) {
    integer_tile(x, stride, rows, depth, values_of(out), out);
  }

  template <class T>
  static void rows(const T* W, int64_t stride, int64_t rows, int64_t depth, float* scales) {
    alignas(64) float pairs[16][kPairs];
    int32_t* const out = pairs_of(scales);
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

  template <class T>
  static void columns(const T* W, int64_t stride, int64_t depth, int64_t count, float* out) {
    for (int64_t n = 0; n < pieces_of(depth, 64); ++n)  // a row of W after the other, as memory has them
      for (int64_t c = 0; c < count; ++c)
        part_of(W + 64 * n * stride + c * kWidth, stride, least(64, depth - 64 * n),
                pairs_of(out + c * kPanel) + kWidth * kPairs * n, out + c * kPanel + kWidth * n);
  }

  // 64 rows of W, of which `rows` are there, and kWidth columns; their scale kWidth times.
  template <class T>
  static void part_of(const T* W, int64_t stride, int64_t rows, int32_t* out, float* scales) {
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

  static void product(float* tile, float* panel, int64_t depth, float* before, float* out, int64_t stride) {
    add_integers(values_of(tile), tile, pairs_of(panel), panel, pieces_of(depth, 64), before, out, stride);
  }
};

constexpr Layer kIntegerLayer = {kTileRows,
                                 kWidth,
                                 true,
                                 integer_room,
                                 narrow,
                                 integers,
                                 integer_wide,
                                 sums,
                                 dense_room<DenseIntegers>,
                                 dense_wide<DenseIntegers>};

}  // namespace
}  // namespace qlora
