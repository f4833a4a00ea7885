// The large product of an adapted layer on the processor's matrix unit (AMX), which decodes the NF4 weight as it goes:
//
//   forward   y  = x W'^T + u up^T      u = x down^T               W' = diag(gain) W
//   backward  dx = dy W'  + v down
//
// A thread decodes a few panels of 32 columns of y (of W'^T, or of W'), straight into the tiles that the unit takes,
// and multiplies all tokens with them while they lie in the second cache. An adapter's factor is one more tile of each
// panel, so that its product costs no pass over y and is not rounded by itself. Sums of 32 x 32 stay in the unit from
// the first column to the last; they are rounded while the next ones are made, since what the unit has just written is
// slow to read. Every second sum runs backwards: what it shares with the one before is then still in the first cache.
// The alternative, a dense weight for the library's product and the adapter's before it, writes and reads the weight
// twice and y once more.
#include "amx.h"

#include "nf4_gemm_amx.h"

#if defined(QLORA_TILES)
namespace qlora {
namespace {

constexpr int64_t kBlock = kProductBlock;
constexpr int64_t kTokens =
    256;  // are multiplied with all panels before the next ones, so that their x stays in the second cache,
constexpr int64_t kCache = 1 << 19;  // beside so many bytes of panels

// Panels that a thread decodes before it multiplies: as many as there is room for, but at least a whole line of codes
// of each row.
int64_t panels_of(int64_t inner, int64_t rank) {
  const int64_t panel = 2 * (inner / 32 + ceil_div(rank, 32)) * int64_t(sizeof(Tile));
  return kCache > 4 * panel ? kCache / panel : 4;
}

int64_t room(int64_t inner, int64_t rank) {
  const int64_t panels = panels_of(inner, rank) * 2 * (inner / 32 + ceil_div(rank, 32)),
                down = inner / 32 * ceil_div(rank, 16);
  return int64_t(sizeof(Tile)) * (panels > down ? panels : down);
}

// ---------------------------------------------------------------- decoding

inline __m512 some(const float* x, int64_t n) {
  return _mm512_maskz_loadu_ps(__mmask16(first(n)), x);
}  // the first n of 16, zeros behind them

// The 16 values of a block's codes in bf16, twice.
inline __m512i values_of(const float* levels, float scale, float gain) {
  const __m512 values =
      _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale)), _mm512_set1_ps(gain));
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values));
}

// 16 bytes -> 32 values: a byte goes into two words and is shifted in the first. Of what else there is above a code the
// permutation takes no notice.
inline __m512i decode(const uint8_t* codes, __m512i values) {
  alignas(64) static constexpr uint32_t each[16] = {
      0,          0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707,
      0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f};
  const __m512i bytes = _mm512_shuffle_epi8(
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))), _mm512_load_si512(each));
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(bytes, _mm512_set1_epi32(4)), values);
}

// Panels of W^T without the gain, which goes onto sums: 32 rows of W each, two tiles high [2][inner / 32 + ..].
void decode_rows(const Product& p, int64_t panel, int64_t panels, Tile* out, int64_t across) {
  const Weight w = p.weight;
  for (int64_t strip = 2 * panel; strip < 2 * (panel + panels); ++strip, out += across) {
    const int64_t first = 16 * strip * w.columns;
    for (int64_t b = 0; b < w.columns / 64; ++b) {
      Tile* to = out + 2 * b;
      int64_t at = first + 64 * b;
      for (int r = 0; r < 16; ++r, at += w.columns) {
        const uint8_t* codes = w.packed + at / 2;
        const __m512i values = values_of(w.levels, block_scale(w, at >> w.block_shift), 1.0f);
        _mm_prefetch(reinterpret_cast<const char*>(codes + 8 * w.columns), _MM_HINT_T0);
        to[0].set(r, decode(codes, values));
        to[1].set(r, decode(codes + 16, values));
      }
      transpose(to[0]);
      transpose(to[1]);
    }
    for (int64_t k = 0; k < p.rank; k += 32) {
      Tile& to = out[w.columns / 32 + k / 32];
      const __m512 factor = _mm512_set1_ps(p.scaling);
      for (int r = 0; r < 16; ++r) {
        const float* b = p.B + (16 * strip + r) * p.rank + k;
        to.set(r, rounded(_mm512_mul_ps(factor, some(b, p.rank - k)),
                          _mm512_mul_ps(factor, some(b + 16, p.rank - k - 16))));
      }
      transpose(to);
    }
  }
}

