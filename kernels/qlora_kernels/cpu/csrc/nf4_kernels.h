// The kernels of quantized weights once, over the vector primitives that the including file defines for its instruction
// set:
//
//   F16                           16 float32 lanes; F16::zero, load, store, broadcast, sum; add, mul,
//                                 madd(a, b, c) = a * b + c
//   load16(const T*) -> F16       16 values of float, BF16 or FP16
//   load_some(const T*, n)        n < 16 values and zeros
//   Table<T>(levels, scale, gain) the 16 decoded values of a block: round_to<T>((level * scale) * gain)
//   expand<stores>(table, bytes, n, out)
//                                 2n values from n bytes of codes; past the caches only where `out` begins a line
//   absmax_bits(in, n)            largest |x| of n values, as the bits of a float: NaN outranks infinity outranks
//                                 the rest
//   codes(cells, in, n, inverse, out)
//                                 (n + 1) / 2 bytes of codes of in[i] * inverse, clamped to [-1, 1]
//   nearest_level(cells, F16)     of values clamped likewise
//
// A block has one scale and a code has 16 values, so a block needs 16 multiplications and 16 roundings, whatever its
// size; the rest is a table lookup in registers, two bytes an element. The alternative, to look up the float level and
// then multiply, round and pack each element, does four times the work and needs care with bf16 subnormals, which
// vcvtneps2bf16 flushes.
//
// Everything here is in an anonymous namespace: each instruction set must keep its own copy.
#pragma once

namespace qlora {
namespace {

template <Stores kStores, class T>
inline void decode_bytes(const Table<T>& table, const uint8_t* bytes, int64_t n, T* out) {
  if (kStores == kPast && reinterpret_cast<uintptr_t>(out) % 64 != 0)
    expand<kPlain>(table, bytes, n, out);
  else
    expand<kStores>(table, bytes, n, out);
}

// Elements position..end, which lie in one block, with that block's table.
template <Stores kStores, class T>
inline void decode_part(const Table<T>& table, const uint8_t* packed, int64_t position, int64_t end, T* out) {
  if (position & 1) *out++ = table[packed[position++ >> 1] & 15];
  const int64_t bytes = (end - position) >> 1;
  decode_bytes<kStores>(table, packed + (position >> 1), bytes, out);
  if ((end - position) & 1) out[2 * bytes] = table[packed[end >> 1] >> 4];
}

template <Stores kStores = kPlain, class T>
void decode_as(const Weight& weight, int64_t start, int64_t stop, T* out) {
  const Weight w = weight;  // a copy, which the stores to `out` cannot change
  const int64_t size = int64_t(1) << w.block_shift;
  const bool in_scale = w.columns % size == 0;  // no block crosses rows: the gain goes into the scale
  for (int64_t position = start; position < stop;) {
    int64_t run = stop;  // elements with one gain
    float before = 1.0f, after = 1.0f;
    if (w.gain != nullptr) {
      const int64_t row = position / w.columns;
      if ((row + 1) * w.columns < run) run = (row + 1) * w.columns;
      (in_scale ? before : after) = w.gain[row];
    }
    for (int64_t block = position >> w.block_shift; position < run; ++block) {
      const int64_t end = (block + 1) << w.block_shift < run ? (block + 1) << w.block_shift : run;
      const Table<T> table(w.levels, block_scale(w, block) * before, after);
      if (end - position == 64 && !(position & 1))
        decode_bytes<kStores>(table, w.packed + (position >> 1), 32, out);  // the usual block, unrolled
      else
        decode_part<kStores>(table, w.packed, position, end, out);
      out += end - position;
      position = end;
    }
  }
}

template <class T>
void decode_to(const Weight& w, int64_t start, int64_t stop, Stores stores, void* out) {
  (stores == kPast      ? decode_as<kPast, T>
   : stores == kFetched ? decode_as<kFetched, T>
                        : decode_as<kPlain, T>)(w, start, stop, static_cast<T*>(out));
}

void decode(const Weight& w, int64_t start, int64_t stop, Dtype dtype, Stores stores, void* out) {
  if (dtype == kFloat32) decode_to<float>(w, start, stop, stores, out);
  if (dtype == kBFloat16) decode_to<BF16>(w, start, stop, stores, out);
  if (dtype == kFloat16) decode_to<FP16>(w, start, stop, stores, out);
}

template <class T>
void encode_as(const Cells& cells, const T* in, int64_t n, int64_t first, int64_t last, int32_t shift, uint8_t* packed,
               float* absmax) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block << shift, size = int64_t(1) << shift;
    const int64_t count = n - start < size ? n - start : size;
    const uint32_t bits = absmax_bits(in + start, count);
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    absmax[block] = largest;
    codes(cells, in + start, count, 1.0f / (largest > kTiny ? largest : kTiny), packed + (start >> 1));
  }
}

