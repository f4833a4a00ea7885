// DoRA's row norms on the processor's matrix unit (AMX): as `norms` in kernels.h, for an NF4 weight whose blocks do not share 64 columns.
//
//   n_j^2 = sum_b c_jb^2 sum_i l_ji^2  +  2 s sum_k P_jk B_jk  +  s^2 sum_k (B gram)_jk B_jk      P_jk = sum_b c_jb sum_i l_ji A_ki
//
// with the scale c_jb of a block b of 64 columns and the levels l_ji of its codes: 16 rows of levels are an operand as they leave the table, and
// scales are applied to sums. Levels and A come in two bf16 each, high + low, which is 16 bits of a float's 24; what is lost of P is 2^-17 of
// its terms. The squares of levels are integers of 28 bits, in two parts, because ||W_j||^2 is what n is made of. The alternative, float32
// vectors, takes a multiplication for every value of W and 16 of rank: kernels.h has it, for all other processors and shapes.
#include "tiles.h"

#include "nf4.h"

#if defined(QLORA_TILES)
namespace qlora {
namespace {

constexpr int64_t kRows = kMatrixNormRows, kGroup = 4;  // rows of a piece, two tiles; 16s of rank that are multiplied per decoding of W

// 16 rows of 32 floats as two bf16 each.
inline void split_rows(const float* x, int64_t stride, Tile& high, Tile& low) {
  for (int r = 0; r < 16; ++r) {
    const __m512 a = _mm512_loadu_ps(x + r * stride), b = _mm512_loadu_ps(x + r * stride + 16);
    const __m512i both = rounded(a, b);
    const __m512 a_high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
    const __m512 b_high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    high.set(r, both);
    low.set(r, rounded(_mm512_sub_ps(a, a_high), _mm512_sub_ps(b, b_high)));
  }
}

// A [rank, columns] to pairs [columns / 64][rank / 16][high 0..31, high 32..63, low 0..31, low 32..63].
void pack(const float* A, int64_t rank, int64_t columns, void* pairs) {
  for (int64_t b = 0; b < columns / 64; ++b)
    for (int64_t k = 0; k < rank / 16; ++k) {
      Tile* to = static_cast<Tile*>(pairs) + (b * rank / 16 + k) * 4;
      for (int half = 0; half < 2; ++half) {
        split_rows(A + 16 * k * columns + 64 * b + 32 * half, columns, to[half], to[2 + half]);
        transpose(to[half]), transpose(to[2 + half]);
      }
    }
}

// Rows 16 k.. of A At [rank, rank].
void gram(const float* A, const void* pairs, int64_t rank, int64_t columns, int64_t k, float* out) {
  const Unit<true> unit;
  Tile high, low, sum[2];
  for (int64_t l = 0; l < rank / 16; ++l) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t b = 0; b < columns / 64; ++b)
      for (int half = 0; half < 2; ++half) {
        const Tile* other = static_cast<const Tile*>(pairs) + (b * rank / 16 + l) * 4 + half;
        split_rows(A + 16 * k * columns + 64 * b + 32 * half, columns, high, low);
        asm volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
        _tile_loadd(4, &high, 64);
        _tile_loadd(5, &low, 64);
        _tile_loadd(6, other, 64);
        _tile_loadd(7, other + 2, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(1, 5, 7);  // these are squares: without it they would all be too small
      }
    _tile_stored(0, &sum[0], 64);
    _tile_stored(1, &sum[1], 64);
    for (int r = 0; r < 16; ++r) _mm512_storeu_ps(out + (16 * k + r) * rank + 16 * l, _mm512_add_ps(sum[0].floats(r), sum[1].floats(r)));
  }
}

// sums[2 of rows][2]: high * high, and high * low + low * high, of 64 columns.
inline void multiply(const Tile (&levels)[2][2][2], const Tile* pairs, Tile (&sums)[2][2]) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int half = 0; half < 2; ++half) {
    _tile_loadd(6, pairs + half, 64);
    _tile_loadd(7, pairs + 2 + half, 64);
    _tile_loadd(4, &levels[0][0][half], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, &levels[1][0][half], 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, &levels[0][1][half], 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, &levels[1][1][half], 64);
    _tile_dpbf16ps(3, 5, 6);
  }
  _tile_stored(0, &sums[0][0], 64);
  _tile_stored(1, &sums[0][1], 64);
  _tile_stored(2, &sums[1][0], 64);
  _tile_stored(3, &sums[1][1], 64);
}

