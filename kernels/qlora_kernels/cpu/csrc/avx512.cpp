// The primitives of nf4_kernels.h for AVX-512 (F, BW, DQ, VL: every processor with AVX-512 since 2017).
#include "kernels.h"
#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace qlora {
namespace {

constexpr int kPanelRows = 16;

struct F16 {
  __m512 v;
  static F16 zero() { return {_mm512_setzero_ps()}; }
  static F16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  float sum() const {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

struct F32 {
  F16 a, b;
};

inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 madd(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

inline __m512 widen(__m256i bits, BF16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 widen(__m256i bits, FP16) { return _mm512_cvtph_ps(bits); }

template <class T>
inline F16 load16(const T* p) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T())};
}
template <>
inline F16 load16<float>(const float* p) {
  return F16::load(p);
}

// The first n < 16 values, zeros behind them.
template <class T>
inline F16 load_some(const T* p, int64_t n) {
  return {widen(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p), T())};
}
template <>
inline F16 load_some<float>(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
}

inline __m512 clamped(__m512 x) { return _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(1.0f)), _mm512_set1_ps(-1.0f)); }

// The cell of a value in the low five bits, where the permutations look for it.
inline __m512i cell_of(__m512 x) {
  return _mm512_castps_si512(_mm512_fmadd_ps(x, _mm512_set1_ps(kCells), _mm512_set1_ps(kRounder)));
}

inline __m512 of_cell(const float* table, __m512i cell) {
  return _mm512_permutex2var_ps(_mm512_load_ps(table), cell, _mm512_load_ps(table + 16));
}

inline F16 nearest_level(const Cells& cells, F16 f) {
  const __m512 x = clamped(f.v);
  const __m512i cell = cell_of(x);
  const __mmask16 above = _mm512_cmp_ps_mask(x, of_cell(cells.threshold, cell), _CMP_GT_OQ);
  return {_mm512_mask_mov_ps(of_cell(cells.level, cell), above, of_cell(cells.next, cell))};
}

inline __m512 scaled_levels(const float* levels, float scale, float gain) {
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale)), _mm512_set1_ps(gain));
}

inline __m256i rounded(__m512 x, FP16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline __m256i rounded(__m512 x, BF16) {  // by integers: the instruction for it takes subnormals for zero
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
}

// For elementwise.h.
inline F16 fused(F16 a, F16 b, F16 c) { return madd(a, b, c); }
inline F16 maximum(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 minimum(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 exponent(F16 x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))}; }

template <class T>
inline F32 load32(const T* p) {
  return {load16(p), load16(p + 16)};
}
template <>
inline F32 load32(const BF16* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)))}};
}

// The upper half is x rounded to bf16. It adds 0x7fff and the last bit that stays, by taking away the complement; NaN
// becomes 0x7fc0.
inline __m512i rounded_above(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i less = _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1),
                                                 _mm512_set1_epi32(-0x8000), 0xae);  // ~a & b | c
  return _mm512_mask_sub_epi32(_mm512_set1_epi32(0x7fc00000), _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), bits, less);
}

template <class T>
inline F16 round16(F16 x) {
  return {widen(rounded(x.v, T()), T())};
}
template <>
inline F16 round16<float>(F16 x) {
  return x;
}
template <>
inline F16 round16<BF16>(F16 x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(rounded_above(x.v), _mm512_set1_epi32(-0x10000)))};
}

template <class T>
inline void store16(T* p, F16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(x.v, T()));
}
template <>
inline void store16<float>(float* p, F16 x) {
  x.store(p);
}

template <class T>
inline F32 store32(T* p, F32 x) {
  store16(p, x.a);
  store16(p + 16, x.b);
  return {round16<T>(x.a), round16<T>(x.b)};
}
template <>
inline F32 store32(BF16* p, F32 x) {
  const __m512i above = _mm512_set1_epi32(-0x10000), even = rounded_above(x.a.v), odd = rounded_above(x.b.v);
  _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, above, 0xd8));  // c ? b : a
  return {{_mm512_castsi512_ps(_mm512_and_si512(even, above))}, {_mm512_castsi512_ps(_mm512_and_si512(odd, above))}};
}

template <class T>
inline F32 in_order(F32 x) {
  return x;
}
template <>
inline F32 in_order<BF16>(F32 x) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {{_mm512_permutex2var_ps(x.a.v, first, x.b.v)}, {_mm512_permutex2var_ps(x.a.v, second, x.b.v)}};
}

// Rounded, in words, two times.
inline __m512i twice(__m512 x, FP16) { return _mm512_broadcast_i64x4(rounded(x, FP16())); }
inline __m512i twice(__m512 x, BF16) {
  alignas(64) static constexpr uint16_t upper[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(upper), rounded_above(x));
}

template <class T>
struct Table {
  __m512i values;  // the 16 values twice, so that bit 4 of an index does not matter
  Table(const float* levels, float scale, float gain) : values(twice(scaled_levels(levels, scale, gain), T())) {}
  T operator[](int code) const {
    alignas(64) T all[32];
    _mm512_store_si512(all, values);
    return all[code];
  }
};