void encode(const Cells& cells, const void* in, Dtype dtype, int64_t n, int64_t first, int64_t last, int32_t shift,
            uint8_t* packed, float* absmax) {
  if (dtype == kFloat32) encode_as(cells, static_cast<const float*>(in), n, first, last, shift, packed, absmax);
  if (dtype == kBFloat16) encode_as(cells, static_cast<const BF16*>(in), n, first, last, shift, packed, absmax);
  if (dtype == kFloat16) encode_as(cells, static_cast<const FP16*>(in), n, first, last, shift, packed, absmax);
}

template <class T>
void encode_with_as(const Cells& cells, const T* in, int64_t n, int64_t first, int64_t last, int32_t shift,
                    const float* scales, uint8_t* packed) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block << shift, size = int64_t(1) << shift;
    const float inverse = __builtin_fabsf(scales[block]) > kTiny ? 1.0f / scales[block] : 0.0f;
    codes(cells, in + start, n - start < size ? n - start : size, inverse, packed + (start >> 1));
  }
}

void encode_with(const Cells& cells, const void* in, Dtype dtype, int64_t n, int64_t first, int64_t last, int32_t shift,
                 const float* scales, uint8_t* packed) {
  if (dtype == kFloat32) encode_with_as(cells, static_cast<const float*>(in), n, first, last, shift, scales, packed);
  if (dtype == kBFloat16) encode_with_as(cells, static_cast<const BF16*>(in), n, first, last, shift, scales, packed);
  if (dtype == kFloat16) encode_with_as(cells, static_cast<const FP16*>(in), n, first, last, shift, scales, packed);
}

// The scale of least squared error. Each candidate scale gives nearest levels l; for these levels the best scale is
// sum(w l) / sum(l l), and it leaves sum(w w) - sum(w l)^2 / sum(l l), so the candidate with the largest last term
// wins. Sums are of w / absmax, 16 lanes in order and no fused products: the same bits everywhere, as in the reference.
template <class T>
void fit_as(const Cells& cells, const T* in, int64_t n, int64_t first, int64_t last, int32_t shift, float* scales) {
  alignas(64) float values[4096];  // the largest block
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block << shift, size = int64_t(1) << shift;
    const int64_t count = n - start < size ? n - start : size;
    const uint32_t bits = absmax_bits(in + start, count);
    const float absmax = float_of(bits);
    scales[block] = absmax;
    if (bits == 0 || bits >= 0x7f800000) continue;  // zeros; NaN or infinity
    const F16 inverse = F16::broadcast(1.0f / (absmax > kTiny ? absmax : kTiny));
    for (int64_t i = 0; i < count; i += 16)
      mul(count - i < 16 ? load_some(in + start + i, count - i) : load16(in + start + i), inverse).store(values + i);
    float best = -1.0f;
    for (int candidate = kFitFirst - 1; candidate <= kFitLast; ++candidate) {
      const F16 stretch = F16::broadcast(32.0f / float(candidate < kFitFirst ? 32 : candidate));
      F16 product = F16::zero(), square = F16::zero();
      for (int64_t i = 0; i < count; i += 16) {
        const F16 w = F16::load(values + i), level = nearest_level(cells, mul(w, stretch));
        product = add(product, mul(w, level));
        square = add(square, mul(level, level));
      }
      const float wl = product.sum(), ll = square.sum();
      if (ll > 0.0f && wl * wl / ll > best) {
        best = wl * wl / ll;
        scales[block] = absmax * (wl / ll);
      }
    }
  }
}