// The levels of 64 columns of W from element `at` on in each of some rows, and their scales; kSquares: the squares onto `own`.
template <bool kSquares>
inline void decode(const Weight& w, const __m512i (&part)[4], uint64_t at, int64_t rows, Tile (&levels)[2][2][2], float* scale, __m512* own) {
  const __m512i one = _mm512_set1_epi16(1), upper = part[2], lower = part[3];
  const uint64_t stride = uint64_t(w.columns) / 2;
  const uint8_t* codes = w.packed + at / 2;
  for (int64_t r = 0; r < rows; ++r, at += uint64_t(w.columns)) scale[r] = block_scale(w, int64_t(at >> w.block_shift));
  for (int64_t group = 0; group < rows; group += 16) {
    uint32_t* high = levels[group / 16][0][0].row[0];  // low: two tiles further on, the second half one
    for (int64_t r = group; r < rows && r < group + 16; ++r, codes += stride, high += 16) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kRows * stride), _MM_HINT_T0);  // the next piece
      __m512i squares[2];  // upper and lower 14 bits
      for (int half = 0; half < 2; ++half) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * half)));
        const __m512i pairs = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
        _mm512_store_si512(high + 256 * half, _mm512_permutexvar_epi16(pairs, part[0]));
        _mm512_store_si512(high + 256 * (2 + half), _mm512_permutexvar_epi16(pairs, part[1]));
        if constexpr (kSquares) {
          const __m512i a = _mm512_madd_epi16(_mm512_permutexvar_epi16(pairs, upper), one), b = _mm512_madd_epi16(_mm512_permutexvar_epi16(pairs, lower), one);
          squares[0] = half == 0 ? a : _mm512_add_epi32(squares[0], a);
          squares[1] = half == 0 ? b : _mm512_add_epi32(squares[1], b);
        }
      }
      if constexpr (kSquares) {
        const __m512 square = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(squares[0], 14), squares[1]));
        own[r] = _mm512_fmadd_ps(_mm512_set1_ps(scale[r] * scale[r] * 0x1p-28f), square, own[r]);
      }
    }
  }
}

bool norms(const Weight& weight, const void* pairs, const float* B, const float* gram, int64_t rank, float scaling, int64_t first, int64_t last, float* n) {
  const Weight w = weight;
  const int64_t rows = last - first, blocks = w.columns / 64;
  __m512i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm512_load_si512(tables.level_parts[i]);
  // [turn][16 rows][high, low][32 columns]; rows that do not exist stay zeros. Two turns: a tile that was just written is slow to read back,
  // so the block that is decoded, the one that is multiplied and the one whose sums are added up are three.
  Tile levels[2][2][2][2], sums[2][kGroup][2][2];
  if (rows < kRows) memset(levels, 0, sizeof levels);
  alignas(64) float product[kRows][16 * kGroup];
  float scale[3][kRows] = {};
  __m512 own[kRows], rest[kRows];
  for (int r = 0; r < kRows; ++r) own[r] = rest[r] = _mm512_setzero_ps();
  const Unit<true> unit;
  for (int64_t k0 = 0; k0 < rank / 16; k0 += kGroup) {
    const int64_t group = minimum(kGroup, rank / 16 - k0);
    for (int r = 0; r < kRows; ++r)
      for (int64_t k = 0; k < group; ++k) _mm512_store_ps(product[r] + 16 * k, _mm512_setzero_ps());
    for (int64_t b = 0; b < blocks + 2; ++b) {
      if (b < blocks) (k0 == 0 ? decode<true> : decode<false>)(w, part, first * w.columns + 64 * b, rows, levels[b & 1], scale[b % 3], own);
      if (b >= 1 && b <= blocks)
        for (int64_t k = 0; k < group; ++k) multiply(levels[(b - 1) & 1], static_cast<const Tile*>(pairs) + ((b - 1) * rank / 16 + k0 + k) * 4, sums[(b - 1) & 1][k]);
      if (b >= 2)
        for (int64_t k = 0; k < group; ++k)
          for (int r = 0; r < kRows; ++r) {
            const Tile(&sum)[2] = sums[b & 1][k][r / 16];
            float* to = product[r] + 16 * k;
            _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(scale[(b - 2) % 3][r]), _mm512_add_ps(sum[0].floats(r % 16), sum[1].floats(r % 16)), _mm512_load_ps(to)));
          }
    }
    // Of the last two sums, what these ranks add: sum_k B_jk (2 s P_jk + s^2 (B gram)_jk).
    for (int64_t r = 0; r < rows; ++r) {
      const float* b = B + (first + r) * rank;
      for (int64_t k = 0; k < group; ++k) {
        __m512 update[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t l = 0; l < rank; l += 2)
          for (int i = 0; i < 2; ++i)
            update[i] = _mm512_fmadd_ps(_mm512_set1_ps(b[l + i]), _mm512_loadu_ps(gram + (l + i) * rank + 16 * (k0 + k)), update[i]);
        const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(0.5f * scaling), _mm512_add_ps(update[0], update[1]), _mm512_load_ps(product[r] + 16 * k));
        rest[r] = _mm512_fmadd_ps(_mm512_loadu_ps(b + 16 * (k0 + k)), sum, rest[r]);
      }
    }
  }
  bool exact = true;
  for (int64_t r = 0; r < rows; ++r) {
    const double total = _mm512_reduce_add_ps(own[r]), squared = total + 2.0 * scaling * _mm512_reduce_add_ps(rest[r]);
    exact = exact && !(squared < 1e-3 * total);
    n[first + r] = float(__builtin_sqrt(squared));
  }
  return exact;
}

}  // namespace

const MatrixNorms matrix_norms = {pack, gram, norms};

}  // namespace qlora

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace qlora {
const MatrixNorms matrix_norms = {};
}
#endif
