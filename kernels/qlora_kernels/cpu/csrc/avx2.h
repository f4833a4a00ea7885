// The primitives of nf4_kernels.h for AVX2 with FMA and F16C. With QLORA_AVX_VNNI defined, products of integers are of
// AVX-VNNI: VPDPWSSD is VPMADDWD and VPADDD in one, so that the bits are the same.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#include "types.h"

namespace qlora {
namespace {

constexpr int kPanelRows = 6;

struct F16 {
  __m256 low, high;
  static F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  float sum() const {
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

struct F32 {
  F16 a, b;
};

inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F16 madd(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const BF16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}
inline __m256 load8(const FP16* p) { return _mm256_cvtph_ps(load128(p)); }

template <class T>
inline F16 load16(const T* p) {
  return {load8(p), load8(p + 8)};
}

template <class T>
inline F16 load_some(const T* p, int64_t n) {
  T all[16] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load16(all);
}

inline __m256 clamped(__m256 x) { return _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(1.0f)), _mm256_set1_ps(-1.0f)); }

inline __m256i cell_of(__m256 x) {
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(kCells), _mm256_set1_ps(kRounder));
  return _mm256_and_si256(_mm256_castps_si256(shifted), _mm256_set1_epi32(31));
}

inline __m256 nearest_level(const Cells& cells, __m256 x) {
  x = clamped(x);
  const __m256i cell = cell_of(x);
  const __m256 above = _mm256_cmp_ps(x, _mm256_i32gather_ps(cells.threshold, cell, 4), _CMP_GT_OQ);
  return _mm256_blendv_ps(_mm256_i32gather_ps(cells.level, cell, 4), _mm256_i32gather_ps(cells.next, cell, 4), above);
}

inline F16 nearest_level(const Cells& cells, F16 x) {
  return {nearest_level(cells, x.low), nearest_level(cells, x.high)};
}

inline void scaled_levels(const float* levels, float scale, float gain, __m256& low, __m256& high) {
  const __m256 s = _mm256_set1_ps(scale), g = _mm256_set1_ps(gain);
  low = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(levels), s), g);
  high = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(levels + 8), s), g);
}

inline __m128i rounded(__m256 x, FP16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

inline __m128i rounded(__m256 x, BF16) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

// For elementwise.h.
inline F16 fused(F16 a, F16 b, F16 c) { return madd(a, b, c); }
inline F16 maximum(F16 a, F16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F16 minimum(F16 a, F16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

inline __m256 exponent(__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
inline F16 exponent(F16 x) { return {exponent(x.low), exponent(x.high)}; }

template <class T>
inline F32 load32(const T* p) {
  return {load16(p), load16(p + 16)};
}
template <>
inline F32 load32(const BF16* p) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  const __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1),
                above = _mm256_set1_epi32(-0x10000);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(low, above)), _mm256_castsi256_ps(_mm256_and_si256(high, above))}};
}

inline __m256 round8(__m256 x, FP16) { return _mm256_cvtph_ps(rounded(x, FP16())); }
inline __m256 round8(__m256 x, BF16) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_and_si256(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd),
                                     _mm256_set1_epi32(-0x10000));
  return _mm256_blendv_ps(_mm256_castsi256_ps(r), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                          _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

template <class T>
inline F16 round16(F16 x) {
  return {round8(x.low, T()), round8(x.high, T())};
}
template <>
inline F16 round16<float>(F16 x) {
  return x;
}

template <class T>
inline void store16(T* p, F16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded(x.low, T()));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), rounded(x.high, T()));
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
  const F16 a = round16<BF16>(x.a), b = round16<BF16>(x.b);
  __m256i* to = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(to,
                      _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(a.low), 16), _mm256_castps_si256(b.low)));
  _mm256_storeu_si256(to + 1,
                      _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(a.high), 16), _mm256_castps_si256(b.high)));
  return {a, b};
}

inline F16 zipped(__m256 even, __m256 odd) {
  const __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  return {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
}
template <class T>
inline F32 in_order(F32 x) {
  return x;
}
template <>
inline F32 in_order<BF16>(F32 x) {
  return {zipped(x.a.low, x.b.low), zipped(x.a.high, x.b.high)};
}

template <class T>
struct Table {  // 16-bit values, their low and high bytes apart, as pshufb wants them
  __m256i low_bytes, high_bytes;
  Table(const float* levels, float scale, float gain) {
    __m256 a, b;
    scaled_levels(levels, scale, gain, a, b);
    const __m128i first = rounded(a, T()), second = rounded(b, T()), byte = _mm_set1_epi16(0xff);
    low_bytes = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
    high_bytes = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
  }
  T operator[](int code) const {
    alignas(32) uint8_t low[32], high[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), low_bytes);
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), high_bytes);
    return T{uint16_t(low[code] | high[code] << 8)};
  }
};

