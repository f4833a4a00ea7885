// Causal attention in bf16 on the processor's matrix unit (AMX), or by the dot products of AVX512-BF16, forward and
// backward, for each example and head (arXiv:2205.14135):
//
//   forward    S = Q K^T    P = softmax(scale S)    O = P V
//   backward   dP = dO V^T  dS = P (dP - rowsum(dO O))  dQ = scale dS K  dK = scale dS^T Q  dV = P^T dO
//
// All operands are arrays of tiles, see amx.h. Scores are computed transposed, [keys, queries]: a lane is a query, so
// maxima, sums and constants of queries are plain vectors, and rounded rows of C are A (for dK, dV) or, interleaved, B
// (for O and dQ, which come out transposed too) without another pass over them. One thread takes a part of an example:
// sums are always in the same order. The alternative, torch's kernel of the same algorithm, rounds dK and dV of every
// head, and its backward pass is several times slower (docs/benchmarks.md).
#include "amx.h"

#include "attention.h"

#if defined(QLORA_TILES)
namespace qlora {
namespace {

constexpr int64_t kMacro =
    8;  // blocks of 32 queries and of 32 keys whose probabilities exist at a time in the backward pass
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// ---------------------------------------------------------------- element by element

// 2^x: 2^n p(r) with |r| <= 1/2, p of degree 6 (Taylor's, relative error 1e-7).
inline __m512 power_of_two(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  constexpr float kTerms[] = {1.333355815e-3f, 9.618129108e-3f, 5.550410866e-2f,
                              2.402265070e-1f, 6.931471806e-1f, 1.0f};
  __m512 p = _mm512_set1_ps(1.540353039e-4f);
  for (const float term : kTerms) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
  return _mm512_scalef_ps(p, n);
}

// Which of 16 queries from `query` on may see `key`, both counted within one block of 32.
inline __mmask16 visible(int key, int query) {
  return key <= query ? 0xffff : key >= query + 16 ? 0 : __mmask16(0xffff << (key - query));
}

// ---------------------------------------------------------------- packing

// The forms in which the products take x [n, D], tokens past n as zeros. Not inlined: each packs many tiles a call, and
// inlined they double the time to compile this file.
//
// A [2 blocks][D / 32] or, transposed, B in the same order:
__attribute__((noinline)) void pack_rows(Grid out, int64_t blocks, const BF16* x, int64_t stride, int64_t n, int64_t D,
                                         bool transposed) {
  for (int64_t t = 0; t < 2 * blocks; ++t)
    for (int64_t d = 0; d < out.across; ++d) {
      rows_of(out(t, d), x + 16 * t * stride + 32 * d, stride, n - 16 * t, D - 32 * d);
      if (transposed) transpose(out(t, d));
    }
}

// B [D / 16][blocks] or, transposed, A in the same order:
__attribute__((noinline)) void pack_pairs(Grid out, int64_t blocks, const BF16* x, int64_t stride, int64_t n, int64_t D,
                                          bool transposed) {
  for (int64_t d = 0; d < 2 * ceil_div(D, 32); ++d)
    for (int64_t t = 0; t < blocks; ++t) {
      pairs_of(out(d, t), x + 32 * t * stride + 16 * d, stride, n - 32 * t, D - 16 * d);
      if (transposed) transpose(out(d, t));
    }
}

// ---------------------------------------------------------------- one example, one group of heads

int64_t forward_bytes(int64_t tokens, int64_t D) {
  const int64_t blocks = ceil_div(tokens, 32), columns = ceil_div(D, 32);
  return int64_t(sizeof(Tile)) * (4 * blocks * columns + 6 * blocks + 6 * columns);
}

template <bool kAmx>
void forward(const Heads* views, float* lse, const AttentionShape& s, const AttentionPart& part, void* work) {
  const Heads q = views[0], k = views[1], v = views[2], out = views[3];
  const int64_t from = part.from, n = part.n, group = part.group;
  const int64_t blocks = ceil_div(n, 32), D = ceil_div(s.D, 32), shared = s.heads / s.groups;
  Memory memory{static_cast<Tile*>(work)};
  const Grid keys = memory.take(2 * blocks, D), values = memory.take(2 * D, blocks);  // A of S, O
  const Grid queries = memory.take(2, D), p = memory.take(2, blocks);                 // B of S, O
  const Grid scores = memory.take(2 * blocks, 2), o = memory.take(2 * D, 2);          // C: S, O transposed
  pack_rows(keys, blocks, k.at(from, group), k.token, n, s.D, false);
  pack_pairs(values, blocks, v.at(from, group), v.token, n, s.D, true);
  const Unit<kAmx> unit;
  const __m512 c = _mm512_set1_ps(s.scale * kLog2e);
  for (int64_t h = group * shared; h < (group + 1) * shared; ++h)
    for (int64_t block = part.part; block < blocks; block += part.parts) {
      const int64_t at = from + 32 * block, rest = n - 32 * block;
      pack_rows(queries, 1, q.at(at, h), q.token, rest, s.D, true);
      __m512 largest[2], sum[2];
      for (int x = 0; x < 2; ++x) largest[x] = _mm512_set1_ps(-INFINITY), sum[x] = _mm512_setzero_ps();
      for (int64_t b = 0; b <= block; ++b) {
        multiply<kAmx>(keys.from(2 * b, 0), queries, D, scores.from(2 * b, 0), false);
        for (int r = 0; r < 32; ++r)
          for (int x = 0; x < 2; ++x) {
            const __m512 score = _mm512_mul_ps(scores(2 * b + r / 16, x).floats(r % 16), c);
            largest[x] = _mm512_mask_max_ps(largest[x], b < block ? 0xffff : visible(r, 16 * x), largest[x], score);
          }
      }
      for (int64_t b = 0; b <= block; ++b)
        for (int r = 0; r < 32; r += 2)
          for (int x = 0; x < 2; ++x) {
            __m512 e[2];
            for (int y = 0; y < 2; ++y) {
              e[y] = power_of_two(_mm512_fmsub_ps(scores(2 * b + r / 16, x).floats(r % 16 + y), c, largest[x]));
              if (b == block) e[y] = _mm512_maskz_mov_ps(visible(r + y, 16 * x), e[y]);
              sum[x] = _mm512_add_ps(sum[x], e[y]);
            }
            p(x, b).set(r / 2, interleaved(rounded(e[0], e[1])));
          }
      for (int64_t d = 0; d < 2 * D; d += 2) multiply<kAmx>(values.from(d, 0), p, block + 1, o.from(d, 0), false);
      for (int x = 0; x < 2; ++x) {
        alignas(64) float total[16], top[16];
        _mm512_store_ps(total, sum[x]), _mm512_store_ps(top, largest[x]);
        for (int64_t t = 0; t < 16 && t < rest - 16 * x; ++t)
          lse[h * s.tokens + at + 16 * x + t] = kLn2 * (top[t] + log2f(total[t]));
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[x]);
        for (int64_t d = 0; d < 2 * D; ++d) {
          Tile& tile = o(d, x);
          for (int r = 0; r < 16; ++r) _mm512_store_ps(tile.row[r], _mm512_mul_ps(tile.floats(r), inverse));
          transpose(tile);
          store_rows(tile, 1.0f, out.at(at + 16 * x, h) + 16 * d, out.token, rest - 16 * x, s.D - 16 * d);
        }
      }
    }
}

inline float dot(const BF16* a, const BF16* b, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = __mmask16(first(n - i));
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a + i)),
                  y = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + i));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)),
                          sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// C = before, or 0, + a factor times another.
