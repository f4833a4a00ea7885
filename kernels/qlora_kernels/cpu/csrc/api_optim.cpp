// An optimizer's step: AdamW, the norm of all gradients, 8-bit codes of moments.

#include "dispatch.h"
#include "tables.h"

using namespace qlora;

namespace {

// Pieces one behind the other, piece i of sizes[i] elements at at[i], cut into parts of `size`: f(part, piece, from,
// to) for each piece in a part.
template <class F>
void each_piece(const int64_t* at, const int64_t* sizes, int64_t count, int64_t length, int64_t size, int threads,
                F f) {
  parallel(ceil_div(length, size), threads, [&](int64_t i) {
    const int64_t start = i * size, stop = minimum(length, start + size);
    int64_t k = 0;
    for (int64_t above = count; above - k > 1;)
      (at[(k + above) / 2] <= start ? k : above) = (k + above) / 2;  // the last that begins by there
    for (; k < count && at[k] < stop; ++k) {
      const int64_t from = at[k] > start ? at[k] : start, to = minimum(stop, at[k] + sizes[k]);
      if (from < to) f(i, k, from, to);
    }
  });
}

}  // namespace

extern "C" {

// values [count], whole blocks -> codes [count], absmax [count / blocksize].
void qlora_encode_blocks(const float* values, int64_t count, int64_t blocksize, int is_signed, uint8_t* codes,
                         float* absmax, int threads) {
  const int64_t blocks = count / blocksize, step = ceil_div(4096, blocksize);
  const DynamicCells& cells = block_cells[is_signed];
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    for (int64_t block = i * step; block < minimum(blocks, (i + 1) * step); ++block) {
      const float* in = values + block * blocksize;
      uint32_t bits = 0;
      for (int64_t k = 0; k < blocksize; ++k) {
        const uint32_t magnitude = bits_of(in[k]) & 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
      }
      const float largest = absmax[block] = float_of(bits), inverse = 1.0f / (largest > kTiny ? largest : kTiny);
      for (int64_t k = 0; k < blocksize; ++k) codes[block * blocksize + k] = cells.nearest(in[k] * inverse);
    }
  });
}

void qlora_decode_blocks(const uint8_t* codes, const float* absmax, int64_t count, int64_t blocksize, int is_signed,
                         float* values, int threads) {
  const int64_t blocks = count / blocksize, step = ceil_div(4096, blocksize);
  const float* map = block_values[is_signed];
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    for (int64_t block = i * step; block < minimum(blocks, (i + 1) * step); ++block)
      for (int64_t k = block * blocksize; k < (block + 1) * blocksize; ++k) values[k] = map[codes[k]] * absmax[block];
  });
}

// One of the two halves of AdamW, of elements below `length` of the flat moments. Piece i, [sizes[i]], lies at[i] in
// them, in order. `pieces` are gradients where `root` is null, which become m and v, else parameters, which m and root
// = sqrt(v) move.
void qlora_adamw(const AdamW* step, float* const* pieces, const int64_t* at, const int64_t* sizes, int64_t count,
                 int64_t length, float* m, float* v, const float* root, int threads) {
  each_piece(at, sizes, count, length, 1 << 13, threads, [&](int64_t, int64_t k, int64_t from, int64_t to) {
    float* const piece = pieces[k] + (from - at[k]);
    if (root == nullptr)
      kernels->adamw_moments(*step, piece, m + from, v + from, to - from);
    else
      kernels->adamw_values(*step, m + from, root + from, piece, to - from);
  });
}

// The norm of all pieces together, summed in `parts`, each with a place in `partial`.
void qlora_total_norm(const float* const* pieces, const int64_t* at, const int64_t* sizes, int64_t count,
                      int64_t length, int64_t parts, double* partial, float* out, int threads) {
  for (int64_t i = 0; i < parts; ++i) partial[i] = 0.0;
  each_piece(at, sizes, count, length, length / parts + 1, threads,
             [&](int64_t i, int64_t k, int64_t from, int64_t to) {
               partial[i] += kernels->sum_of_squares(pieces[k] + (from - at[k]), to - from);
             });
  double total = 0.0;
  for (int64_t i = 0; i < parts; ++i) total += partial[i];
  *out = float(__builtin_sqrt(total));
}

}  // extern "C"