template <>
struct Table<float> {
  __m512 values;
  Table(const float* levels, float scale, float gain) : values(scaled_levels(levels, scale, gain)) {}
  float operator[](int code) const {
    alignas(64) float all[16];
    _mm512_store_ps(all, values);
    return all[code];
  }
};

// Byte i / kTimes at place i: each byte kTimes in a row.
template <int kTimes>
struct Repeat {
  alignas(64) uint8_t byte[64];
  constexpr Repeat() : byte() {
    for (int i = 0; i < 64; ++i) byte[i] = uint8_t(i / kTimes);
  }
};
template <int kTimes>
inline __m512i repeated(__m512i lanes) {  // of 64 / kTimes bytes that every lane holds
  static constexpr Repeat<kTimes> order;
  return _mm512_shuffle_epi8(lanes, _mm512_load_si512(order.byte));
}

// 16 bytes -> 32 values. A byte goes into two words (of 8 bytes: into two floats), and is shifted in the first: of what
// else there is above a code the permutation takes no notice.
inline __m512i expand32(__m128i bytes, __m512i values) {
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(repeated<4>(_mm512_broadcast_i32x4(bytes)), _mm512_set1_epi32(4)),
                                  values);
}

template <Stores kStores>
inline void put(void* out, __m512i values) {
  if (kStores == kFetched) _mm_prefetch(static_cast<char*>(out) + kAhead, _MM_HINT_T1);
  kStores == kPast ? _mm512_stream_si512(static_cast<__m512i*>(out), values) : _mm512_storeu_si512(out, values);
}

template <Stores kStores, class T>
inline void expand(const Table<T>& table, const uint8_t* bytes, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    put<kStores>(out + 2 * i, expand32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i)), table.values));
  if (i < n) {
    const __mmask16 some = __mmask16((1u << (n - i)) - 1);
    const __m512i rest = expand32(_mm_maskz_loadu_epi8(some, bytes + i), table.values);
    _mm512_mask_storeu_epi32(out + 2 * i, some, rest);
  }
}

inline __m512 expand16(__m128i bytes, __m512 values) {  // 8 bytes -> 16 values
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(repeated<8>(_mm512_broadcastq_epi64(bytes)), _mm512_set1_epi64(4)),
                               values);
}

template <Stores kStores>
inline void expand(const Table<float>& table, const uint8_t* bytes, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    put<kStores>(out + 2 * i, _mm512_castps_si512(expand16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i)),
                                                           table.values)));
  if (i < n) {
    const __mmask8 some = __mmask8((1u << (n - i)) - 1);
    const __m512 rest = expand16(_mm_maskz_loadu_epi8(some, bytes + i), table.values);
    _mm512_mask_storeu_epi64(out + 2 * i, some, _mm512_castps_si512(rest));
  }
}

template <class T>
inline uint32_t absmax_bits(const T* in, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(load16(in + i).v), magnitude));
  if (i < n)
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(load_some(in + i, n - i).v), magnitude));
  return _mm512_reduce_max_epu32(largest);
}

inline __m128i eight_bytes(const Cells& cells, __m512 x) {  // 16 scaled values -> 8 bytes of codes
  x = clamped(x);
  const __m512i cell = cell_of(x);
  const __m512i code =
      _mm512_permutex2var_epi32(_mm512_load_si512(cells.code), cell, _mm512_load_si512(cells.code + 16));
  const __mmask16 above = _mm512_cmp_ps_mask(x, of_cell(cells.threshold, cell), _CMP_GT_OQ);
  const __m512i exact = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
  return _mm512_cvtepi64_epi8(_mm512_or_si512(_mm512_slli_epi64(exact, 4), _mm512_srli_epi64(exact, 32)));
}

template <class T>
inline void codes(const Cells& cells, const T* in, int64_t n, float inverse, uint8_t* out) {
  const __m512 scale = _mm512_set1_ps(inverse);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i / 2),
                     eight_bytes(cells, _mm512_mul_ps(load16(in + i).v, scale)));
  if (i < n) {  // the zeros behind the last value take the code of 0, which is what the pad nibble must be
    const __m128i rest = eight_bytes(cells, _mm512_mul_ps(load_some(in + i, n - i).v, scale));
    _mm_mask_storeu_epi8(out + i / 2, __mmask16((1u << ((n - i + 1) / 2)) - 1), rest);
  }
}

// For nf4_gemm.h.
constexpr int kTileRows = 14, kTileVectors = 2;
constexpr int64_t kPanelBytes = 3 << 18;