void fit(const Cells& cells, const void* in, Dtype dtype, int64_t n, int64_t first, int64_t last, int32_t shift,
         float* scales) {
  if (dtype == kFloat32) fit_as(cells, static_cast<const float*>(in), n, first, last, shift, scales);
  if (dtype == kBFloat16) fit_as(cells, static_cast<const BF16*>(in), n, first, last, shift, scales);
  if (dtype == kFloat16) fit_as(cells, static_cast<const FP16*>(in), n, first, last, shift, scales);
}

// Each column is summed over the rows in order, product and sum rounded separately: the same bits on every instruction
// set. The sums stay in the cache and kDotRun rows are read side by side: streams that the processor can fetch ahead.
constexpr int kDotRun = 4;

template <int kRows, class T>
inline void dots_of_rows(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t columns, float* out) {
  int64_t c = 0;
  for (; c + 16 <= columns; c += 16) {
    F16 sum = F16::load(out + c);
    for (int t = 0; t < kRows; ++t) sum = add(sum, mul(load16(a + t * lda + c), load16(b + t * ldb + c)));
    sum.store(out + c);
  }
  for (; c < columns; ++c)
    for (int t = 0; t < kRows; ++t) out[c] += to_float(a[t * lda + c]) * to_float(b[t * ldb + c]);
}

template <class T>
void dots_as(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t rows, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = 0.0f;
  int64_t t = 0;
  for (; t + kDotRun <= rows; t += kDotRun) dots_of_rows<kDotRun>(a + t * lda, lda, b + t * ldb, ldb, columns, out);
  for (; t < rows; ++t) dots_of_rows<1>(a + t * lda, lda, b + t * ldb, ldb, columns, out);
}

void dots(Dtype dtype, const void* a, int64_t lda, const void* b, int64_t ldb, int64_t rows, int64_t columns,
          float* out) {
  if (dtype == kFloat32)
    dots_as(static_cast<const float*>(a), lda, static_cast<const float*>(b), ldb, rows, columns, out);
  if (dtype == kBFloat16)
    dots_as(static_cast<const BF16*>(a), lda, static_cast<const BF16*>(b), ldb, rows, columns, out);
  if (dtype == kFloat16)
    dots_as(static_cast<const FP16*>(a), lda, static_cast<const FP16*>(b), ldb, rows, columns, out);
}

// n_j = sqrt(||W_j||^2 + 2 s sum_k P_jk B_jk + s^2 sum_k (B gram)_jk B_jk) with P = W At and gram = A At; W is decoded
// a panel of kPanelRows x kDepth at a time and lives in L1 only. The rank is a multiple of 16 (padded with zeros); A
// comes as tiles [rank / 16, columns, 16], and kGroup tiles are multiplied per decoding of W. Where the three sums
// cancel (below 1e-3 of ||W_j||^2) they have lost their digits and the row is computed densely.
constexpr int64_t kDepth = 256, kGroup = 4;

inline void panel_product(const float* panel, int64_t depth, int64_t rows, const float* tile, float* product,
                          int64_t stride) {
  F16 sum[kPanelRows];
  for (int m = 0; m < kPanelRows; ++m) sum[m] = F16::zero();
  for (int64_t i = 0; i < depth; ++i) {
    const F16 a = F16::load(tile + 16 * i);
    for (int m = 0; m < kPanelRows; ++m) sum[m] = madd(F16::broadcast(panel[m * kDepth + i]), a, sum[m]);
  }
  for (int m = 0; m < rows; ++m) add(F16::load(product + m * stride), sum[m]).store(product + m * stride);
}

void gram(const float* A, const float* tiles, int64_t rank, int64_t columns, int64_t first, int64_t last, float* out) {
  alignas(64) float panel[kPanelRows * kDepth];
  for (int64_t i = 0; i < kPanelRows * kDepth; ++i) panel[i] = 0.0f;  // rows past the last are multiplied too
  for (int64_t i = first * rank; i < last * rank; ++i) out[i] = 0.0f;
  for (int64_t j0 = first; j0 < last; j0 += kPanelRows) {
    const int64_t rows = last - j0 < kPanelRows ? last - j0 : kPanelRows;
    for (int64_t i0 = 0; i0 < columns; i0 += kDepth) {
      const int64_t depth = columns - i0 < kDepth ? columns - i0 : kDepth;
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = 0; i < depth; ++i) panel[m * kDepth + i] = A[(j0 + m) * columns + i0 + i];
      for (int64_t k = 0; k < rank; k += 16)
        panel_product(panel, depth, rows, tiles + k * columns + 16 * i0, out + j0 * rank + k, rank);
    }
  }
}