template <>
struct Table<float> {
  __m256 low, high;
  Table(const float* levels, float scale, float gain) { scaled_levels(levels, scale, gain, low, high); }
  float operator[](int code) const {
    alignas(32) float values[16];
    _mm256_store_ps(values, low);
    _mm256_store_ps(values + 8, high);
    return values[code];
  }
};

template <Stores kStores>
inline void put(void* out, __m256i values) {
  if (kStores == kFetched) _mm_prefetch(static_cast<char*>(out) + kAhead, _MM_HINT_T1);
  kStores == kPast ? _mm256_stream_si256(static_cast<__m256i*>(out), values)
                   : _mm256_storeu_si256(static_cast<__m256i*>(out), values);
}

template <Stores kStores, class T>
inline void expand(const Table<T>& table, const uint8_t* bytes, int64_t n, T* out) {
  const __m256i nibble = _mm256_set1_epi8(15);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    // Bytes 0-7 in the low half, 8-15 in the high half, each byte followed by itself shifted: codes in element order.
    const __m128i b = load128(bytes + i);
    const __m256i wide = _mm256_cvtepu8_epi16(b);
    const __m256i code =
        _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8)), nibble);
    const __m256i low = _mm256_shuffle_epi8(table.low_bytes, code), high = _mm256_shuffle_epi8(table.high_bytes, code);
    const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
    put<kStores>(out + 2 * i, _mm256_permute2x128_si256(even, odd, 0x20));
    put<kStores>(out + 2 * i + 16, _mm256_permute2x128_si256(even, odd, 0x31));
  }
  for (; i < n; ++i) {
    out[2 * i] = table[bytes[i] >> 4];
    out[2 * i + 1] = table[bytes[i] & 15];
  }
}

template <Stores kStores>
inline void expand(const Table<float>& table, const uint8_t* bytes, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    uint32_t four;
    __builtin_memcpy(&four, bytes + i, 4);
    const __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(int(four)));
    const __m256i code =
        _mm256_or_si256(_mm256_srli_epi64(wide, 4), _mm256_slli_epi64(wide, 32));  // 3 low bits count below
    const __m256 low = _mm256_permutevar8x32_ps(table.low, code), high = _mm256_permutevar8x32_ps(table.high, code);
    put<kStores>(out + 2 * i,
                 _mm256_castps_si256(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)))));
  }
  for (; i < n; ++i) {
    out[2 * i] = table[bytes[i] >> 4];
    out[2 * i + 1] = table[bytes[i] & 15];
  }
}

template <class T>
inline uint32_t absmax_bits(const T* in, int64_t n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(load8(in + i)), magnitude));
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  uint32_t result = 0;
  for (int k = 0; k < 8; ++k) result = lanes[k] > result ? lanes[k] : result;
  for (; i < n; ++i) {
    const uint32_t bits = bits_of(to_float(in[i])) & 0x7fffffff;
    result = bits > result ? bits : result;
  }
  return result;
}

template <class T>
inline void codes(const Cells& cells, const T* in, int64_t n, float inverse, uint8_t* out) {
  const __m256 scale = _mm256_set1_ps(inverse);
  const __m256i collect = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 8, -1, -1,
                                           -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  for (int64_t i = 0; i < n; i += 8) {
    __m256 x;
    if (n - i >= 8) {
      x = load8(in + i);
    } else {
      T rest[8] = {};  // zeros take the code of 0, which is what the pad nibble must be
      for (int64_t k = 0; k < n - i; ++k) rest[k] = in[i + k];
      x = load8(rest);
    }
    x = clamped(_mm256_mul_ps(x, scale));
    const __m256i cell = cell_of(x);
    const __m256 threshold = _mm256_i32gather_ps(cells.threshold, cell, 4);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ));  // -1 where true
    const __m256i code = _mm256_sub_epi32(_mm256_i32gather_epi32(cells.code, cell, 4), above);
    const __m256i pair = _mm256_or_si256(_mm256_slli_epi64(code, 4), _mm256_srli_epi64(code, 32));
    const __m256i packed = _mm256_shuffle_epi8(pair, collect);
    const uint32_t bytes = uint32_t(_mm_cvtsi128_si32(_mm256_castsi256_si128(packed))) |
                           uint32_t(_mm_cvtsi128_si32(_mm256_extracti128_si256(packed, 1))) << 16;
    const int64_t count = n - i >= 8 ? 4 : (n - i + 1) / 2;
    if (count == 4)
      __builtin_memcpy(out, &bytes, 4);
    else
      for (int64_t k = 0; k < count; ++k) out[k] = uint8_t(bytes >> 8 * k);
    out += count;
  }
}

// For nf4_gemm.h.
constexpr int kTileRows = 6, kTileVectors = 1;
constexpr int64_t kPanelBytes = 3 << 18;

