// The products of a frozen dense weight W [rows, columns], in float32 or bf16 where it lies, over tiles of nf4_gemm.h:
//
//   y = x W^T    the logits of a head          y = x W    their gradient to the states
//
// W is read where it lies, Format::kDepth of the inner dimension at a time, and laid into a few panels in the second
// cache that all tokens are multiplied with; x is laid out a tile at a time, into the first. No copy of W is made, and
// none of x. A Format, DenseFloat or that of dense_gemm_integers.h, has:
//
//   kDepth                       values of the inner dimension that a tile and a panel hold
//   kTile, kPanel                4-byte places of a tile and of a panel
//   tile(x, stride, rows, depth, out)
//                                kTileRows rows of x, zeros behind the last
//   rows(W, stride, rows, depth, out)
//                                a panel of W^T: kWidth rows of W, zeros behind the last
//   columns(W, stride, depth, count, out)
//                                `count` panels of W, side by side
//   product(tile, panel, depth, before, out, stride)
//                                out [kTileRows, kWidth] = before + tile panel; `before` may be overwritten
#pragma once

namespace qlora {
namespace {

struct DenseFloat {
  // Nine panels, half the columns of a small model, go into the second cache beside sums and tile.
  static constexpr int64_t kDepth = 640, kTile = kTileRows * kStride, kPanel = kWidth * kDepth;

  static void tile(const float* x, int64_t stride, int64_t rows, int64_t depth, float* out) {
    copy_rows(x, stride, rows, depth, out);
  }

  template <class T>
  static void rows(const T* W, int64_t stride, int64_t rows, int64_t depth, float* out) {
    alignas(64) float values[16][64];
    for (int64_t d = 0; d < depth; d += 64)
      for (int64_t v = 0; v < kTileVectors; ++v) {
        for (int64_t r = 0; r < 16; ++r) {
          const T* const from = W + (16 * v + r) * stride + d;
          for (int64_t k = 0; k < 64; k += 16) {
            __builtin_prefetch(from + kWidth * stride + k, 0, 2);  // the next panel
            (16 * v + r < rows ? load16(from + k) : F16::zero()).store(values[r] + k);
          }
        }
        for (int64_t k = 0; k < 64; k += 16) transpose16(values[0] + k, 64, out + (d + k) * kWidth + 16 * v, kWidth);
      }
  }

  template <class T>
  static void columns(const T* W, int64_t stride, int64_t depth, int64_t count, float* out) {
    for (int64_t k = 0; k < depth; ++k, W += stride, out += kWidth)
      for (int64_t c = 0; c < count; ++c)
        for (int64_t i = 0; i < kWidth; i += 16) {
          __builtin_prefetch(W + 8 * stride + c * kWidth + i, 0, 2);
          load16(W + c * kWidth + i).store(out + c * kPanel + i);
        }
  }

  static void product(const float* tile, const float* panel, int64_t depth, float* before, float* out, int64_t stride) {
    multiply<kTileVectors>(tile, panel, depth, before, kWidth, out, stride);
  }
};

template <class Format>
constexpr int64_t kDenseGroup = kPanelBytes / 4 / Format::kPanel;

template <class Format>
int64_t dense_room() {
  static_assert(kDenseGroup<Format> > 0);
  return 4 * (Format::kTile + 2 * kTileRows * kWidth + kDenseGroup<Format> * Format::kPanel);
}

template <class Format, class T>
void dense_product(const DenseProduct& p, const T* weight, int64_t token, int64_t tokens, int64_t panel, int64_t panels,
                   char* work) {
  float *const tile = reinterpret_cast<float*>(work), *const sums = tile + Format::kTile,
               *const edge = sums + kTileRows * kWidth, *const made = edge + kTileRows * kWidth;
  for (int64_t start = 0; start < p.inner; start += Format::kDepth) {
    const int64_t depth = least(Format::kDepth, p.inner - start);
    for (int64_t done = 0; done < panels; done += kDenseGroup<Format>) {
      const int64_t count = least(kDenseGroup<Format>, panels - done), first = (panel + done) * kWidth;
      for (int64_t c = 0; p.transposed && c < count; ++c) {
        const int64_t row = first + c * kWidth;
        Format::rows(weight + row * p.inner + start, p.inner, least(kWidth, p.outer - row), depth,
                     made + c * Format::kPanel);
      }
      if (!p.transposed) Format::columns(weight + start * p.outer + first, p.outer, depth, count, made);
      for (int64_t t = token; t < token + tokens; t += kTileRows) {
        const int64_t n = least(kTileRows, token + tokens - t);
        Format::tile(p.x + t * p.inner + start, p.inner, n, depth, tile);
        for (int64_t c = 0; c < count; ++c) {
          const int64_t column = first + c * kWidth, width = least(kWidth, p.outer - column);
          float* const y = p.y + t * p.outer + column;
          const bool whole = n == kTileRows && width == kWidth;
          for (int64_t r = 0; r < kTileRows; ++r)
            for (int64_t i = 0; i < kWidth; i += 16)
              (start > 0 && r < n ? some_of(y + r * p.outer + i, width - i) : F16::zero()).store(sums + r * kWidth + i);
          Format::product(tile, made + c * Format::kPanel, depth, sums, whole ? y : edge, whole ? p.outer : kWidth);
          for (int64_t r = 0; !whole && r < n; ++r)
            for (int64_t k = 0; k < width; ++k) y[r * p.outer + k] = edge[r * kWidth + k];
        }
      }
    }
  }
}

template <class Format>
void dense_wide(const DenseProduct& p, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work) {
  as_they_lie(p.weight,
              [&](const auto* weight) { dense_product<Format>(p, weight, token, tokens, panel, panels, work); });
}

constexpr Layer kFloatLayer = {
    kTileRows, kWidth, false, room, narrow, nullptr, wide, sums, dense_room<DenseFloat>, dense_wide<DenseFloat>};

}  // namespace
}  // namespace qlora
