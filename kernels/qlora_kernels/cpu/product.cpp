// The large product of an adapted layer on the processor's matrix unit (AMX), which decodes the NF4 weight as it goes:
//
//   forward   y  = x W'^T + u up^T      u = x down^T               W' = diag(gain) W
//   backward  dx = dy W'  + v down
//
// A thread decodes a few panels of 32 columns of y (of W'^T, or of W'), straight into the tiles that the unit takes, and multiplies all tokens
// with them while they lie in the second cache. An adapter's factor is one more tile of each panel, so that its product costs no pass over y and is
// not rounded by itself. Sums of 32 x 32 stay in the unit from the first column to the last; they are rounded while the next ones are made, since what
// the unit has just written is slow to read. Every second sum runs backwards: what it shares with the one before is then still in the first cache.
// The alternative, a dense weight for the library's product and the adapter's before it, writes and reads the weight twice and y once more.
#include "tiles.h"

#include "product.h"

#if defined(QLORA_TILES)
namespace qlora {
namespace {

constexpr int64_t kBlock = kProductBlock, kTokens = 256;  // tokens that are multiplied with all panels before the next: their x stays in the cache

int64_t room(int64_t inner, int64_t rank) {
  const int64_t panel = 2 * (inner / 32 + ceil_div(rank, 32)), down = inner / 32 * ceil_div(rank, 16);
  const int64_t bytes = int64_t(sizeof(Tile)) * (panel > down ? panel : down);
  return bytes > kProductPanels ? bytes : kProductPanels;
}

// ---------------------------------------------------------------- decoding

// The 16 values of a block's codes in bf16, twice.
inline __m512i values_of(float scale, float gain) {
  const __m512 values = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(tables.levels), _mm512_set1_ps(scale)), _mm512_set1_ps(gain));
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values));
}

inline __m512i decode(const uint8_t* codes, __m512i values) {  // 16 bytes -> 32 values
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16)), values);
}

inline float gain_of(const Weight& w, int64_t row) { return w.gain == nullptr ? 1.0f : w.gain[row]; }

// Panels of W^T: 32 rows of W each, two tiles high [2][inner / 32 + ..].
void decode_rows(const Product& p, int64_t panel, int64_t panels, Tile* out, int64_t across) {
  const Weight w = p.weight;
  for (int64_t strip = 2 * panel; strip < 2 * (panel + panels); ++strip, out += across) {
    const int64_t first = 16 * strip * w.columns;
    for (int64_t b = 0; b < w.columns / 64; ++b) {
      Tile* to = out + 2 * b;
      int64_t at = first + 64 * b;
      for (int r = 0; r < 16; ++r, at += w.columns) {
        const uint8_t* codes = w.packed + at / 2;
        const __m512i values = values_of(block_scale(w, at >> w.block_shift), gain_of(w, 16 * strip + r));
        _mm_prefetch(reinterpret_cast<const char*>(codes + 8 * w.columns), _MM_HINT_T0);
        to[0].set(r, decode(codes, values));
        to[1].set(r, decode(codes + 16, values));
      }
      transpose(to[0]);
      transpose(to[1]);
    }
    for (int64_t k = 0; k < p.rank; k += 32) {
      Tile& to = out[w.columns / 32 + k / 32];
      rows_of(to, p.right + 16 * strip * p.rank + k, p.rank, 16, p.rank - k);
      transpose(to);
    }
  }
}

// Panels of W: 32 columns each.
void decode_columns(const Product& p, int64_t panel, int64_t panels, Tile* out, int64_t across) {
  const Weight w = p.weight;
  for (int64_t done = 0; done < panels;) {
    const int64_t column = 32 * (panel + done), count = column % 64 == 0 && done + 1 < panels ? 2 : 1;  // both halves of a block
    Tile* const to = out + 2 * done * across;
    for (int64_t i = 0; i < w.rows / 32; ++i)
      for (int q = 0; q < 16; ++q) {
        __m512i x[2][2];
        for (int odd = 0; odd < 2; ++odd) {
          const int64_t row = 32 * i + 2 * q + odd, at = row * w.columns + column;
          const __m512i values = values_of(block_scale(w, at >> w.block_shift), gain_of(w, row));
          const uint8_t* codes = w.packed + at / 2;
          _mm_prefetch(reinterpret_cast<const char*>(codes + 8 * w.columns), _MM_HINT_T0);
          for (int64_t half = 0; half < count; ++half) x[half][odd] = decode(codes + 16 * half, values);
        }
        for (int64_t half = 0; half < count; ++half) interleave(x[half][0], x[half][1], to[2 * half * across + i], to[(2 * half + 1) * across + i], q);
      }
    for (int64_t k = 0; k < p.rank; k += 32)
      for (int64_t s = 0; s < 2 * count; ++s) pairs_of(to[s * across + w.rows / 32 + k / 32], p.right + k * w.columns + column + 16 * s, w.columns, p.rank - k, 16);
    done += count;
  }
}