inline void transpose16(const float* in, int64_t stride, float* out, int64_t out_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * stride);
  for (int i = 0; i < 16; i += 2) {  // pairs of rows: columns 0 and 1 of each four, then 2 and 3
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)  // four rows: one column of each four
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm512_shuffle_ps(b[i + k], b[i + 2 + k], 0x44);
      a[i + 2 * k + 1] = _mm512_shuffle_ps(b[i + k], b[i + 2 + k], 0xee);
    }
  for (int k = 0; k < 4; ++k) {  // quarters: column k of each four, of rows 0 to 15
    const __m512 low = _mm512_shuffle_f32x4(a[k], a[4 + k], 0x88), high = _mm512_shuffle_f32x4(a[k], a[4 + k], 0xdd),
                 more = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0x88),
                 most = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0xdd);
    _mm512_storeu_ps(out + k * out_stride, _mm512_shuffle_f32x4(low, more, 0x88));
    _mm512_storeu_ps(out + (4 + k) * out_stride, _mm512_shuffle_f32x4(high, most, 0x88));
    _mm512_storeu_ps(out + (8 + k) * out_stride, _mm512_shuffle_f32x4(low, more, 0xdd));
    _mm512_storeu_ps(out + (12 + k) * out_stride, _mm512_shuffle_f32x4(high, most, 0xdd));
  }
}

// For nf4_gemm_integers.h.
struct I16 {
  __m512i v;
  static I16 zero() { return {_mm512_setzero_si512()}; }
  static I16 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I16 load(const int32_t* p) { return {_mm512_load_si512(p)}; }
  void store(int32_t* p) const { _mm512_store_si512(p, v); }
};

inline F16 to_float(I16 x) { return {_mm512_cvtepi32_ps(x.v)}; }

// Inline: compilers copy the sum of the intrinsic, and spill.
inline void dot(I16& sum, const I16& a, const I16& b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v)); }

struct Largest {
  __m512i bits = _mm512_setzero_si512();
  void see(F16 x) {
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)));
  }
  float value() const { return float_of(_mm512_reduce_max_epu32(bits)); }
};

inline __m512i integers_of(F16 x) { return _mm512_cvtps_epi32(x.v); }

inline void store_words(int16_t* out, F16 x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(integers_of(x)));
}

inline void store_pairs(int32_t* out, F16 a, F16 b) {
  _mm512_store_si512(out, _mm512_mask_blend_epi16(0xaaaaaaaa, integers_of(a), _mm512_slli_epi32(integers_of(b), 16)));
}

struct Words {
  __m512i values;  // twice
  Words(const float* levels, float factor)
      : values(_mm512_broadcast_i64x4(
            _mm512_cvtepi32_epi16(integers_of(mul(F16::load(levels), F16::broadcast(factor)))))) {}
};

template <class T>
inline __m512i decode_words(const T& words, const uint8_t* bytes) {
  return expand32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), words.values);
}

inline void expand_words(const Words& words, const uint8_t* bytes, int16_t* out) {
  _mm512_store_si512(out, decode_words(words, bytes));
}

template <class T>  // Words, or a table of bf16
inline void expand_pairs(const T& words, const uint8_t* bytes, const T& more, const uint8_t* more_bytes, int32_t* out) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kFirst), high = _mm512_add_epi16(low, _mm512_set1_epi16(16)),
                a = decode_words(words, bytes), b = decode_words(more, more_bytes);
  _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
  _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(a, high, b));
}

// For nf4_gemm_bf16.h. Inline assembly: this file needs no more than AVX-512 where these are not called, and of the
// intrinsic's sum compilers make copies.
inline void dot_bf16(F16& sum, const I16& a, const I16& b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
}

inline I16 round_words(F16 a, F16 b) {
  I16 words;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words.v) : "v"(a.v), "v"(b.v));
  return words;
}

inline I16 load_words(const BF16* p) { return {_mm512_loadu_si512(p)}; }
inline void store_words(BF16* p, I16 words) { _mm512_storeu_si512(p, words.v); }

inline I16 pair_words(I16 words) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), words.v)};
}

inline void pair_rows(I16 a, I16 b, I16& lower, I16& upper) {  // columns 0 to 3 of each eight, then 4 to 7
  lower = {_mm512_unpacklo_epi16(a.v, b.v)};
  upper = {_mm512_unpackhi_epi16(a.v, b.v)};
}

inline F32 in_columns(F16 lower, F16 upper) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {{_mm512_permutex2var_ps(lower.v, first, upper.v)}, {_mm512_permutex2var_ps(lower.v, second, upper.v)}};
}

}  // namespace
}  // namespace qlora

#include "nf4_kernels.h"
#include "elementwise.h"
#include "nf4_gemm.h"
#include "attention_float.h"
#include "nf4_gemm_integers.h"
#include "dense_gemm.h"
#include "dense_gemm_integers.h"
#include "nf4_gemm_bf16.h"

namespace qlora {
const Kernels avx512_kernels = {"AVX-512", QLORA_KERNELS(QLORA_ENTRY)};
const Attention avx512_attention = {{attend, attend_backward}, {attend_bytes, attend_backward_bytes}, kTileRows};
const Layer avx512_layer = kFloatLayer, avx512_vnni_layer = kIntegerLayer;
const Layer avx512_bf16_layer = {kTileRows, kWidth,    true,      bf16_room, bf16_narrow,
                                 nullptr,   bf16_wide, bf16_sums, nullptr,   nullptr};
}  // namespace qlora
#endif
