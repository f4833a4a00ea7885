// The primitives of nf4_kernels.h for NEON, which every 64-bit ARM processor has.
//
// A table of 16 values lies in registers as planes: the first bytes of all values, the second bytes, and so on. A TBL
// looks 16 codes up in one plane, and zips put the bytes of a value together again. The alternative, TBL over the 64
// bytes of 16 floats, takes four registers an instruction, which is slow on ARM's own cores.
#include "kernels.h"
#include "types.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace qlora {
namespace {

constexpr int kPanelRows = 6;

struct F16 {
  float32x4_t v[4];
  static F16 zero() { return broadcast(0.0f); }
  static F16 broadcast(float x) {
    const float32x4_t all = vdupq_n_f32(x);
    return {{all, all, all, all}};
  }
  static F16 load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
  void store(float* p) const {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v[i]);
  }
  float sum() const {  // in the order of the other sets
    const float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
};

struct F32 {
  F16 a, b;
};

template <class F>
inline F16 each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline F16 add(F16 a, F16 b) {
  return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F16 mul(F16 a, F16 b) {
  return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F16 madd(F16 a, F16 b, F16 c) {
  return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}

inline uint32x4_t bits(float32x4_t x) { return vreinterpretq_u32_f32(x); }
inline float32x4_t floats(uint32x4_t x) { return vreinterpretq_f32_u32(x); }

inline float32x4_t load4(const float* p) { return vld1q_f32(p); }
inline float32x4_t load4(const BF16* p) { return floats(vshll_n_u16(vld1_u16(&p->bits), 16)); }
inline float32x4_t load4(const FP16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }

template <class T>
inline F16 load16(const T* p) {
  return each([&](int i) { return load4(p + 4 * i); });
}

template <class T>
inline F16 load_some(const T* p, int64_t n) {
  T all[16] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load16(all);
}

inline uint16x4_t rounded(float32x4_t x, FP16) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }

inline float32x4_t round4(float32x4_t x, FP16) { return vcvt_f32_f16(vcvt_f16_f32(x)); }
inline float32x4_t round4(float32x4_t x, BF16) {
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits(x), 16), vdupq_n_u32(1));
  const uint32x4_t near = vaddq_u32(vaddq_u32(bits(x), vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t kept = vandq_u32(near, vdupq_n_u32(0xffff0000));
  return floats(vbslq_u32(vceqq_f32(x, x), kept, vdupq_n_u32(0x7fc00000)));
}
inline uint16x4_t rounded(float32x4_t x, BF16) { return vshrn_n_u32(bits(round4(x, BF16())), 16); }

// For elementwise.h.
inline F16 fused(F16 a, F16 b, F16 c) { return madd(a, b, c); }
// Not FMAX and FMIN, which are NaN where one of both is.
inline float32x4_t maximum(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline float32x4_t minimum(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline F16 maximum(F16 a, F16 b) {
  return each([&](int i) { return maximum(a.v[i], b.v[i]); });
}
inline F16 minimum(F16 a, F16 b) {
  return each([&](int i) { return minimum(a.v[i], b.v[i]); });
}
inline F16 div(F16 a, F16 b) {
  return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F16 exponent(F16 x) {
  return each([&](int i) { return floats(vshlq_n_u32(bits(x.v[i]), 23)); });
}

template <class T>
inline F16 round16(F16 x) {
  return each([&](int i) { return round4(x.v[i], T()); });
}
template <>
inline F16 round16<float>(F16 x) {
  return x;
}

template <class T>
inline void store16(T* p, F16 x) {
  for (int i = 0; i < 4; ++i) vst1_u16(&p[4 * i].bits, rounded(x.v[i], T()));
}
template <>
inline void store16<float>(float* p, F16 x) {
  x.store(p);
}

template <class T>
inline F32 load32(const T* p) {
  return {load16(p), load16(p + 16)};
}
template <>
inline F32 load32(const BF16* p) {
  const auto pairs = [&](int i) { return vreinterpretq_u32_u16(vld1q_u16(&p[8 * i].bits)); };
  return {each([&](int i) { return floats(vshlq_n_u32(pairs(i), 16)); }),
          each([&](int i) { return floats(vandq_u32(pairs(i), vdupq_n_u32(0xffff0000))); })};
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
  for (int i = 0; i < 4; ++i)
    vst1q_u16(&p[8 * i].bits, vreinterpretq_u16_u32(vsriq_n_u32(bits(b.v[i]), bits(a.v[i]), 16)));
  return {a, b};
}

template <class T>
inline F32 in_order(F32 x) {
  return x;
}
template <>
inline F32 in_order<BF16>(F32 x) {
  const auto zipped = [](float32x4_t even, float32x4_t odd, float32x4_t next_even, float32x4_t next_odd) {
    return F16{{vzip1q_f32(even, odd), vzip2q_f32(even, odd), vzip1q_f32(next_even, next_odd),
                vzip2q_f32(next_even, next_odd)}};
  };
  return {zipped(x.a.v[0], x.b.v[0], x.a.v[1], x.b.v[1]), zipped(x.a.v[2], x.b.v[2], x.a.v[3], x.b.v[3])};
}

// Four planes of 16 bytes as 16 floats.
inline F16 joined(const uint8x16_t (&plane)[4]) {
  const auto pairs = [](uint8x16_t low, uint8x16_t high) {
    const uint16x8x2_t both = {
        {vreinterpretq_u16_u8(vzip1q_u8(low, high)), vreinterpretq_u16_u8(vzip2q_u8(low, high))}};
    return both;
  };
  const uint16x8x2_t low = pairs(plane[0], plane[1]), high = pairs(plane[2], plane[3]);
  return {{vreinterpretq_f32_u16(vzip1q_u16(low.val[0], high.val[0])),
           vreinterpretq_f32_u16(vzip2q_u16(low.val[0], high.val[0])),
           vreinterpretq_f32_u16(vzip1q_u16(low.val[1], high.val[1])),
           vreinterpretq_f32_u16(vzip2q_u16(low.val[1], high.val[1]))}};
}

// ---------------------------------------------------------------- codes

inline uint8x16_t bytes_of(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
  const uint16x8_t low = vcombine_u16(vmovn_u32(a), vmovn_u32(b)), high = vcombine_u16(vmovn_u32(c), vmovn_u32(d));
  return vcombine_u8(vmovn_u16(low), vmovn_u16(high));
}

inline F16 clamped(F16 x) { return maximum(minimum(x, F16::broadcast(1.0f)), F16::broadcast(-1.0f)); }

inline uint8x16_t cells_of(F16 x) {
  const F16 shifted = madd(x, F16::broadcast(kCells), F16::broadcast(kRounder));
  return vandq_u8(bytes_of(bits(shifted.v[0]), bits(shifted.v[1]), bits(shifted.v[2]), bits(shifted.v[3])),
                  vdupq_n_u8(31));
}

// 32 numbers of four bytes as planes, and the floats at 16 places of them.
struct Planes {
  uint8x16x4_t first, second;
  explicit Planes(const void* numbers)
      : first(vld4q_u8(static_cast<const uint8_t*>(numbers))),
        second(vld4q_u8(static_cast<const uint8_t*>(numbers) + 64)) {}
  uint8x16_t plane(int i, uint8x16_t at) const {
    const uint8x16x2_t both = {{first.val[i], second.val[i]}};
    return vqtbl2q_u8(both, at);
  }
  F16 at(uint8x16_t places) const {
    const uint8x16_t found[4] = {plane(0, places), plane(1, places), plane(2, places), plane(3, places)};
    return joined(found);
  }
};

inline F16 nearest_level(const Cells& cells, F16 x) {
  x = clamped(x);
  const uint8x16_t cell = cells_of(x);
  const F16 threshold = Planes(cells.threshold).at(cell), level = Planes(cells.level).at(cell),
            next = Planes(cells.next).at(cell);
  return each([&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], threshold.v[i]), next.v[i], level.v[i]); });
}

template <class T>
inline void codes(const Cells& cells, const T* in, int64_t n, float inverse, uint8_t* out) {
  const F16 scale = F16::broadcast(inverse);
  const Planes thresholds(cells.threshold), code(cells.code);
  for (int64_t i = 0; i < n; i += 16) {
    // Zeros behind the last take the code of 0, which is what the pad nibble must be.
    const F16 x = clamped(mul(n - i >= 16 ? load16(in + i) : load_some(in + i, n - i), scale));
    const uint8x16_t cell = cells_of(x);
    const F16 threshold = thresholds.at(cell);
    const auto above = [&](int k) { return vcgtq_f32(x.v[k], threshold.v[k]); };  // -1 where true
    const uint8x16_t found = vsubq_u8(code.plane(0, cell), bytes_of(above(0), above(1), above(2), above(3)));
    const uint16x8_t pairs = vreinterpretq_u16_u8(found);  // the even element in the lower byte
    const uint8x8_t packed = vmovn_u16(vorrq_u16(vshlq_n_u16(pairs, 4), vshrq_n_u16(pairs, 8)));
    if (n - i >= 16) {
      vst1_u8(out + i / 2, packed);
      continue;
    }
    uint8_t rest[8];
    vst1_u8(rest, packed);
    for (int64_t k = 0; k < (n - i + 1) / 2; ++k) out[i / 2 + k] = rest[k];
  }
}

template <class T>
inline uint32_t absmax_bits(const T* in, int64_t n) {
  uint32x4_t largest = vdupq_n_u32(0);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) largest = vmaxq_u32(largest, vandq_u32(bits(load4(in + i)), vdupq_n_u32(0x7fffffff)));
  uint32_t result = vmaxvq_u32(largest);
  for (; i < n; ++i) {
    const uint32_t one = bits_of(to_float(in[i])) & 0x7fffffff;
    result = one > result ? one : result;
  }
  return result;
}

// ---------------------------------------------------------------- decoding

inline F16 scaled_levels(const float* levels, float scale, float gain) {
  return mul(mul(F16::load(levels), F16::broadcast(scale)), F16::broadcast(gain));
}

template <class T>
struct Table {  // of 16-bit values
  uint8x16_t low, high;
  Table(const float* levels, float scale, float gain) {
    const F16 values = scaled_levels(levels, scale, gain);
    const uint8x16_t first = vreinterpretq_u8_u16(vcombine_u16(rounded(values.v[0], T()), rounded(values.v[1], T())));
    const uint8x16_t second = vreinterpretq_u8_u16(vcombine_u16(rounded(values.v[2], T()), rounded(values.v[3], T())));
    low = vuzp1q_u8(first, second), high = vuzp2q_u8(first, second);
  }
  void write(uint8x16_t codes, T* out) const {
    const uint8x16_t a = vqtbl1q_u8(low, codes), b = vqtbl1q_u8(high, codes);
    vst1q_u16(&out->bits, vreinterpretq_u16_u8(vzip1q_u8(a, b)));
    vst1q_u16(&out[8].bits, vreinterpretq_u16_u8(vzip2q_u8(a, b)));
  }
  T operator[](int code) const {
    T all[16];
    write(vdupq_n_u8(uint8_t(code)), all);
    return all[0];
  }
};

template <>
struct Table<float> {
  uint8x16_t planes[4];
  Table(const float* levels, float scale, float gain) {
    const F16 values = scaled_levels(levels, scale, gain);
    const auto half = [&](int i) { return vreinterpretq_u8_f32(values.v[i]); };
    // Bytes 0 and 2 of each float, then 1 and 3.
    const uint8x16_t a = vuzp1q_u8(half(0), half(1)), b = vuzp1q_u8(half(2), half(3)), c = vuzp2q_u8(half(0), half(1)),
                     d = vuzp2q_u8(half(2), half(3));
    planes[0] = vuzp1q_u8(a, b), planes[2] = vuzp2q_u8(a, b);
    planes[1] = vuzp1q_u8(c, d), planes[3] = vuzp2q_u8(c, d);
  }
  void write(uint8x16_t codes, float* out) const {
    const uint8x16_t found[4] = {vqtbl1q_u8(planes[0], codes), vqtbl1q_u8(planes[1], codes),
                                 vqtbl1q_u8(planes[2], codes), vqtbl1q_u8(planes[3], codes)};
    joined(found).store(out);
  }
  float operator[](int code) const {
    float all[16];
    write(vdupq_n_u8(uint8_t(code)), all);
    return all[0];
  }
};

template <Stores, class T>  // there is no load of lines by a store that could be spared
inline void expand(const Table<T>& table, const uint8_t* bytes, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint8x8_t b = vld1_u8(bytes + i), even = vshr_n_u8(b, 4), odd = vand_u8(b, vdup_n_u8(15));
    table.write(vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd)), out + 2 * i);
  }
  for (; i < n; ++i) {
    out[2 * i] = table[bytes[i] >> 4];
    out[2 * i + 1] = table[bytes[i] & 15];
  }
}

