// The kernels in plain C++, for any processor that GCC or Clang compile for. Sums, products and quotients are their
// vectors of four, which become what the baseline offers: SSE2, NEON or plain code. The alternative, loops over 16
// values as below where less time is spent, needs -O3 to become vectors, and twice the time to compile.
#include "kernels.h"
#include "types.h"

namespace qlora {
namespace {

constexpr int kPanelRows = 2;

typedef float F4 __attribute__((vector_size(16)));

union F16 {  // these compilers define what is read as one after it was written as the other
  float v[16];
  F4 f[4];
  static F16 zero() { return broadcast(0.0f); }
  static F16 broadcast(float x) {
    F16 r;
    const F4 all = {x, x, x, x};
    r.f[0] = r.f[1] = r.f[2] = r.f[3] = all;
    return r;
  }
  static F16 load(const float* p) {
    F16 r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  void store(float* p) const { __builtin_memcpy(p, this, sizeof *this); }
  float sum() const {
    float h[8];
    for (int i = 0; i < 8; ++i) h[i] = v[i] + v[i + 8];
    for (int n = 4; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) h[i] += h[i + n];
    return h[0];
  }
};

struct F32 {
  F16 a, b;
};

inline F16 add(F16 a, const F16& b) {
  a.f[0] += b.f[0], a.f[1] += b.f[1], a.f[2] += b.f[2], a.f[3] += b.f[3];
  return a;
}

inline F16 mul(F16 a, const F16& b) {
  a.f[0] *= b.f[0], a.f[1] *= b.f[1], a.f[2] *= b.f[2], a.f[3] *= b.f[3];
  return a;
}

inline F16 madd(const F16& a, const F16& b, const F16& c) { return add(mul(a, b), c); }

template <class T>
inline F16 load16(const T* p) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = to_float(p[i]);
  return r;
}

template <class T>
inline F16 load_some(const T* p, int64_t n) {
  F16 r = F16::zero();
  for (int64_t i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
  return r;
}

// For elementwise.h.

// a * b + c, rounded once. The product is exact in double; the sum is rounded to double and then to float, which
// differs from one rounding only where the sum lies in the middle between two floats. There, and below 2^-126 where the
// middles lie elsewhere, a sum that is not exact is made odd in its last place first: it then lies on the same side of
// every middle as the exact one.
inline float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  const double product = double(a) * double(b), sum = product + double(c);
  int64_t bits;
  __builtin_memcpy(&bits, &sum, 8);
  if ((bits & 0x1fffffff) != 0x10000000 && __builtin_fabs(sum) >= 0x1p-126) return float(sum);
  const double part = sum - product,
               rest = (product - (sum - part)) + (double(c) - part);  // what the rounding left out, exactly
  const int64_t up = (rest > 0.0) - (rest < 0.0), outward = sum > 0.0 ? up : -up;
  if (!(bits & 1)) bits += outward;
  double odd;
  __builtin_memcpy(&odd, &bits, 8);
  return float(odd);
#endif
}

inline F16 fused(F16 a, const F16& b, const F16& c) {
  for (int i = 0; i < 16; ++i) a.v[i] = fused(a.v[i], b.v[i], c.v[i]);
  return a;
}

inline F16 maximum(const F16& a, F16 b) {
  for (int i = 0; i < 16; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}

inline F16 minimum(const F16& a, F16 b) {
  for (int i = 0; i < 16; ++i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return b;
}

inline F16 div(F16 a, const F16& b) {
  a.f[0] /= b.f[0], a.f[1] /= b.f[1], a.f[2] /= b.f[2], a.f[3] /= b.f[3];
  return a;
}

inline F16 exponent(F16 x) {
  for (int i = 0; i < 16; ++i) x.v[i] = float_of(bits_of(x.v[i]) << 23);
  return x;
}

template <class T>
inline F16 round16(F16 x) {
  for (int i = 0; i < 16; ++i) x.v[i] = to_float(round_to<T>(x.v[i]));
  return x;
}

template <class T>
inline void store16(T* p, const F16& x) {
  for (int i = 0; i < 16; ++i) p[i] = round_to<T>(x.v[i]);
}

// Where value i of an F32 lies, the 16 of b behind the 16 of a.
template <class T>
constexpr int place(int i) {
  return i;
}
template <>
constexpr int place<BF16>(int i) {
  return i < 16 ? 2 * i : 2 * i - 31;
}

template <class T>
inline F32 load32(const T* p) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.a.v[i] = to_float(p[place<T>(i)]), r.b.v[i] = to_float(p[place<T>(16 + i)]);
  return r;
}

template <class T>
inline F32 store32(T* p, const F32& x) {
  for (int i = 0; i < 16; ++i) p[place<T>(i)] = round_to<T>(x.a.v[i]), p[place<T>(16 + i)] = round_to<T>(x.b.v[i]);
  return load32(p);
}

template <class T>
inline F32 in_order(const F32& x) {
  float all[32];
  for (int i = 0; i < 16; ++i) all[place<T>(i)] = x.a.v[i], all[place<T>(16 + i)] = x.b.v[i];
  return {F16::load(all), F16::load(all + 16)};
}

template <class T>
struct Table {
  T values[16];
  Table(const float* levels, float scale, float gain) {
    for (int c = 0; c < 16; ++c) values[c] = round_to<T>((levels[c] * scale) * gain);
  }
  T operator[](int code) const { return values[code]; }
};

template <Stores, class T>
inline void expand(const Table<T>& table, const uint8_t* bytes, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[2 * i] = table.values[bytes[i] >> 4];
    out[2 * i + 1] = table.values[bytes[i] & 15];
  }
}

template <class T>
inline uint32_t absmax_bits(const T* in, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(to_float(in[i])) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

inline float clamped(float x) { return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x; }

inline int code_of(const Cells& cells, float x) {
  x = clamped(x);
  const uint32_t cell = bits_of(x * kCells + kRounder) & 31;
  return cells.code[cell] + (x > cells.threshold[cell]);
}

inline float level_of(const Cells& cells, float x) {
  x = clamped(x);
  const uint32_t cell = bits_of(x * kCells + kRounder) & 31;
  return x > cells.threshold[cell] ? cells.next[cell] : cells.level[cell];
}

inline F16 nearest_level(const Cells& cells, F16 x) {
  for (int i = 0; i < 16; ++i) x.v[i] = level_of(cells, x.v[i]);
  return x;
}

template <class T>
inline void codes(const Cells& cells, const T* in, int64_t n, float inverse, uint8_t* out) {
  for (int64_t i = 0; i + 1 < n; i += 2)
    *out++ = uint8_t(code_of(cells, to_float(in[i]) * inverse) << 4 | code_of(cells, to_float(in[i + 1]) * inverse));
  if (n & 1) *out = uint8_t(code_of(cells, to_float(in[n - 1]) * inverse) << 4 | code_of(cells, 0.0f));
}

}  // namespace
}  // namespace qlora

#include "nf4_kernels.h"
#include "elementwise.h"

namespace qlora {
const Kernels portable_kernels = {"portable C++", QLORA_KERNELS(QLORA_ENTRY)};

}  // namespace qlora