// Panels of W: 32 columns each.
void decode_columns(const Product& p, int64_t panel, int64_t panels, Tile* out, int64_t across) {
  const Weight w = p.weight;
  for (int64_t done = 0; done < panels;) {
    const int64_t column = 32 * (panel + done),
                  count = column % 64 == 0 && done + 1 < panels ? 2 : 1;  // both halves of a block
    Tile* const to = out + 2 * done * across;
    for (int64_t i = 0; i < w.rows / 32; ++i)
      for (int q = 0; q < 16; ++q) {
        __m512i x[2][2];
        for (int odd = 0; odd < 2; ++odd) {
          const int64_t row = 32 * i + 2 * q + odd, at = row * w.columns + column;
          const __m512i values =
              values_of(w.levels, block_scale(w, at >> w.block_shift), w.gain == nullptr ? 1.0f : w.gain[row]);
          const uint8_t* codes = w.packed + at / 2;
          _mm_prefetch(reinterpret_cast<const char*>(codes + 8 * w.columns), _MM_HINT_T0);
          for (int64_t half = 0; half < count; ++half) x[half][odd] = decode(codes + 16 * half, values);
        }
        for (int64_t half = 0; half < count; ++half)
          interleave(x[half][0], x[half][1], to[2 * half * across + i], to[(2 * half + 1) * across + i], q);
      }
    for (int64_t k = 0; k < p.rank; k += 32)
      for (int64_t s = 0; s < 2 * count; ++s)
        pairs_of(to[s * across + w.rows / 32 + k / 32], p.down + k * w.columns + column + 16 * s, w.columns, p.rank - k,
                 16);
    done += count;
  }
}

// ---------------------------------------------------------------- products

struct alignas(64) Sums {
  Tile tile[2][2];
};

// Sums that wait for their gain and their rounding: rows `next` and on of 32, to y.
struct Pending {
  const Sums* sums;
  uint16_t* y;
  int64_t stride;
  __m512 gain[2];
  int next;
  void round() {
    const int r = next++;
    const Tile(&row)[2] = sums->tile[r / 16];
    _mm512_storeu_si512(y + r * stride, rounded(_mm512_mul_ps(gain[0], row[0].floats(r % 16)),
                                                _mm512_mul_ps(gain[1], row[1].floats(r % 16))));
  }
};

