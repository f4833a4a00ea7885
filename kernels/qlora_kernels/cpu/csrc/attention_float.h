// Causal attention in float32 over the primitives that nf4_gemm.h has for an instruction set, forward and backward, for
// each example and head (arXiv:2205.14135), by its tiles of kTileRows x kWidth:
//
//   forward    S = Q K^T    P = softmax(scale S)    O = P V            rows: queries, `depth` keys at a time
//   backward   S^T = K Q^T  dP^T = V dO^T  dS = P (dP - rowsum(dO O))  rows: keys
//              dV = P^T dO  dK = scale dS^T Q  dQ^T = scale K^T dS^T
//
// Backward the scores of kMacroKeys x kMacroQueries exist at a time. Transposed, a row of them is the left factor of dV
// and dK, whose sums over all these queries stay in registers; a panel of kWidth queries is the right factor of dQ^T.
// The keys of a group are packed once for the heads that share them, and only what crosses the diagonal has scores for
// nothing: of a tile 16 columns at a time, of a sum's depth nothing. One thread takes a part: sums are always in the
// same order. The alternative, torch's kernel of the same algorithm, multiplies blocks of the triangle's other half,
// and expands the keys of a group.
#pragma once
#include "attention.h"

namespace qlora {
namespace {

constexpr int64_t kMacroQueries = 256, kMacroKeys = (kMacroQueries / kTileRows + 1) * kTileRows;
static_assert(kMacroQueries % kWidth == 0 && kMacroKeys <= kDepthMost && kMacroQueries <= kDepthMost);

inline int64_t up_to(int64_t n, int64_t unit) { return pieces_of(n, unit) * unit; }

// out [columns, filled] = x^T of x [rows, columns], zeros behind the rows.
inline void transposed(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t filled, float* out,
                       int64_t out_stride) {
  for (int64_t r = 0; r < filled; r += 16)
    for (int64_t c = 0; c < columns; c += 16) {
      if (r + 16 <= rows && c + 16 <= columns) {
        transpose16(x + r * stride + c, stride, out + c * out_stride + r, out_stride);
        continue;
      }
      for (int64_t k = c; k < least(c + 16, columns); ++k)
        for (int64_t i = r; i < least(r + 16, filled); ++i)
          out[k * out_stride + i] = i < rows ? x[i * stride + k] : 0.0f;
    }
}

// x [rows, columns] as panels [columns / kWidth][rows][kWidth], zeros behind the columns.
inline void panels_of(const float* x, int64_t stride, int64_t rows, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += 16) {
    float* to = out + c / kWidth * kWidth * rows + c % kWidth;
    for (int64_t t = 0; t < rows; ++t, to += kWidth) {
      const float* const from = x + t * stride + c;
      if (c + 16 <= columns)
        F16::load(from).store(to);
      else
        for (int64_t i = 0; i < 16; ++i) to[i] = c + i < columns ? from[i] : 0.0f;
    }
  }
  for (int64_t c = up_to(columns, 16); c < up_to(columns, kWidth); ++c)
    for (int64_t t = 0; t < rows; ++t) out[c / kWidth * kWidth * rows + t * kWidth + c % kWidth] = 0.0f;
}

// out = factor x of some rows, or += that.
template <bool kAdds = false>
inline void store_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, float factor, float* out,
                       int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, from += stride, out += out_stride) {
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16) {
      const F16 scaled = mul(F16::load(from + c), F16::broadcast(factor));
      (kAdds ? add(F16::load(out + c), scaled) : scaled).store(out + c);
    }
    for (; c < columns; ++c) out[c] = kAdds ? out[c] + from[c] * factor : from[c] * factor;
  }
}

inline float largest_of(F16 x) {
  float all[16], largest;
  x.store(all);
  largest = all[0];
  for (int i = 1; i < 16; ++i) largest = all[i] > largest ? all[i] : largest;
  return largest;
}

// A tile of scores, of which columns `first` to `stop` are looked at: where all of these lie in one half, that half.
inline void scores_of(const float* rows, const float* panel, int64_t D, int64_t first, int64_t stop, float* out) {
  if (kTileVectors == 1 || (first < 16 && stop > 16))
    multiply<kTileVectors>(rows, panel, D, nullptr, 0, out, kStride);
  else if (first < 16)
    multiply<1, kWidth>(rows, panel, D, nullptr, 0, out, kStride);
  else
    multiply<1, kWidth>(rows, panel + 16, D, nullptr, 0, out + 16, kStride);
}

