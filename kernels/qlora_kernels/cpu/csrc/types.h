// The two 16-bit formats as bit patterns, and their exact conversions in plain integers (used where no instruction does
// it).
#pragma once

#include <stdint.h>

namespace qlora {
namespace {

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(BF16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float to_float(FP16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
  // Scaling by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal, exactly.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

template <class T>
T round_to(float x);

template <>
inline float round_to<float>(float x) {
  return x;
}

template <>
inline BF16 round_to<BF16>(float x) {  // to nearest, ties to even; subnormals as any other number
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return BF16{0x7fc0};
  return BF16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline FP16 round_to<FP16>(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return FP16{uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return FP16{uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (rest < 0x38800000)  // below 2^-14: adding 0.5 lines the last place of a half subnormal up with that of a float
    return FP16{uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000))};
  return FP16{uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13)};
}

}  // namespace
}  // namespace qlora