// The tiles a, 16 rows each of x, times those of a panel, onto the sums in the unit.
inline void multiply(const uint16_t* a, int64_t stride, int64_t apart, const Tile* b, int64_t across) {
  _tile_loadd(4, a, 2 * stride);
  _tile_loadd(6, b, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + across, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a + apart, 2 * stride);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

inline void clear() {
  asm volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store(Sums& sums) {
  asm volatile("" ::: "memory");
  _tile_stored(0, &sums.tile[0][0], 64);
  _tile_stored(1, &sums.tile[0][1], 64);
  _tile_stored(2, &sums.tile[1][0], 64);
  _tile_stored(3, &sums.tile[1][1], 64);
}

// 32 tokens times a panel; rounds what waits meanwhile.
void block(const Product& p, int64_t token, const Tile* panel, int64_t across, bool backwards, Sums& sums,
           Pending& before) {
  clear();
  const uint16_t* x = p.x + token * p.inner;
  const int64_t steps = p.inner / 32, ranks = ceil_div(p.rank, 32);
  int64_t i = backwards ? steps - 1 : 0;
  const int64_t step = backwards ? -1 : 1;
  for (int64_t n = 0; n < steps; ++n, i += step) {
    multiply(x + 32 * i, p.inner, 16 * p.inner, panel + i, across);
    if (before.next < 32) before.round();
    if (before.next < 32) before.round();
  }
  for (int64_t k = 0; k < ranks; ++k)
    multiply(p.left + token * 32 * ranks + 32 * k, 32 * ranks, 16 * 32 * ranks, panel + steps + k, across);
  while (before.next < 32) before.round();
  store(sums);
}

// Sums [0] of 16 rows, or of 32 [0] and [1], times a panel.
void product_of(const uint16_t* a, int64_t inner, bool both, const Tile* panel, int64_t across, Sums& sums) {
  clear();
  if (both) {
    for (int64_t i = 0; i < inner / 32; ++i) multiply(a + 32 * i, inner, 16 * inner, panel + i, across);
    return store(sums);
  }
  for (int64_t i = 0; i < inner / 32; i += 2) {  // two sums of each, since one would wait for itself
    _tile_loadd(4, a + 32 * i, 2 * inner);
    _tile_loadd(6, panel + i, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + i + across, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 32 * i + 32, 2 * inner);
    _tile_loadd(6, panel + i + 1, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, panel + i + across + 1, 64);
    _tile_dpbf16ps(3, 5, 7);
  }
  store(sums);
  for (int h = 0; h < 2; ++h)
    for (int r = 0; r < 16; ++r)
      sums.tile[0][h].set(r, _mm512_castps_si512(_mm512_add_ps(sums.tile[0][h].floats(r), sums.tile[1][h].floats(r))));
}

// 16 ranks of B from `rank` on, of 32 rows from `row` on: [rank][row] in two tiles.
void ranks_of(const Product& p, int64_t row, int64_t rank, Tile (&B)[2]) {
  for (int h = 0; h < 2; ++h) {
    for (int r = 0; r < 16; ++r)
      B[h].set(r, _mm512_castps_si512(some(p.B + (row + 16 * h + r) * p.rank + rank, p.rank - rank)));
    transpose(B[h]);
  }
}

// n of 32 rows of W, and its factors. n_j^2 = ||W_j||^2 + 2 s sum_k B_jk (P_jk + s / 2 sum_l B_jl gram_lk), P = W A^T:
// A is to the panel what more tokens are. W and A are rounded to bf16 here, as they are for y, whose rows that
// stretches by as much as it moves n: up to 1e-3 where A lies along a row and takes a quarter of it away, 1e-5 in
// training (SmolLM2, updates of up to a tenth of W). Where the sums cancel and it could be more, n is not exact.
bool norms(const Product& p, const Factors& to, int64_t panel, const Tile* tiles, int64_t across) {
  const int64_t strips = ceil_div(p.rank, 16), row = 32 * panel;
  const __m512 factor = _mm512_set1_ps(p.scaling);
  Sums sums;
  Tile B[2], other[2];
  __m512 rest[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t s = 0; s < strips; ++s) {
    if (s % 2 == 0) product_of(to.rows + 16 * s * p.inner, p.inner, s + 1 < strips, tiles, across, sums);
    ranks_of(p, row, 16 * s, B);
    __m512 update[2][16] = {};  // gram is symmetric: half of it, and half of its diagonal
    for (int64_t t = 0; t < s; ++t) {
      ranks_of(p, row, 16 * t, other);
      const float* gram = to.gram + 16 * (16 * s * strips + t);
      for (int h = 0; h < 2; ++h)
        for (int k = 0; k < 16; ++k)
          for (int l = 0; l < 16; ++l)
            update[h][k] = _mm512_fmadd_ps(_mm512_set1_ps(gram[16 * k * strips + l]), other[h].floats(l), update[h][k]);
    }
    const float* gram = to.gram + 16 * (16 * s * strips + s);
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k) {
        __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(0.5f * gram[16 * k * strips + k]), B[h].floats(k), update[h][k]);
        for (int l = 0; l < k; ++l)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(gram[16 * k * strips + l]), B[h].floats(l), sum);
        rest[h] = _mm512_fmadd_ps(B[h].floats(k), _mm512_fmadd_ps(factor, sum, sums.tile[s % 2][h].floats(k)), rest[h]);
      }
  }
  alignas(64) float added[32], n[32], safe[32], gain[32];
  _mm512_store_ps(added, rest[0]);
  _mm512_store_ps(added + 16, rest[1]);
  int cancelled = 0;
  for (int r = 0; r < 32; ++r) {
    const double own = double(to.base[row + r]) * to.base[row + r], squared = own + 2.0 * p.scaling * added[r];
    cancelled |= squared < 0.5 * own;
    n[r] = float(__builtin_sqrt(squared));
  }
  for (int r = 0; r < 32; ++r) fold(to.m[row + r], n[r], safe[r], gain[r]);
  memcpy(to.n + row, n, sizeof n);
  memcpy(to.safe + row, safe, sizeof safe);
  memcpy(to.gain + row, gain, sizeof gain);
  return cancelled == 0;
}