// A row of scores becomes e^(scale s - top), top the largest so far: of `visible` keys, zeros up to `depth`. Their sum.
inline float exponentials(float* x, int64_t visible, int64_t depth, float scale, float& top) {
  const int64_t end = up_to(visible, 16), stop = up_to(depth, 16);
  const F16 factor = F16::broadcast(scale);
  for (int64_t k = visible; k < end; ++k) x[k] = x[0];
  F16 largest = F16::broadcast(top), sum = F16::zero();
  for (int64_t k = 0; k < end; k += 16) largest = maximum(mul(F16::load(x + k), factor), largest);
  top = largest_of(largest);
  const F16 less = F16::broadcast(-top), low = F16::broadcast(kLow);
  for (int64_t k = 0; k < end; k += 16) exponential(maximum(low, madd(F16::load(x + k), factor, less))).store(x + k);
  for (int64_t k = visible; k < end; ++k) x[k] = 0.0f;
  for (int64_t k = 0; k < end; k += 16) sum = add(sum, F16::load(x + k));
  for (int64_t k = end; k < stop; k += 16) F16::zero().store(x + k);
  return sum.sum();
}

int64_t attend_bytes(int64_t tokens, int64_t D) {
  const int64_t keys = up_to(tokens, kWidth), width = up_to(D, kWidth);
  return int64_t(sizeof(float)) * up_to(keys * D + keys * width + kTileRows * (2 * kStride + width), 16);
}

void attend(const Heads* views, float* lse, const AttentionShape& s, const AttentionPart& part, void* work) {
  const Heads q = views[0], k = views[1], v = views[2], out = views[3];
  const int64_t from = part.from, n = part.n, group = part.group, keys = up_to(n, kWidth), width = up_to(s.D, kWidth),
                shared = s.heads / s.groups;
  float *const factors = static_cast<float*>(work), *const values = factors + keys * s.D,
               *const rows = values + n * width, *const scores = rows + kTileRows * kStride,
               *const sums = scores + kTileRows * kStride;
  for (int64_t t = 0; t < n; t += kWidth)
    transposed(k.floats(from + t, group), k.token, least(kWidth, n - t), s.D, kWidth, factors + t * s.D, kWidth);
  panels_of(v.floats(from, group), v.token, n, s.D, values);
  for (int64_t h = group * shared; h < (group + 1) * shared; ++h)
    for (int64_t t = part.part * kTileRows; t < n; t += part.parts * kTileRows) {
      const int64_t count = least(kTileRows, n - t), seen = t + count;
      float top[kTileRows], total[kTileRows];
      for (int r = 0; r < kTileRows; ++r) top[r] = -3e38f, total[r] = 0.0f;
      copy_rows(q.floats(from + t, h), q.token, count, s.D, rows);
      for (int64_t first = 0; first < seen; first += kDepthMost) {
        const int64_t depth = least(kDepthMost, seen - first);
        for (int64_t p = 0; p < depth; p += kWidth)
          scores_of(rows, factors + (first + p) * s.D, s.D, 0, depth - p, scores + p);
        for (int64_t r = 0; r < kTileRows; ++r) {
          const int64_t visible = most(0, least(depth, t + r + 1 - first));
          const float before = top[r], sum = exponentials(scores + r * kStride, visible, depth, s.scale, top[r]);
          const float rest = first == 0 ? 0.0f : __builtin_expf(before - top[r]);
          total[r] = total[r] * rest + sum;
          if (first > 0) store_rows(sums + r * width, width, 1, width, rest, sums + r * width, width);
        }
        for (int64_t d = 0; d < width; d += kWidth)
          multiply<kTileVectors>(scores, values + d * n + first * kWidth, depth, first == 0 ? nullptr : sums + d, width,
                                 sums + d, width);
      }
      for (int64_t r = 0; r < count; ++r) {
        store_rows(sums + r * width, width, 1, s.D, 1.0f / total[r], out.floats(from + t + r, h), out.token);
        lse[h * s.tokens + from + t + r] = top[r] + __builtin_logf(total[r]);
      }
    }
}