inline double squares(const float* values, int64_t count) {
  F16 sum = F16::zero();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const F16 v = F16::load(values + i);
    sum = madd(v, v, sum);
  }
  double total = sum.sum();
  for (; i < count; ++i) total += values[i] * values[i];
  return total;
}

float dense_norm_squared(const Weight& w, const float* tiles, const float* b, int64_t rank, float scaling,
                         int64_t row) {
  float values[kDepth];
  double total = 0.0;
  for (int64_t i0 = 0; i0 < w.columns; i0 += kDepth) {
    const int64_t depth = w.columns - i0 < kDepth ? w.columns - i0 : kDepth;
    decode_as(w, row * w.columns + i0, row * w.columns + i0 + depth, values);
    for (int64_t k = 0; k < rank; k += 16) {
      const F16 part = F16::load(b + k);
      for (int64_t i = 0; i < depth; ++i)
        values[i] += scaling * mul(part, F16::load(tiles + k * w.columns + 16 * (i0 + i))).sum();
    }
    total += squares(values, depth);
  }
  return float(total);
}

void norms(const Weight& w, const float* tiles, const float* B, const float* gram, int64_t rank, float scaling,
           int64_t first, int64_t last, float* n) {
  alignas(64) float panel[kPanelRows * kDepth];
  alignas(64) float product[kNormRows * kGroup * 16];
  double own[kNormRows], cross[kNormRows];
  for (int64_t j = 0; j < last - first; ++j) own[j] = cross[j] = 0.0;
  for (int64_t i = 0; i < kPanelRows * kDepth; ++i) panel[i] = 0.0f;

  for (int64_t k0 = 0; k0 < rank; k0 += 16 * kGroup) {
    const int64_t group = (rank - k0) / 16 < kGroup ? (rank - k0) / 16 : kGroup;
    for (int64_t i = 0; i < kNormRows * kGroup * 16; ++i) product[i] = 0.0f;
    for (int64_t i0 = 0; i0 < w.columns; i0 += kDepth) {
      const int64_t depth = w.columns - i0 < kDepth ? w.columns - i0 : kDepth;
      for (int64_t j0 = first; j0 < last; j0 += kPanelRows) {
        const int64_t rows = last - j0 < kPanelRows ? last - j0 : kPanelRows;
        for (int64_t m = 0; m < rows; ++m) {
          const int64_t at = (j0 + m) * w.columns + i0;
          for (int64_t ahead = 0; ahead < kDepth; ahead += 128)  // the next panel's, which no prefetcher sees coming
            __builtin_prefetch(w.packed + (at + kPanelRows * w.columns + ahead) / 2);
          decode_as(w, at, at + depth, panel + m * kDepth);
          if (k0 == 0) own[j0 + m - first] += squares(panel + m * kDepth, depth);
        }
        for (int64_t g = 0; g < group; ++g)
          panel_product(panel, depth, rows, tiles + (k0 + 16 * g) * w.columns + 16 * i0,
                        product + ((j0 - first) * kGroup + g) * 16, kGroup * 16);
      }
    }
    for (int64_t j = first; j < last; ++j)
      for (int64_t g = 0; g < group; ++g)
        cross[j - first] +=
            mul(F16::load(product + ((j - first) * kGroup + g) * 16), F16::load(B + j * rank + k0 + 16 * g)).sum();
  }

  for (int64_t j = first; j < last; ++j) {
    const float* b = B + j * rank;
    double update = 0.0;
    for (int64_t k = 0; k < rank; k += 16) {
      F16 part = F16::zero();
      for (int64_t l = 0; l < rank; ++l) part = madd(F16::broadcast(b[l]), F16::load(gram + l * rank + k), part);
      update += mul(part, F16::load(b + k)).sum();
    }
    const double s = scaling;
    float squared = float(own[j - first] + 2.0 * s * cross[j - first] + s * s * update);
    if (squared < 1e-3f * float(own[j - first])) squared = dense_norm_squared(w, tiles, b, rank, scaling, j);
    n[j] = __builtin_sqrtf(squared);
  }
}

}  // namespace
}  // namespace qlora