inline void add_tile(Tile& all, const Tile& more, float factor, bool before) {
  for (int r = 0; r < 16; ++r) {
    const __m512 scaled = _mm512_mul_ps(more.floats(r), _mm512_set1_ps(factor));
    _mm512_store_ps(all.row[r], before ? _mm512_add_ps(all.floats(r), scaled) : scaled);
  }
}

int64_t backward_bytes(int64_t tokens, int64_t D) {
  const int64_t blocks = ceil_div(tokens, 32), columns = ceil_div(D, 32);
  return int64_t(sizeof(Tile)) * (22 * blocks * columns + 12 * kMacro * columns + 6 * kMacro * kMacro + 8);
}

template <bool kAmx>
void backward(const Heads* views, float* lse, const AttentionShape& s, const AttentionPart& part, void* work) {
  const Heads dout = views[0], q = views[1], k = views[2], v = views[3], out = views[4], dq = views[5], dk = views[6],
              dv = views[7];
  const int64_t from = part.from, n = part.n, group = part.group, blocks = ceil_div(n, 32), D = ceil_div(s.D, 32),
                shared = s.heads / s.groups, head = group * shared + shared * part.part / part.parts,
                end = group * shared + shared * (part.part + 1) / part.parts;
  Memory memory{static_cast<Tile*>(work)};
  const Grid keys = memory.take(2 * blocks, D), values = memory.take(2 * blocks, D),
             keys_t = memory.take(2 * D, blocks);                                              // A of S, dP, dQ
  const Grid sum_k = memory.take(2 * blocks, 2 * D), sum_v = memory.take(2 * blocks, 2 * D);   // C: dK, dV of a head
  const Grid all_k = memory.take(2 * blocks, 2 * D), all_v = memory.take(2 * blocks, 2 * D);   // of all
  const Grid queries = memory.take(2 * kMacro, D), gradient = memory.take(2 * kMacro, D);      // B of S, dP
  const Grid queries_p = memory.take(2 * D, kMacro), gradient_p = memory.take(2 * D, kMacro);  // B of dK, dV
  const Grid p = memory.take(2 * kMacro, kMacro), ds = memory.take(2 * kMacro, kMacro),
             ds_p = memory.take(2 * kMacro, kMacro);  // A of dV, dK; B of dQ
  const Grid score = memory.take(2, 2), slope = memory.take(2, 2),
             sum_q = memory.take(2 * D, 2 * kMacro);  // C: S, dP, dQ transposed
  pack_rows(keys, blocks, k.at(from, group), k.token, n, s.D, false);
  pack_rows(values, blocks, v.at(from, group), v.token, n, s.D, false);
  pack_pairs(keys_t, blocks, k.at(from, group), k.token, n, s.D, true);
  const Unit<kAmx> unit;
  const __m512 c = _mm512_set1_ps(s.scale * kLog2e);
  for (int64_t h = head; h < end; ++h) {
    for (int64_t q0 = 0; q0 < blocks; q0 += kMacro) {
      const int64_t count = minimum(kMacro, blocks - q0), at = from + 32 * q0, rest = n - 32 * q0;
      pack_rows(queries, count, q.at(at, h), q.token, rest, s.D, true);
      pack_rows(gradient, count, dout.at(at, h), dout.token, rest, s.D, true);
      pack_pairs(queries_p, count, q.at(at, h), q.token, rest, s.D, false);
      pack_pairs(gradient_p, count, dout.at(at, h), dout.token, rest, s.D, false);
      alignas(64) float top[32 * kMacro], delta[32 * kMacro];
      for (int64_t t = 0; t < 32 * count; ++t) {
        top[t] =
            t < rest ? kLog2e * lse[h * s.tokens + at + t] : 1e30f;  // no probability for a query that is not there
        delta[t] = t < rest ? dot(dout.at(at + t, h), out.at(at + t, h), s.D) : 0.0f;
      }
      for (int64_t k0 = 0; k0 <= q0; k0 += kMacro) {
        // Query block i sees the key blocks up to `last`: all of these, or on the diagonal those up to its own.
        const auto last = [&](int64_t i) { return k0 < q0 ? kMacro - 1 : i; };
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j <= last(i); ++j) {
            multiply<kAmx>(keys.from(2 * (k0 + j), 0), queries.from(2 * i, 0), D, score, false);
            multiply<kAmx>(values.from(2 * (k0 + j), 0), gradient.from(2 * i, 0), D, slope, false);
            for (int r = 0; r < 32; r += 2) {
              __m512 e[2][2], g[2][2];  // [key][half of the queries]: P, dS / scale
              for (int y = 0; y < 2; ++y)
                for (int x = 0; x < 2; ++x) {
                  const int64_t query = 32 * i + 16 * x;
                  e[y][x] = power_of_two(
                      _mm512_fmsub_ps(score(r / 16, x).floats(r % 16 + y), c, _mm512_load_ps(top + query)));
                  if (k0 + j == q0 + i) e[y][x] = _mm512_maskz_mov_ps(visible(r + y, 16 * x), e[y][x]);
                  g[y][x] = _mm512_mul_ps(
                      e[y][x], _mm512_sub_ps(slope(r / 16, x).floats(r % 16 + y), _mm512_load_ps(delta + query)));
                }
              for (int y = 0; y < 2; ++y) {
                p(2 * j + r / 16, i).set(r % 16 + y, rounded(e[y][0], e[y][1]));
                ds(2 * j + r / 16, i).set(r % 16 + y, rounded(g[y][0], g[y][1]));
              }
              for (int x = 0; x < 2; ++x) ds_p(2 * i + x, j).set(r / 2, interleaved(rounded(g[0][x], g[1][x])));
            }
          }
        for (int64_t j = 0; j <= last(count - 1); ++j) {
          const int64_t i = k0 < q0 ? 0 : j;  // the first query block that sees it
          const bool more = k0 < q0;
          for (int64_t d = 0; d < 2 * D; d += 2) {
            multiply<kAmx>(p.from(2 * j, i), gradient_p.from(d, i), count - i, sum_v.from(2 * (k0 + j), d), more);
            multiply<kAmx>(ds.from(2 * j, i), queries_p.from(d, i), count - i, sum_k.from(2 * (k0 + j), d), more);
          }
        }
        for (int64_t i = 0; i < count; ++i)
          for (int64_t d = 0; d < 2 * D; d += 2)
            multiply<kAmx>(keys_t.from(d, k0), ds_p.from(2 * i, 0), last(i) + 1, sum_q.from(d, 2 * i), k0 > 0);
      }
      for (int64_t d = 0; d < 2 * D; ++d)
        for (int64_t t = 0; t < 2 * count; ++t) {
          transpose(sum_q(d, t));
          store_rows(sum_q(d, t), s.scale, dq.at(at + 16 * t, h) + 16 * d, dq.token, rest - 16 * t, s.D - 16 * d);
        }
    }
    for (int64_t t = 0; t < 2 * blocks; ++t)
      for (int64_t d = 0; d < 2 * D; ++d) {
        const int64_t at = from + 16 * t, rows = n - 16 * t, columns = s.D - 16 * d;
        if (part.parts > 1) {
          store_rows(sum_k(t, d), s.scale, dk.floats(at, h) + 16 * d, dk.token, rows, columns);
          store_rows(sum_v(t, d), 1.0f, dv.floats(at, h) + 16 * d, dv.token, rows, columns);
        } else {
          add_tile(all_k(t, d), sum_k(t, d), s.scale, h > head);
          add_tile(all_v(t, d), sum_v(t, d), 1.0f, h > head);
        }
      }
  }
  for (int64_t t = 0; part.parts == 1 && t < 2 * blocks; ++t)
    for (int64_t d = 0; d < 2 * D; ++d) {
      store_rows(all_k(t, d), 1.0f, dk.at(from + 16 * t, group) + 16 * d, dk.token, n - 16 * t, s.D - 16 * d);
      store_rows(all_v(t, d), 1.0f, dv.at(from + 16 * t, group) + 16 * d, dv.token, n - 16 * t, s.D - 16 * d);
    }
}

}  // namespace

const Attention matrix_attention = {{forward<true>, backward<true>}, {forward_bytes, backward_bytes}, 32};
const Attention dot_attention = {{forward<false>, backward<false>}, {forward_bytes, backward_bytes}, 32};

}  // namespace qlora

QLORA_TILES_END
#else
namespace qlora {
const Attention matrix_attention = {}, dot_attention = {};
}
#endif