// ---------------------------------------------------------------- backward

// What a piece of the backward pass works in. Panels and rows as `multiply` takes them.
struct AttentionWork {
  float *queries, *gradient;                   // right factors of S^T, dP^T: [kMacroQueries / kWidth][D][kWidth]
  float *queries_p, *gradient_p;               // of dK, dV: panels of [kMacroQueries, D]
  float *keys_t, *slopes;                      // factors of dQ^T: [D][keys], [kMacroQueries / kWidth][keys][kWidth]
  float *key_rows, *value_rows, *p, *ds;       // kTileRows rows
  float *sum_q, *sum_k, *sum_v, *top, *delta;  // sum_q: [kMacroQueries / kWidth][D][kWidth]
  int64_t places;

  AttentionWork(float* at, int64_t tokens, int64_t D) : places(0) {
    const auto take = [&](int64_t count) {
      float* const taken = at + places;
      places += up_to(count, 16);
      return taken;
    };
    const int64_t width = up_to(D, kWidth), height = up_to(D, kTileRows), keys = up_to(tokens, kTileRows);
    queries = take(kMacroQueries * D), gradient = take(kMacroQueries * D);
    queries_p = take(kMacroQueries * width), gradient_p = take(kMacroQueries * width);
    keys_t = take(height * kStride), slopes = take(kMacroQueries * kMacroKeys);
    key_rows = take(kTileRows * kStride), value_rows = take(kTileRows * kStride);
    p = take(kTileRows * kStride), ds = take(kTileRows * kStride);
    sum_q = take(kMacroQueries * height), sum_k = take(keys * width), sum_v = take(keys * width);
    top = take(kMacroQueries), delta = take(kMacroQueries);
  }
};

int64_t attend_backward_bytes(int64_t tokens, int64_t D) {
  return int64_t(sizeof(float)) * AttentionWork(nullptr, tokens, D).places;
}