// 32 rows of up = diag(gain) s B.
void up_of(const Product& p, const Factors& to, int64_t panel) {
  for (int64_t j = 32 * panel; j < 32 * panel + 32; ++j)
    for (int64_t k = 0; k < p.rank; k += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(p.scaling), some(p.B + j * p.rank + k, p.rank - k));
      const __m512 folded = to.m == nullptr ? scaled : _mm512_mul_ps(scaled, _mm512_set1_ps(to.gain[j]));
      _mm256_mask_storeu_epi16(to.up + j * p.rank + k, __mmask16(first(p.rank - k)),
                               (__m256i)_mm512_cvtneps_pbh(folded));
    }
}

bool wide(const Product& p, const Factors* to, int64_t token, int64_t tokens, int64_t panel, int64_t panels,
          char* work) {
  const Unit<true> unit;
  Sums sums[2];
  const __m512 one = _mm512_set1_ps(1.0f);
  const float* const gain = p.transposed ? p.weight.gain : nullptr;
  Pending before{nullptr, nullptr, p.outer, {one, one}, 32};
  Tile* const tiles = reinterpret_cast<Tile*>(work);
  const int64_t across = p.inner / 32 + ceil_div(p.rank, 32), most = panels_of(p.inner, p.rank);
  bool turn = false, exact = true;
  for (int64_t done = 0; done < panels;) {
    const int64_t count = minimum(most, panels - done);
    (p.transposed ? decode_rows : decode_columns)(p, panel + done, count, tiles, across);
    for (int64_t c = 0; to != nullptr && c < count; ++c) {
      if (to->base != nullptr) exact &= norms(p, *to, panel + done + c, tiles + 2 * c * across, across);
      up_of(p, *to, panel + done + c);
    }
    for (int64_t part = token; part < token + tokens; part += kTokens) {
      const int64_t stop = minimum(part + kTokens, token + tokens), blocks = ceil_div(stop - part, kBlock);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t n = 0; n < blocks; ++n) {
          const int64_t t = part + kBlock * (c & 1 ? blocks - 1 - n : n),
                        start = minimum(t, p.tokens - kBlock);  // the last 32 tokens, some of them again
          const int64_t column = 32 * (panel + done + c);
          block(p, start, tiles + 2 * c * across, across, (t + column) / 32 & 1, sums[turn],
                before);  // the order of a sum is its own, whoever makes it
          before = {&sums[turn], p.y + start * p.outer + column, p.outer, {one, one}, int(t - start)};
          for (int h = 0; gain != nullptr && h < 2; ++h) before.gain[h] = _mm512_loadu_ps(gain + column + 16 * h);
          turn = !turn;
        }
    }
    done += count;
  }
  while (before.next < 32) before.round();
  return exact;
}

