// Quantized weights: codes and scales of a dense weight, and a dense weight from them.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "dispatch.h"
#include "tables.h"

using namespace qlora;

extern "C" {

// `weight`, n values of `dtype` -> codes under `levels` [16], and the largest magnitude of each block.
void qlora_quantize_4bit(const void* weight, int dtype, int64_t n, int64_t blocksize, const float* levels,
                         uint8_t* packed, float* absmax, int threads) {
  Cells cells;
  fill_cells(levels, cells);
  const int shift = __builtin_ctzll(uint64_t(blocksize));
  const int64_t blocks = ceil_div(n, blocksize), step = kPiece / blocksize;
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    kernels->encode(cells, weight, Dtype(dtype), n, i * step, minimum(blocks, (i + 1) * step), shift, packed, absmax);
  });
}

// The same under given scales [blocks].
void qlora_encode_4bit(const void* weight, int dtype, int64_t n, int64_t blocksize, const float* levels,
                       const float* scales, uint8_t* packed, int threads) {
  Cells cells;
  fill_cells(levels, cells);
  const int shift = __builtin_ctzll(uint64_t(blocksize));
  const int64_t blocks = ceil_div(n, blocksize), step = kPiece / blocksize;
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    kernels->encode_with(cells, weight, Dtype(dtype), n, i * step, minimum(blocks, (i + 1) * step), shift, scales,
                         packed);
  });
}

// The scales [blocks] of least squared error.
void qlora_fit_scales_4bit(const void* weight, int dtype, int64_t n, int64_t blocksize, const float* levels,
                           float* scales, int threads) {
  Cells cells;
  fill_cells(levels, cells);
  const int shift = __builtin_ctzll(uint64_t(blocksize));
  const int64_t blocks = ceil_div(n, blocksize), step = kPiece / 8 / blocksize > 0 ? kPiece / 8 / blocksize : 1;
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    kernels->fit(cells, weight, Dtype(dtype), n, i * step, minimum(blocks, (i + 1) * step), shift, scales);
  });
}

// absmax [count] -> codes [count], nested [ceil(count / blocksize)]; offset is their mean, summed by torch.
void qlora_quantize_absmax(const float* absmax, const float* offset, int64_t count, int64_t blocksize, uint8_t* codes,
                           float* nested, int threads) {
  const int64_t blocks = ceil_div(count, blocksize), step = ceil_div(4096, blocksize);
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    for (int64_t block = i * step; block < minimum(blocks, (i + 1) * step); ++block) {
      const int64_t start = block * blocksize, stop = minimum(count, start + blocksize);
      uint32_t bits = 0;  // as integers a NaN is larger than any number
      for (int64_t k = start; k < stop; ++k) {
        const uint32_t magnitude = bits_of(absmax[k] - *offset) & 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
      }
      const float largest = nested[block] = float_of(bits);
      const float inverse = 1.0f / (largest > kTiny ? largest : kTiny);
      for (int64_t k = start; k < stop; ++k) codes[k] = dynamic_cells.nearest((absmax[k] - *offset) * inverse);
    }
  });
}

// Dense, in `dtype`; `fresh`: the memory of `out` has just been allocated.
void qlora_dequantize_4bit(const Weight* weight, int dtype, void* out, int fresh, int threads) {
  const Weight w = *weight;
  const int64_t n = w.rows * w.columns, width = dtype == kFloat32 ? 4 : 2;
  const Stores stores = fresh || n * width < kFetch ? kPlain : n * width < kPastCaches ? kFetched : kPast;
  parallel(ceil_div(n, kPiece), threads, [&](int64_t i) {
    kernels->decode(w, i * kPiece, minimum(n, (i + 1) * kPiece), Dtype(dtype), stores,
                    static_cast<char*>(out) + i * kPiece * width);
#if defined(__x86_64__)
    if (stores == kPast) _mm_sfence();
#endif
  });
}

}  // extern "C"