// For nf4_gemm.h.
constexpr int kTileRows = 6, kTileVectors = 1;  // 24 registers of sums, 6 of the rows, 2 of the column
constexpr int64_t kPanelBytes = 3 << 18;

inline void transpose16(const float* in, int64_t stride, float* out, int64_t out_stride) {
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 16; k += 4) {
      const float* from = in + i * stride + k;
      const float32x4_t a = vld1q_f32(from), b = vld1q_f32(from + stride), c = vld1q_f32(from + 2 * stride),
                        d = vld1q_f32(from + 3 * stride);
      const auto wide = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
      const auto put = [&](int row, float64x2_t x) {
        vst1q_f32(out + (k + row) * out_stride + i, vreinterpretq_f32_f64(x));
      };
      // Columns 0 and 2 of two rows, then 1 and 3.
      const float64x2_t ab = wide(vtrn1q_f32(a, b)), cd = wide(vtrn1q_f32(c, d)), ab1 = wide(vtrn2q_f32(a, b)),
                        cd1 = wide(vtrn2q_f32(c, d));
      put(0, vtrn1q_f64(ab, cd)), put(1, vtrn1q_f64(ab1, cd1));
      put(2, vtrn2q_f64(ab, cd)), put(3, vtrn2q_f64(ab1, cd1));
    }
}