// The rows of a tile of keys from `key` on: scores and dP of the queries from `first` to `count` become P and dS, these
// also in `slopes`. Keys and queries count from the beginnings of their macros, which lie `ahead` apart.
inline void slopes_of(const AttentionWork& w, float scale, int64_t key, int64_t ahead, int64_t first, int64_t count) {
  alignas(64) static constexpr float kMask[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                  1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const F16 factor = F16::broadcast(scale), low = F16::broadcast(kLow);
  for (int64_t r = 0; r < kTileRows; ++r) {
    const int64_t sees = key + r - ahead;  // the first query that sees this key
    for (int64_t i = first; i < count; i += 16) {
      float *const p = w.p + r * kStride + i, *const ds = w.ds + r * kStride + i,
                   *const slopes = w.slopes + i / kWidth * kWidth * kMacroKeys + (key + r) * kWidth + i % kWidth;
      if (i + 16 <= sees) {
        F16::zero().store(p);
        F16::zero().store(ds);
        F16::zero().store(slopes);
        continue;
      }
      const F16 x = madd(F16::load(p), factor, negative(F16::load(w.top + i)));
      F16 e = exponential(maximum(low, minimum(F16::zero(), x)));
      if (i < sees) e = mul(e, F16::load(kMask + 16 - least(16, sees - i)));
      const F16 g = mul(e, add(F16::load(ds), negative(F16::load(w.delta + i))));
      e.store(p);
      g.store(ds);
      g.store(slopes);
    }
  }
}

void attend_backward(const Heads* views, float* lse, const AttentionShape& s, const AttentionPart& part, void* work) {
  const Heads dout = views[0], q = views[1], k = views[2], v = views[3], out = views[4], dq = views[5], dk = views[6],
              dv = views[7];
  const int64_t from = part.from, n = part.n, group = part.group, width = up_to(s.D, kWidth),
                height = up_to(s.D, kTileRows), shared = s.heads / s.groups,
                head = group * shared + shared * part.part / part.parts,
                end = group * shared + shared * (part.part + 1) / part.parts;
  const AttentionWork w(static_cast<float*>(work), n, s.D);
  const int64_t sums = up_to(n, kTileRows) * width;
  for (int64_t h = head; h < end; ++h) {
    for (int64_t i = 0; i < sums; ++i) w.sum_k[i] = w.sum_v[i] = 0.0f;
    for (int64_t q0 = 0; q0 < n; q0 += kMacroQueries) {
      const int64_t count = least(kMacroQueries, n - q0), at = from + q0;
      for (int64_t t = 0; t < count; t += kWidth) {
        const int64_t some = least(kWidth, count - t);
        transposed(q.floats(at + t, h), q.token, some, s.D, kWidth, w.queries + t * s.D, kWidth);
        transposed(dout.floats(at + t, h), dout.token, some, s.D, kWidth, w.gradient + t * s.D, kWidth);
      }
      panels_of(q.floats(at, h), q.token, count, s.D, w.queries_p);
      panels_of(dout.floats(at, h), dout.token, count, s.D, w.gradient_p);
      for (int64_t t = 0; t < up_to(count, kWidth); ++t) {
        const float *const a = dout.floats(at + t, h), *const b = out.floats(at + t, h);
        w.top[t] = t < count ? lse[h * s.tokens + at + t] : 0.0f;
        F16 sum = F16::zero();
        int64_t d = 0;
        for (; t < count && d + 16 <= s.D; d += 16) sum = madd(F16::load(a + d), F16::load(b + d), sum);
        w.delta[t] = sum.sum();
        for (; t < count && d < s.D; ++d) w.delta[t] += a[d] * b[d];
      }
      for (int64_t k0 = 0; k0 < q0 + count; k0 += kMacroKeys) {
        const int64_t keys = least(kMacroKeys, q0 + count - k0), ahead = q0 - k0;
        transposed(k.floats(from + k0, group), k.token, keys, s.D, keys, w.keys_t, kStride);
        for (int64_t j = 0; j < keys; j += kTileRows) {
          // Before query `sees` none sees a key of this tile.
          const int64_t some = least(kTileRows, keys - j), sees = most(0, j - ahead), first = sees / kWidth * kWidth;
          copy_rows(k.floats(from + k0 + j, group), k.token, some, s.D, w.key_rows);
          copy_rows(v.floats(from + k0 + j, group), v.token, some, s.D, w.value_rows);
          for (int64_t i = first; i < count; i += kWidth) {
            scores_of(w.key_rows, w.queries + i * s.D, s.D, sees - i, kWidth, w.p + i);
            scores_of(w.value_rows, w.gradient + i * s.D, s.D, sees - i, kWidth, w.ds + i);
          }
          slopes_of(w, s.scale, j, ahead, first, up_to(count, kWidth));
          for (int64_t d = 0; d < width; d += kWidth) {
            float *const to_v = w.sum_v + (k0 + j) * width + d, *const to_k = w.sum_k + (k0 + j) * width + d;
            const int64_t panel = d * count + sees * kWidth;
            multiply<kTileVectors>(w.p + sees, w.gradient_p + panel, count - sees, to_v, width, to_v, width);
            multiply<kTileVectors>(w.ds + sees, w.queries_p + panel, count - sees, to_k, width, to_k, width);
          }
        }
        for (int64_t t = 0; t < count; t += kWidth) {
          const int64_t seen = least(keys, ahead + t + kWidth);  // by the last query of the panel
          for (int64_t d = 0; seen > 0 && d < height; d += kTileRows) {
            float* const to = w.sum_q + t * height + d * kWidth;
            multiply<kTileVectors>(w.keys_t + d * kStride, w.slopes + t * kMacroKeys, seen, k0 == 0 ? nullptr : to,
                                   kWidth, to, kWidth);
          }
        }
      }
      for (int64_t t = 0; t < count; t += kWidth) {
        const int64_t some = least(kWidth, count - t);
        transposed(w.sum_q + t * height, kWidth, s.D, some, s.D, w.slopes, width);
        store_rows(w.slopes, width, some, s.D, s.scale, dq.floats(at + t, h), dq.token);
      }
    }
    const bool apart = part.parts > 1;
    const int64_t place = apart ? h : group;
    const auto put = apart || h == head ? store_rows<false> : store_rows<true>;
    put(w.sum_k, width, n, s.D, s.scale, dk.floats(from, place), dk.token);
    put(w.sum_v, width, n, s.D, 1.0f, dv.floats(from, place), dv.token);
  }
}

}  // namespace
}  // namespace qlora