// ---------------------------------------------------------------- products

struct alignas(64) Sums {
  Tile tile[2][2];
};

// Sums that wait for their rounding: rows `skip` and on of 32, to y.
struct Pending {
  const Sums* sums;
  uint16_t* y;
  int64_t stride;
  int next;
  void round() {
    const int r = next++;
    const Tile(&row)[2] = sums->tile[r / 16];
    _mm512_storeu_si512(y + r * stride, rounded(row[0].floats(r % 16), row[1].floats(r % 16)));
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

// 32 tokens times a panel; rounds what waits meanwhile.
void block(const Product& p, int64_t token, const Tile* panel, int64_t across, bool backwards, Sums& sums, Pending& before) {
  asm volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint16_t* x = p.x + token * p.inner;
  const int64_t steps = p.inner / 32, ranks = ceil_div(p.rank, 32);
  int64_t i = backwards ? steps - 1 : 0;
  const int64_t step = backwards ? -1 : 1;
  for (int64_t n = 0; n < steps; ++n, i += step) {
    multiply(x + 32 * i, p.inner, 16 * p.inner, panel + i, across);
    if (before.next < 32) before.round();
    if (before.next < 32) before.round();
  }
  for (int64_t k = 0; k < ranks; ++k) multiply(p.left + token * 32 * ranks + 32 * k, 32 * ranks, 16 * 32 * ranks, panel + steps + k, across);
  while (before.next < 32) before.round();
  asm volatile("" ::: "memory");
  _tile_stored(0, &sums.tile[0][0], 64);
  _tile_stored(1, &sums.tile[0][1], 64);
  _tile_stored(2, &sums.tile[1][0], 64);
  _tile_stored(3, &sums.tile[1][1], 64);
}

void wide(const Product& p, int64_t token, int64_t tokens, int64_t panel, int64_t panels, char* work) {
  const Unit<true> unit;
  Sums sums[2];
  Pending before{nullptr, nullptr, p.outer, 32};
  Tile* const tiles = reinterpret_cast<Tile*>(work);
  const int64_t across = p.inner / 32 + ceil_div(p.rank, 32), fit = kProductPanels / (2 * across * int64_t(sizeof(Tile))), most = fit > 1 ? fit : 1;
  bool turn = false;
  for (int64_t done = 0; done < panels;) {
    const int64_t count = minimum(most, panels - done);
    (p.transposed ? decode_rows : decode_columns)(p, panel + done, count, tiles, across);
    for (int64_t part = token; part < token + tokens; part += kTokens) {
      const int64_t stop = minimum(part + kTokens, token + tokens), blocks = ceil_div(stop - part, kBlock);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t n = 0; n < blocks; ++n) {
          const int64_t t = part + kBlock * (c & 1 ? blocks - 1 - n : n), start = minimum(t, p.tokens - kBlock);  // the last 32 tokens, some of them again
          block(p, start, tiles + 2 * c * across, across, turn, sums[turn], before);
          before = {&sums[turn], p.y + start * p.outer + 32 * (panel + done + c), p.outer, int(t - start)};
          turn = !turn;
        }
    }
    done += count;
  }
  while (before.next < 32) before.round();
}

void widen(const uint16_t* u, int64_t rank, int64_t token, int64_t tokens, uint16_t* left) {
  const int64_t padded = 32 * ceil_div(rank, 32);
  for (int64_t t = token; t < token + tokens; ++t)
    for (int64_t k = 0; k < rank; k += 32) _mm512_storeu_si512(left + t * padded + k, _mm512_maskz_loadu_epi16(first(rank - k), u + t * rank + k));
}

void narrow(const uint16_t* x, const uint16_t* down, int64_t inner, int64_t rank, int64_t token, int64_t tokens, char* work, uint16_t* u, uint16_t* left) {
  const Unit<true> unit;
  const int64_t steps = inner / 32, strips = ceil_div(rank, 16);
  Tile* const tiles = reinterpret_cast<Tile*>(work);  // [strips][steps]
  Tile rest[2], sums[2];
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t i = 0; i < steps; ++i) {
      rows_of(tiles[s * steps + i], down + 16 * s * inner + 32 * i, inner, rank - 16 * s, 32);
      transpose(tiles[s * steps + i]);
    }
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
      for (int h = 0; h < 2; ++h) store_rows(sums[h], 1.0f, u + (t + 16 * h) * rank + 16 * s, rank, n - 16 * h, rank - 16 * s);
    }
  widen(u, rank, token, tokens, left);
}

}  // namespace

const MatrixProduct matrix_product = {room, narrow, widen, wide};

}  // namespace qlora

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace qlora {
const MatrixProduct matrix_product = {};
}
#endif
