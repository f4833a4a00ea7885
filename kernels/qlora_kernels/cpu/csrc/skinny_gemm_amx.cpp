// Sums over tokens with the narrow matrices of an adapter, on the processor's matrix unit (AMX), one pass over a large
// matrix x for all (x is a layer's dy, or its input):
//
//   x [tokens, columns], left, up [.., rank] bf16    v = x up    p = left^T x    dots_c = sum_t x_tc y_tc
//
// The backward pass of an adapted layer wants all three of dy, whose size is what they cost. A piece is kPart tokens of
// a strip of columns: it leaves partial sums, of v over columns and of the others over tokens, which `finish` adds up
// in order, so the number of threads does not matter. x is B of p, two rows interleaved, and A of v as it lies in
// memory. The alternative, a product each, reads dy three times.
#include "amx.h"

#include "skinny_gemm_amx.h"

#if defined(QLORA_TILES)
namespace qlora {
namespace {

constexpr int64_t kBlocks = kStrip / 32;  // of 32 columns

inline __m512 even(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline __m512 odd(__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000)))); }

void piece(const Narrow& n, int64_t token, int64_t tokens, int64_t column, int64_t columns, float* v, float* p,
           float* dots) {
  const int64_t blocks = ceil_div(columns, 32), steps = ceil_div(tokens, 32), ranks = ceil_div(n.rank, 16);
  const Unit<true> unit;
  Tile left[kPart / 32], up[kBlocks], pairs[kBlocks][2], sums[kBlocks][2], edge[kBlocks][2], part[2];
  __m512 dot[kBlocks][2];
  for (int64_t k = 0; k < ranks; ++k) {
    const int64_t ranked = n.rank - 16 * k;
    for (int64_t s = 0; s < steps; ++s) {
      pairs_of(left[s], n.left + (token + 32 * s) * n.rank + 16 * k, n.rank, tokens - 32 * s, ranked);
      transpose(left[s]);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      if (n.up != nullptr)
        pairs_of(up[b], n.up + (column + 32 * b) * n.rank + 16 * k, n.rank, columns - 32 * b, ranked);
      dot[b][0] = dot[b][1] = _mm512_setzero_ps();
    }
    memset(sums, 0, sizeof sums);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t rest = minimum(32, tokens - 32 * s);
      const uint16_t* row = n.x + (token + 32 * s) * n.columns + column;
      const uint16_t* other = n.y == nullptr || k > 0 ? nullptr : n.y + (token + 32 * s) * n.columns + column;
      for (int64_t b = 0; b < blocks; ++b) {
        const __mmask32 mask = first(columns - 32 * b);
        const bool whole = rest == 32 && mask == ~0u;
        for (int t = 0; t < 32; t += 2) {
          __m512i x[2];
          for (int i = 0; i < 2; ++i) {
            const uint16_t* at = row + (t + i) * n.columns + 32 * b;
            x[i] = t + i < rest ? _mm512_maskz_loadu_epi16(mask, at) : _mm512_setzero_si512();
            _mm_prefetch(reinterpret_cast<const char*>(at + 32 * n.columns), _MM_HINT_T0);
            if (!whole) edge[b][t / 16].set(t % 16 + i, x[i]);
            if (other == nullptr || t + i >= rest) continue;
            const uint16_t* beside = other + (t + i) * n.columns + 32 * b;
            const __m512i y = _mm512_maskz_loadu_epi16(mask, beside);
            _mm_prefetch(reinterpret_cast<const char*>(beside + 32 * n.columns), _MM_HINT_T0);
            dot[b][0] = _mm512_fmadd_ps(even(x[i]), even(y), dot[b][0]);
            dot[b][1] = _mm512_fmadd_ps(odd(x[i]), odd(y), dot[b][1]);
          }
          interleave(x[0], x[1], pairs[b][0], pairs[b][1], t / 2);
        }
      }
      asm volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
      _tile_zero(0);
      _tile_zero(1);
      _tile_loadd(5, &left[s], 64);
      for (int64_t b = 0; b < blocks; ++b) {
        if (n.up != nullptr) {
          const bool whole = rest == 32 && columns - 32 * b >= 32;
          _tile_loadd(2, &up[b], 64);
          if (whole) {
            _tile_loadd(3, row + 32 * b, 2 * n.columns);
            _tile_loadd(4, row + 16 * n.columns + 32 * b, 2 * n.columns);
          } else {
            _tile_loadd(3, &edge[b][0], 64);
            _tile_loadd(4, &edge[b][1], 64);
          }
          _tile_dpbf16ps(0, 3, 2);
          _tile_dpbf16ps(1, 4, 2);
        }
        for (int h = 0; h < 2; ++h) {
          _tile_loadd(6, &sums[b][h], 64);
          _tile_loadd(7, &pairs[b][h], 64);
          _tile_dpbf16ps(6, 5, 7);
          _tile_stored(6, &sums[b][h], 64);
        }
      }
      if (n.up != nullptr) {
        _tile_stored(0, &part[0], 64);
        _tile_stored(1, &part[1], 64);
        for (int64_t t = 0; t < rest; ++t)
          _mm512_storeu_ps(v + (token + 32 * s + t) * 16 * ranks + 16 * k, part[t / 16].floats(t % 16));
      }
    }
    for (int64_t b = 0; b < blocks; ++b)
      for (int h = 0; h < 2; ++h)
        for (int r = 0; r < 16; ++r)
          _mm512_mask_storeu_ps(p + (16 * k + r) * n.columns + column + 32 * b + 16 * h,
                                __mmask16(first(columns - 32 * b - 16 * h)), sums[b][h].floats(r));
    if (n.y == nullptr || k > 0) continue;
    for (int64_t b = 0; b < blocks; ++b) {
      alignas(64) float both[2][16];
      for (int h = 0; h < 2; ++h) _mm512_store_ps(both[h], dot[b][h]);
      for (int64_t c = 0; c < minimum(32, columns - 32 * b); ++c) dots[column + 32 * b + c] = both[c & 1][c / 2];
    }
  }
}