inline void transpose8(const float* in, int64_t stride, float* out, int64_t out_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(in + i * stride);
  for (int i = 0; i < 8; i += 2) {  // pairs of rows: columns 0 and 1 of each half, then 2 and 3
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)  // four rows: one column of each half
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm256_shuffle_ps(b[i + k], b[i + 2 + k], 0x44);
      a[i + 2 * k + 1] = _mm256_shuffle_ps(b[i + k], b[i + 2 + k], 0xee);
    }
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_ps(out + k * out_stride, _mm256_permute2f128_ps(a[k], a[4 + k], 0x20));
    _mm256_storeu_ps(out + (4 + k) * out_stride, _mm256_permute2f128_ps(a[k], a[4 + k], 0x31));
  }
}

inline void transpose16(const float* in, int64_t stride, float* out, int64_t out_stride) {
  for (int i = 0; i < 16; i += 8)
    for (int k = 0; k < 16; k += 8) transpose8(in + i * stride + k, stride, out + k * out_stride + i, out_stride);
}

// For nf4_gemm_integers.h.
struct I16 {
  __m256i low, high;
  static I16 zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I16 broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I16 load(const int32_t* p) {
    const __m256i* const from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_load_si256(from), _mm256_load_si256(from + 1)};
  }
};

inline F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

// Inline: of the intrinsics compilers keep several products at once, and spill.
inline void dot(__m256i& sum, __m256i a, __m256i b) {
#if defined(QLORA_AVX_VNNI) && \
    defined(QLORA_EVEX)  // AVX-512's encoding of it, for tests on processors that have no other
  asm("vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#elif defined(QLORA_AVX_VNNI)
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
#endif
}
inline void dot(I16& sum, const I16& a, const I16& b) {
  dot(sum.low, a.low, b.low);
  dot(sum.high, a.high, b.high);
}

struct Largest {
  __m256i bits = _mm256_setzero_si256();
  void see(__m256 x) {
    bits = _mm256_max_epu32(bits, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
  }
  void see(F16 x) {
    see(x.low);
    see(x.high);
  }
  float value() const {
    __m128i x = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1));
    return float_of(uint32_t(_mm_cvtsi128_si32(x)));
  }
};

inline __m256i words_of(F16 x) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)), 0xd8);
}

inline void store_words(int16_t* out, F16 x) { _mm256_store_si256(reinterpret_cast<__m256i*>(out), words_of(x)); }

inline __m256i pairs_of(__m256 a, __m256 b) {
  return _mm256_blend_epi16(_mm256_cvtps_epi32(a), _mm256_slli_epi32(_mm256_cvtps_epi32(b), 16), 0xaa);
}

inline void store_pairs(int32_t* out, F16 a, F16 b) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), pairs_of(a.low, b.low));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out + 8), pairs_of(a.high, b.high));
}

struct Words {  // low and high bytes apart, as in a Table
  __m128i low_bytes, high_bytes;
  Words(const float* levels, float factor) {
    const __m256i all = words_of(mul(F16::load(levels), F16::broadcast(factor)));
    const __m128i first = _mm256_castsi256_si128(all), second = _mm256_extracti128_si256(all, 1),
                  byte = _mm_set1_epi16(0xff);
    low_bytes = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    high_bytes = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
  }
};

// Of 16 bytes of codes: of each half the first 8 words in `first`, the rest in `second`.
inline void decode_words(__m128i bytes, __m256i low_bytes, __m256i high_bytes, __m256i& first, __m256i& second) {
  const __m256i wide = _mm256_cvtepu8_epi16(bytes);
  const __m256i code =
      _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8)), _mm256_set1_epi8(15));
  const __m256i low = _mm256_shuffle_epi8(low_bytes, code), high = _mm256_shuffle_epi8(high_bytes, code);
  first = _mm256_unpacklo_epi8(low, high);
  second = _mm256_unpackhi_epi8(low, high);
}

inline void store_halves(void* out, __m256i a, __m256i b) {  // the low ones, then the high ones
  __m256i* const to = static_cast<__m256i*>(out);
  _mm256_store_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_store_si256(to + 1, _mm256_permute2x128_si256(a, b, 0x31));
}

inline void expand_words(const Words& words, const uint8_t* bytes, int16_t* out) {
  __m256i first, second;
  decode_words(load128(bytes), _mm256_broadcastsi128_si256(words.low_bytes),
               _mm256_broadcastsi128_si256(words.high_bytes), first, second);
  store_halves(out, first, second);
}

inline void expand_pairs(const Words& words, const uint8_t* bytes, const Words& more, const uint8_t* more_bytes,
                         int32_t* out) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)),
                others = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(more_bytes));
  __m256i first, second;  // a row in each half
  decode_words(_mm_unpacklo_epi64(eight, others), _mm256_set_m128i(more.low_bytes, words.low_bytes),
               _mm256_set_m128i(more.high_bytes, words.high_bytes), first, second);
  const __m256i a = _mm256_permute2x128_si256(first, second, 0x20), b = _mm256_permute2x128_si256(first, second, 0x31);
  store_halves(out, _mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
}

}  // namespace
}  // namespace qlora
