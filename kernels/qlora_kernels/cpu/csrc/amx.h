// 1 KB tiles, the operands of the processor's matrix unit (AMX), their products, and how they are made from rows of
// bf16:
//
//   C[16, 16] += A[16, 32] B[32, 16]
//   A   16 rows of 32 bf16        B   16 rows, each two rows of 16 bf16 interleaved        C   16 rows of 16 float32
//
// Included first by files that run on it, under QLORA_TILES. Everything is in an anonymous namespace and compiled for
// AVX512-BF16 and AMX: dispatch.cpp lets nothing of it run elsewhere.
#pragma once

#include <stdint.h>

#if defined(__x86_64__) && __has_include(<amxbf16intrin.h>)  // GCC 11, Clang 12
#define QLORA_TILES
#include <immintrin.h>
#include <math.h>
#include <string.h>

// The instructions of all that follows, up to QLORA_TILES_END.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#define QLORA_TILES_END _Pragma("clang attribute pop")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define QLORA_TILES_END
#endif

namespace qlora {
namespace {

using BF16 = uint16_t;

struct alignas(64) Tile {
  uint32_t row[16][16];
  __m512 floats(int i) const { return _mm512_load_ps(row[i]); }
  void set(int i, __m512i x) { _mm512_store_si512(row[i], x); }
};

// Tiles [i][j] of a matrix, or the part of it from a tile on.
struct Grid {
  Tile* tiles;
  int64_t across;
  Tile& operator()(int64_t i, int64_t j) const { return tiles[i * across + j]; }
  Grid from(int64_t i, int64_t j) const { return {tiles + i * across + j, across}; }
};

struct Memory {
  Tile* next;
  Grid take(int64_t rows, int64_t columns) {
    next += rows * columns;
    return {next - rows * columns, columns};
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------- products of tiles

// c[2][2] (+)= sum over i < k of a[2][i] b[2][i]
template <bool kAmx>
inline void multiply(Grid a, Grid b, int64_t k, Grid c, bool accumulate) {
  if constexpr (kAmx) {
    asm volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
    if (accumulate) {
      _tile_loadd(0, &c(0, 0), 64);
      _tile_loadd(1, &c(0, 1), 64);
      _tile_loadd(2, &c(1, 0), 64);
      _tile_loadd(3, &c(1, 1), 64);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < k; ++i) {
      _tile_loadd(4, &a(0, i), 64);
      _tile_loadd(6, &b(0, i), 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, &b(1, i), 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, &a(1, i), 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, &c(0, 0), 64);
    _tile_stored(1, &c(0, 1), 64);
    _tile_stored(2, &c(1, 0), 64);
    _tile_stored(3, &c(1, 1), 64);
  } else {
    for (int y = 0; y < 2; ++y)
      for (int x = 0; x < 2; ++x) {
        __m512 sum[16];
        for (int r = 0; r < 16; ++r) sum[r] = accumulate ? c(y, x).floats(r) : _mm512_setzero_ps();
        for (int64_t i = 0; i < k; ++i)
          for (int p = 0; p < 16; ++p) {
            const __m512bh pairs = (__m512bh)_mm512_load_si512(b(x, i).row[p]);
            for (int r = 0; r < 16; ++r)
              sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_set1_epi32(int(a(y, i).row[r][p])), pairs);
          }
        for (int r = 0; r < 16; ++r) _mm512_store_ps(c(y, x).row[r], sum[r]);
      }
  }
}

// What a thread needs around its products: eight tiles of full size, and afterwards the configuration it found.
template <bool kAmx>
struct Unit {
  alignas(64) uint8_t before[64];
  Unit() {
    if constexpr (kAmx) {
      alignas(64) uint8_t all[64] = {};
      all[0] = 1;
      for (int i = 0; i < 8; ++i) all[16 + 2 * i] = 64, all[48 + i] = 16;
      asm volatile("sttilecfg %0" : "=m"(before));
      asm volatile("ldtilecfg %0" : : "m"(all));
    }
  }
  ~Unit() {
    if constexpr (kAmx) asm volatile("ldtilecfg %0" : : "m"(before));
  }
};

// ---------------------------------------------------------------- tiles from rows, and rows from tiles

inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

inline void transpose(Tile& t) {
  __m512i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(t.row[i]);
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      y[8 * j + i] = _mm512_shuffle_i32x4(x[8 * j + i], x[8 * j + i + 4], 0x88);
      y[8 * j + i + 4] = _mm512_shuffle_i32x4(x[8 * j + i], x[8 * j + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    t.set(i, _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88));
    t.set(i + 8, _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd));
  }
}

// 16 values in the low half and 16 in the high half -> pairs of them.
inline __m512i interleaved(__m512i x) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), x);
}

// Two rows of 32 values to pairs of the first 16 columns, and of the others.
inline void interleave(__m512i even, __m512i odd, Tile& first, Tile& second, int p) {
  alignas(64) static constexpr uint16_t order[2][32] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  first.set(p, _mm512_permutex2var_epi16(even, _mm512_load_si512(order[0]), odd));
  second.set(p, _mm512_permutex2var_epi16(even, _mm512_load_si512(order[1]), odd));
}

inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// 16 rows of 32 values: A. Rows past n and columns past `columns` are zeros.
inline void rows_of(Tile& t, const BF16* x, int64_t stride, int64_t n, int64_t columns) {
  for (int r = 0; r < 16; ++r)
    t.set(r, r < n ? _mm512_maskz_loadu_epi16(first(columns), x + r * stride) : _mm512_setzero_si512());
}

// 32 rows of 16 values: B.
inline void pairs_of(Tile& t, const BF16* x, int64_t stride, int64_t n, int64_t columns) {
  const __mmask16 mask = __mmask16(first(columns));
  for (int p = 0; p < 16; ++p) {
    const __m256i low = 2 * p < n ? _mm256_maskz_loadu_epi16(mask, x + 2 * p * stride) : _mm256_setzero_si256();
    const __m256i high =
        2 * p + 1 < n ? _mm256_maskz_loadu_epi16(mask, x + (2 * p + 1) * stride) : _mm256_setzero_si256();
    t.set(p, interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
  }
}

// C times a factor to 16 rows of x, of which n exist, 16 columns, of which `columns` exist.
inline void store_rows(const Tile& c, float factor, BF16* x, int64_t stride, int64_t n, int64_t columns) {
  for (int r = 0; r < 16 && r < n; ++r)
    _mm256_mask_storeu_epi16(x + r * stride, __mmask16(first(columns)),
                             (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(c.floats(r), _mm512_set1_ps(factor))));
}
inline void store_rows(const Tile& c, float factor, float* x, int64_t stride, int64_t n, int64_t columns) {
  for (int r = 0; r < 16 && r < n; ++r)
    _mm512_mask_storeu_ps(x + r * stride, __mmask16(first(columns)),
                          _mm512_mul_ps(c.floats(r), _mm512_set1_ps(factor)));
}

}  // namespace
}  // namespace qlora
#endif