// sum += four values of each row times four columns of 16: FMLA takes its factor from a lane, so 22 loads serve 96
// products; a load to all lanes for each factor would be 40, and keep a unit that multiplies on ARM's own cores.
template <int kLane>
inline void add_column(const float32x4_t (&rows)[kTileRows], const float* column, F16 (&sum)[kTileRows][kTileVectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const float32x4_t part = vld1q_f32(column + 4 * v);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) sum[r][0].v[v] = vfmaq_laneq_f32(sum[r][0].v[v], part, rows[r], kLane);
  }
}

inline void add_product(const float* a, int64_t stride, const float* b, int64_t depth,
                        F16 (&sum)[kTileRows][kTileVectors]) {
  int64_t k = 0;
  float32x4_t rows[kTileRows];
  for (; k + 4 <= depth; k += 4, b += 64) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) rows[r] = vld1q_f32(a + r * stride + k);
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(b + 256) + line);
    add_column<0>(rows, b, sum);
    add_column<1>(rows, b + 16, sum);
    add_column<2>(rows, b + 32, sum);
    add_column<3>(rows, b + 48, sum);
  }
  for (; k < depth; ++k, b += 16) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) rows[r] = vld1q_dup_f32(a + r * stride + k);
    add_column<0>(rows, b, sum);
  }
}

}  // namespace
}  // namespace qlora

#include "nf4_kernels.h"
#include "elementwise.h"
#include "nf4_gemm.h"

namespace qlora {
const Kernels neon_kernels = {"NEON", QLORA_KERNELS(QLORA_ENTRY)};
const Layer neon_layer = {kTileRows, kWidth, false, room, narrow, nullptr, wide, sums, nullptr, nullptr};
}  // namespace qlora
#endif