// 16 rows of A in bf16, from column 32 i on, as the unit takes them in A^T.
void columns_of(const float* A, int64_t inner, int64_t rank, int64_t strip, int64_t i, Tile& tile) {
  for (int r = 0; r < 16; ++r) {
    const float* a = A + (16 * strip + r) * inner + 32 * i;
    tile.set(r, 16 * strip + r < rank ? rounded(_mm512_loadu_ps(a), _mm512_loadu_ps(a + 16)) : _mm512_setzero_si512());
  }
  transpose(tile);
}

void factors(const Factors& to, int64_t inner, int64_t rank, int64_t strip) {
  const Unit<true> unit;
  const int64_t strips = ceil_div(rank, 16);
  uint16_t* const rows = to.rows + 16 * strip * inner;
  for (int64_t k = 16 * strip; k < 16 * strip + 16; ++k)
    for (int64_t i = 0; i < inner; i += 16) {
      const __m256i a = (__m256i)_mm512_cvtneps_pbh(some(to.A + k * inner + i, k < rank ? 16 : 0));
      if (k < rank) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.down + k * inner + i), a);
      if (to.base != nullptr) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.rows + k * inner + i), a);
    }
  Tile tile;
  for (int64_t t = 0; to.base != nullptr && t < strips; ++t) {
    _tile_zero(0);
    for (int64_t i = 0; i < inner / 32; ++i) {
      columns_of(to.A, inner, rank, t, i, tile);
      asm volatile("" ::: "memory");
      _tile_loadd(4, rows + 32 * i, 2 * inner);
      _tile_loadd(6, &tile, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, to.gram + 16 * (16 * strip * strips + t), 64 * strips);
  }
}

void widen(const uint16_t* u, int64_t rank, int64_t token, int64_t tokens, uint16_t* left) {
  const int64_t padded = 32 * ceil_div(rank, 32);
  for (int64_t t = token; t < token + tokens; ++t)
    for (int64_t k = 0; k < rank; k += 32)
      _mm512_storeu_si512(left + t * padded + k, _mm512_maskz_loadu_epi16(first(rank - k), u + t * rank + k));
}

void narrow(const uint16_t* x, const float* A, int64_t inner, int64_t rank, int64_t token, int64_t tokens, char* work,
            uint16_t* u, uint16_t* left) {
  const Unit<true> unit;
  const int64_t steps = inner / 32, strips = ceil_div(rank, 16);
  Tile* const tiles = reinterpret_cast<Tile*>(work);  // [strips][steps]
  Tile rest[2], sums[2];
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t i = 0; i < steps; ++i) columns_of(A, inner, rank, s, i, tiles[s * steps + i]);
  for (int64_t t = token; t < token + tokens; t += 32)
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t n = minimum(32, token + tokens - t);
      asm volatile("" ::: "memory");
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t i = 0; i < steps; ++i) {
        _tile_loadd(6, &tiles[s * steps + i], 64);
        if (n == 32) {
          _tile_loadd(4, x + t * inner + 32 * i, 2 * inner);
          _tile_loadd(5, x + (t + 16) * inner + 32 * i, 2 * inner);
        } else {
          for (int h = 0; h < 2; ++h) rows_of(rest[h], x + (t + 16 * h) * inner + 32 * i, inner, n - 16 * h, 32);
          asm volatile("" ::: "memory");
          _tile_loadd(4, &rest[0], 64);
          _tile_loadd(5, &rest[1], 64);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
      }
      _tile_stored(0, &sums[0], 64);
      _tile_stored(1, &sums[1], 64);
      for (int h = 0; h < 2; ++h)
        store_rows(sums[h], 1.0f, u + (t + 16 * h) * rank + 16 * s, rank, n - 16 * h, rank - 16 * s);
    }
  widen(u, rank, token, tokens, left);
}

}  // namespace

const MatrixProduct matrix_product = {room, narrow, widen, factors, wide};

}  // namespace qlora

QLORA_TILES_END
#else
namespace qlora {
const MatrixProduct matrix_product = {};
}
#endif
