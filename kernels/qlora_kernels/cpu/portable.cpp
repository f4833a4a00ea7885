// The kernels in plain C++, for any processor. The compiler vectorizes the loops of F16 with whatever the baseline offers.
#include "nf4.h"
#include "types.h"

namespace qlora {
namespace {

constexpr int kPanelRows = 2;

struct F16 {
  float v[16];
  static F16 zero() { return broadcast(0.0f); }
  static F16 broadcast(float x) {
    F16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = x;
    return r;
  }
  static F16 load(const float* p) {
    F16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
  void store(float* p) const {
    for (int i = 0; i < 16; ++i) p[i] = v[i];
  }
  float sum() const {
    float h[8];
    for (int i = 0; i < 8; ++i) h[i] = v[i] + v[i + 8];
    for (int n = 4; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) h[i] += h[i + n];
    return h[0];
  }
};

inline F16 add(F16 a, const F16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}

inline F16 mul(F16 a, const F16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
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

inline F16 maximum(const F16& a, F16 b) {
  for (int i = 0; i < 16; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}

inline F16 div(F16 a, const F16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}

inline F16 power_of_two(F16 n) {
  for (int i = 0; i < 16; ++i) n.v[i] = float_of(uint32_t(int32_t(bits_of(n.v[i] + kRounder) - bits_of(kRounder)) + 127) << 23);
  return n;
}

template <class T>
inline void store16(T* p, const F16& x) {
  for (int i = 0; i < 16; ++i) p[i] = round_to<T>(x.v[i]);
}

template <class T>
struct Table {
  T values[16];
  Table(float scale, float gain) {
    for (int c = 0; c < 16; ++c) values[c] = round_to<T>((tables.levels[c] * scale) * gain);
  }
  T operator[](int code) const { return values[code]; }
};

template <class T>
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

inline int code_of(float x) {
  x = clamped(x);
  const uint32_t cell = bits_of(x * kCells + kRounder) & 31;
  return tables.cell_code[cell] + (x > tables.cell_threshold[cell]);
}

inline F16 nearest_level(F16 x) {
  for (int i = 0; i < 16; ++i) x.v[i] = tables.levels[code_of(x.v[i])];
  return x;
}

template <class T>
inline void codes(const T* in, int64_t n, float inverse, uint8_t* out) {
  for (int64_t i = 0; i + 1 < n; i += 2) *out++ = uint8_t(code_of(to_float(in[i]) * inverse) << 4 | code_of(to_float(in[i + 1]) * inverse));
  if (n & 1) *out = uint8_t(code_of(to_float(in[n - 1]) * inverse) << 4 | 7);
}

}  // namespace
}  // namespace qlora

#include "kernels.h"
#include "step.h"

namespace qlora {
const Kernels portable_kernels = {"portable C++", decode, encode, encode_with, fit, dots, gram, norms,
                                 cross_entropy, rms_norm, rms_norm_backward, swiglu, swiglu_backward, swiglu_backward_dots, scaled};

}  // namespace qlora