inline __m512 total(const float* first, int64_t count, int64_t apart, __mmask16 mask) {
  __m512 sum = _mm512_maskz_loadu_ps(mask, first);
  for (int64_t i = 1; i < count; ++i) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, first + i * apart));
  return sum;
}

void finish_tokens(const Narrow& n, const float* v, int64_t strips, int64_t token, int64_t tokens, uint16_t* out) {
  const int64_t padded = 16 * ceil_div(n.rank, 16);
  for (int64_t t = token; t < token + tokens; ++t)
    for (int64_t k = 0; k < n.rank; k += 16) {
      const __mmask16 mask = __mmask16(first(n.rank - k));
      _mm256_mask_storeu_epi16(
          out + t * n.rank + k, mask,
          (__m256i)_mm512_cvtneps_pbh(total(v + t * padded + k, strips, n.tokens * padded, 0xffff)));
    }
}

void finish_columns(const Narrow& n, const float* p, int64_t parts, int64_t column, int64_t columns, bool transposed,
                    float scaling, const float* gain, float* out) {
  const int64_t apart = 16 * ceil_div(n.rank, 16) * n.columns;
  for (int64_t c = column; c < column + columns; c += 16)
    for (int64_t k = 0; k < n.rank; k += 16) {
      const __mmask16 mask = __mmask16(first(column + columns - c));
      Tile tile;
      for (int r = 0; r < 16; ++r) {
        const __m512 sum = total(p + (k + r) * n.columns + c, parts, apart, mask);
        if (transposed)
          tile.set(r, _mm512_castps_si512(sum));
        else if (k + r < n.rank)
          _mm512_mask_storeu_ps(out + (k + r) * n.columns + c, mask, sum);
      }
      if (!transposed) continue;
      transpose(tile);
      for (int64_t j = 0; j < minimum(16, column + columns - c); ++j) {
        const __m512 factor = _mm512_set1_ps(gain == nullptr ? scaling : scaling * gain[c + j]);
        _mm512_mask_storeu_ps(out + (c + j) * n.rank + k, __mmask16(first(n.rank - k)),
                              _mm512_mul_ps(tile.floats(int(j)), factor));
      }
    }
}

}  // namespace

const NarrowProducts matrix_products = {piece, finish_tokens, finish_columns};

}  // namespace qlora

QLORA_TILES_END
#else
namespace qlora {
const NarrowProducts matrix_products = {};
}
#endif
