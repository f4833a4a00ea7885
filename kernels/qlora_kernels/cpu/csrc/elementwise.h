// What else a training step does element by element (loss, RMSNorm, gated products, rotation, scaled factors, AdamW),
// once, over the primitives of nf4_kernels.h and these:
//
//   fused(a, b, c)       a * b + c rounded once, on every instruction set;  div(a, b)
//   maximum(a, b)        a > b ? a : b, lane by lane, so b where one of them is NaN; minimum likewise
//   exponent(x)          the float whose bits are those of x shifted left by 23
//   round16<T>(F16)      rounded to the values that T has;  store16(T*, F16)
//   F32 {F16 a, b}       32 values in an order that T alone fixes: the first and the second 16, but for BF16 the even
//                        and the odd, which lie in the lower and upper halves of 16 integers and become floats, and
//                        bf16 again, without being moved
//   load32(const T*) -> F32;  store32(T*, F32) -> F32, the values as they are stored
//   in_order<T>(F32)     the first and the second 16
//
// PyTorch has no fused CPU kernel for these three: it makes four float32 copies of a tensor to normalize it, and writes
// a float32 tensor of [tokens, vocabulary] three times for a loss. Each value is rounded where transformers' modules
// round it, so the results are theirs. Sums are of 32 lanes in order, and a product and a sum are rounded together only
// by `fused`: the same bits on every instruction set. Most of this runs as fast as memory allows; AVX-512's own
// rounding to bf16 is not used, since it takes subnormals for zero.
#pragma once

namespace qlora {
namespace {

struct All {
};  // how many of 32 values, where it is not a number below 32: a loop without questions, its last step through a copy

// Ask for what the arrays hold some iterations later: the processor's own prefetching ends with a page of 4 KB, which
// is 64 iterations, and takes up again late. In memory that no cache holds this saves up to two fifths of the time;
// behind the end of an array it does nothing.
template <class... T>
inline void prefetch(int64_t i, T*... arrays) {
  constexpr int64_t kAhead = 1024, kLine = 64;
  const auto fetch = [](const char* p, int64_t bytes) {
    for (int64_t k = 0; k < bytes; k += kLine) __builtin_prefetch(p + kAhead + k);
  };
  (fetch(reinterpret_cast<const char*>(arrays + i), 32 * sizeof(T)), ...);
}

template <class T>
inline F32 load32(const T* p, All, float = 0.0f) {
  return load32(p);
}

template <class T>
inline F32 load32(const T* p, int64_t n, float fill = 0.0f) {
  T all[32];
  for (int64_t i = 0; i < 32; ++i) all[i] = i < n ? p[i] : round_to<T>(fill);
  return load32(all);
}

template <class T>
inline F32 store32(T* p, const F32& x, All) {
  return store32(p, x);
}

template <class T>
inline F32 store32(T* p, const F32& x, int64_t n) {
  T all[32];
  const F32 stored = store32(all, x);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
  return stored;
}

template <class F>
inline void each32(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) f(i, All());
  if (i < n) f(i, n - i);
}

inline F32 zeros() { return {F16::zero(), F16::zero()}; }
inline float sum(const F32& x) { return add(x.a, x.b).sum(); }

template <class F>
inline void with_type(Dtype dtype, F f) {
  if (dtype == kFloat32) f(float());
  if (dtype == kBFloat16) f(BF16());
  if (dtype == kFloat16) f(FP16());
}

inline F16 negative(F16 x) { return mul(x, F16::broadcast(-1.0f)); }

// e^x for x in [kLow, kHigh], infinite above 88.37; NaN of NaN. As 2^n e^r with |r| <= ln(2) / 2. Adding 1.5 * 2^23
// rounds to n, and adding 127 to it leaves the bits of 2^n's exponent in the last places. e^r = 1 + r + r^2 q(r), q of
// degree 4 with the least relative error that float32 coefficients allow, 3e-9. In all within 0.91 units in the last
// place, which every such x was tried for.
constexpr float kLow = -87.0f, kHigh = 89.0f;

inline F16 exponential(F16 x) {
  const F16 shifted = fused(x, F16::broadcast(1.44269504f), F16::broadcast(kRounder + 127.0f));
  const F16 n = add(shifted, F16::broadcast(-kRounder - 127.0f));
  const F16 r = fused(n, F16::broadcast(2.12194440e-4f),
                      fused(n, F16::broadcast(-0.693359375f), x));  // the first product is exact
  F16 p = F16::broadcast(0x1.6a4d5ap-10f);
  p = fused(p, r, F16::broadcast(0x1.12398ep-7f));
  p = fused(p, r, F16::broadcast(0x1.5558b0p-5f));
  p = fused(p, r, F16::broadcast(0x1.555492p-3f));
  p = fused(p, r, F16::broadcast(0x1.fffffcp-2f));
  p = fused(p, r, F16::broadcast(1.0f));
  p = fused(p, r, F16::broadcast(1.0f));
  return mul(p, exponent(shifted));
}

// The loss log(sum_k e^(x_k)) - x_target of one row, which becomes its gradient softmax(x) - onehot(target).
template <class T>
float cross_entropy_row(T* x, int64_t n, int64_t target) {
  const float infinity = __builtin_inff();
  F32 lanes{F16::broadcast(-infinity), F16::broadcast(-infinity)};
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, x);
    const F32 logits = load32(x + i, left, -infinity);
    lanes = {maximum(lanes.a, logits.a), maximum(lanes.b, logits.b)};
  });
  float all[16], largest = -infinity;
  maximum(lanes.a, lanes.b).store(all);
  for (int i = 0; i < 16; ++i) largest = all[i] > largest ? all[i] : largest;

  const F16 shift = F16::broadcast(-largest);
  const auto power = [&](F16 logits) {
    return exponential(maximum(F16::broadcast(kLow), add(logits, shift)));
  };  // NaN of NaN
  constexpr int64_t kPart = 4096;
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kPart) {
    F32 part = zeros();
    each32(n - start < kPart ? n - start : kPart, [&](int64_t i, auto left) {
      const F32 logits = load32(x + start + i, left, -infinity);
      part = {add(part.a, power(logits.a)), add(part.b, power(logits.b))};
    });
    total += sum(part);
  }
  const double wanted = to_float(x[target]);
  const F16 scale = F16::broadcast(float(1.0 / total));
  each32(n, [&](int64_t i, auto left) {
    const F32 logits = load32(x + i, left);
    store32(x + i, F32{mul(power(logits.a), scale), mul(power(logits.b), scale)}, left);
  });
  const double loss = __builtin_log(total) + largest - wanted;
  x[target] =
      round_to<T>(float(__builtin_expm1(-loss)));  // p - 1, with p = e^-loss, without the cancellation near p = 1
  return float(loss);
}

void cross_entropy(Dtype dtype, void* row, int64_t n, int64_t target, float* loss) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    *loss = cross_entropy_row(static_cast<T*>(row), n, target);
  });
}

// y = weight * round(x / rms), rms = sqrt(mean(x^2) + eps); with `more`, of the rounded x + more, which goes to `sums`
template <class T>
float rms_norm_row(const T* x, const T* more, const T* weight, int64_t n, float eps, T* sums, T* y) {
  F32 squares = zeros();
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, x);
    F32 v = load32(x + i, left);
    if (more != nullptr) {
      const F32 w = load32(more + i, left);
      v = store32(sums + i, F32{add(v.a, w.a), add(v.b, w.b)}, left);
    }
    squares = {fused(v.a, v.a, squares.a), fused(v.b, v.b, squares.b)};
  });
  const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / float(n) + eps);
  const F16 scale = F16::broadcast(inverse);
  const T* const from = more == nullptr ? x : sums;
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, y);
    const F32 v = load32(from + i, left), w = load32(weight + i, left);
    store32(y + i, F32{mul(w.a, round16<T>(mul(v.a, scale))), mul(w.b, round16<T>(mul(v.b, scale)))}, left);
  });
  return inverse;
}

void rms_norm(Dtype dtype, const void* x, const void* more, const void* weight, int64_t n, float eps, void* sums,
              void* y, float* inverse) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    *inverse = rms_norm_row(static_cast<const T*>(x), static_cast<const T*>(more), static_cast<const T*>(weight), n,
                            eps, static_cast<T*>(sums), static_cast<T*>(y));
  });
}

// dx = (g - x^ mean(g x^)) / rms with x^ = x / rms and g = weight * dy; rounded, and plus `onto` unless null
template <class T>
void rms_norm_backward_row(const T* dy, const T* x, const T* weight, int64_t n, float inverse, const T* onto, T* dx) {
  const auto gradient = [&](int64_t i, auto left) {
    const F32 g = load32(dy + i, left), w = load32(weight + i, left);
    return F32{round16<T>(mul(g.a, w.a)), round16<T>(mul(g.b, w.b))};
  };
  F32 dots = zeros();
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, dy, x);
    const F32 g = gradient(i, left), v = load32(x + i, left);
    dots = {fused(g.a, v.a, dots.a), fused(g.b, v.b, dots.b)};
  });
  const F16 scale = F16::broadcast(inverse), pull = F16::broadcast(-sum(dots) / float(n) * inverse * inverse);
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, dx);
    const F32 g = gradient(i, left), v = load32(x + i, left);
    F32 d{mul(fused(v.a, pull, g.a), scale), mul(fused(v.b, pull, g.b), scale)};
    if (onto != nullptr) {
      const F32 more = load32(onto + i, left);
      d = {add(round16<T>(d.a), more.a), add(round16<T>(d.b), more.b)};
    }
    store32(dx + i, d, left);
  });
}

void rms_norm_backward(Dtype dtype, const void* dy, const void* x, const void* weight, int64_t n, float inverse,
                       const void* onto, void* dx) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    rms_norm_backward_row(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(weight), n,
                          inverse, static_cast<const T*>(onto), static_cast<T*>(dx));
  });
}

// e^-x, at least e^kLow; infinite where 1 / (1 + e^-x) is zero.
inline F16 negative_power(F16 x) {
  return exponential(maximum(F16::broadcast(kLow), minimum(F16::broadcast(kHigh), negative(x))));
}

inline F16 logistic(F16 x) {
  const F16 one = F16::broadcast(1.0f);
  return div(one, add(one, negative_power(x)));
}

// The activations of a gated product: the value, and the slope where it is wanted.

// silu(x) = x s, s = logistic(x);  its slope is s (1 + x (1 - s))
struct Silu {
  F16 s, value;
  explicit Silu(F16 x) : s(logistic(x)), value(mul(x, s)) {}
  F16 slope() const { return fused(value, fused(s, F16::broadcast(-1.0f), F16::broadcast(1.0f)), s); }
};

// gelu(x) = x s, s = logistic(u), u = x (kLinear + kCubic x^2) = 2 sqrt(2 / pi) (x + 0.044715 x^3). It equals
// x (1 + tanh(u / 2)) / 2, but small s keep their digits. Its slope is s (1 + x u' (1 - s)), and 1 - s = s e^-u keeps
// its digits too. u and u' are those of the nearest x within kEnd of 0, so they stay finite: there s is 0 already, or
// 1 - s below 2^-125.
struct Gelu {
  static constexpr float kLinear = 1.5957691216f, kCubic = 0.0713548163f, kEnd = 11.0f;
  F16 near, square, power, s, value;  // power: e^-u
  explicit Gelu(F16 x) {
    const F16 one = F16::broadcast(1.0f);
    near = minimum(F16::broadcast(kEnd), maximum(F16::broadcast(-kEnd), x));
    square = mul(near, near);
    power = negative_power(mul(near, fused(square, F16::broadcast(kCubic), F16::broadcast(kLinear))));
    s = div(one, add(one, power));
    // What the two roundings left out, 1 - s (1 + power): without it large values would be less exact than PyTorch's.
    const F16 rest = fused(negative(power), s, add(one, negative(s)));
    s = fused(s, minimum(rest, one), s);  // a power that is infinite leaves s zero
    value = mul(x, s);
  }
  F16 slope() const {
    const F16 one = F16::broadcast(1.0f), opposite = minimum(mul(s, power), one);  // 1 - s, also where s is zero
    const F16 steep = mul(near, fused(square, F16::broadcast(3.0f * kCubic), F16::broadcast(kLinear)));
    return mul(s, fused(steep, opposite, one));
  }
};

// y = activation(gate) * up
template <class Activation, class T>
void gated_as(const T* gate, const T* up, int64_t n, T* y) {
  const auto gated = [](F16 g, F16 u) { return mul(round16<T>(Activation(g).value), u); };
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, gate, up, y);
    const F32 g = load32(gate + i, left), u = load32(up + i, left);
    store32(y + i, F32{gated(g.a, u.a), gated(g.b, u.b)}, left);
  });
}

template <class Activation>
void gated(Dtype dtype, const void* gate, const void* up, int64_t n, void* y) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    gated_as<Activation>(static_cast<const T*>(gate), static_cast<const T*>(up), n, static_cast<T*>(y));
  });
}

void swiglu(Dtype dtype, const void* gate, const void* up, int64_t n, void* y) { gated<Silu>(dtype, gate, up, n, y); }
void geglu(Dtype dtype, const void* gate, const void* up, int64_t n, void* y) { gated<Gelu>(dtype, gate, up, n, y); }

// d gate = dy up activation'(gate);  d up = dy activation(gate)
template <class Activation, class T>
inline void gated_gradients(F16 dy, F16 gate, F16 up, F16& dgate, F16& dup) {
  const Activation active(gate);
  dgate = mul(round16<T>(mul(dy, up)), active.slope());
  dup = mul(dy, round16<T>(active.value));
}

template <class Activation, class T>
void gated_backward_as(const T* dy, const T* gate, const T* up, int64_t n, T* dgate, T* dup) {
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, dy, gate, up, dgate, dup);
    const F32 d = load32(dy + i, left), g = load32(gate + i, left), u = load32(up + i, left);
    F32 dg, du;
    gated_gradients<Activation, T>(d.a, g.a, u.a, dg.a, du.a);
    gated_gradients<Activation, T>(d.b, g.b, u.b, dg.b, du.b);
    store32(dup + i, du, left);
    store32(dgate + i, dg, left);
  });
}

template <class Activation>
void gated_backward(Dtype dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate, void* dup) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    gated_backward_as<Activation>(static_cast<const T*>(dy), static_cast<const T*>(gate), static_cast<const T*>(up), n,
                                  static_cast<T*>(dgate), static_cast<T*>(dup));
  });
}

void swiglu_backward(Dtype dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate, void* dup) {
  gated_backward<Silu>(dtype, dy, gate, up, n, dgate, dup);
}
void geglu_backward(Dtype dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate, void* dup) {
  gated_backward<Gelu>(dtype, dy, gate, up, n, dgate, dup);
}

// SwiGLU's for some columns of matrices whose rows are `stride` apart, and the sums over the rows of dgate * gate and
// of dup * up, with the bits of `dots`: DoRA's magnitude gradients, while gate and up are at hand.
template <class T>
void swiglu_backward_dots_as(const T* dy, const T* gate, const T* up, int64_t stride, int64_t rows, int64_t columns,
                             T* dgate, T* dup, float* gate_dots, float* up_dots) {
  for (int64_t c = 0; c < columns; ++c) gate_dots[c] = up_dots[c] = 0.0f;
  for (int64_t t = 0; t < rows; ++t)
    each32(columns, [&](int64_t c, auto left) {
      const auto add_products = [&](float* sums, const F32& x, const F32& y) {
        const F32 before = load32(sums + c, left), products = in_order<T>(F32{mul(x.a, y.a), mul(x.b, y.b)});
        store32(sums + c, F32{add(before.a, products.a), add(before.b, products.b)}, left);
      };
      const int64_t i = t * stride + c;
      prefetch(i, dy, gate, up, dgate, dup);
      const F32 d = load32(dy + i, left), g = load32(gate + i, left), u = load32(up + i, left);
      F32 dg, du;
      gated_gradients<Silu, T>(d.a, g.a, u.a, dg.a, du.a);
      gated_gradients<Silu, T>(d.b, g.b, u.b, dg.b, du.b);
      add_products(up_dots, store32(dup + i, du, left), u);
      add_products(gate_dots, store32(dgate + i, dg, left), g);
    });
}

void swiglu_backward_dots(Dtype dtype, const void* dy, const void* gate, const void* up, int64_t stride, int64_t rows,
                          int64_t columns, void* dgate, void* dup, float* gate_dots, float* up_dots) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    swiglu_backward_dots_as(static_cast<const T*>(dy), static_cast<const T*>(gate), static_cast<const T*>(up), stride,
                            rows, columns, static_cast<T*>(dgate), static_cast<T*>(dup), gate_dots, up_dots);
  });
}

// The heads of one token, [heads, D], turned: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2 for the two halves of a
// head, cos and sin [D]; or `back`, by the transposed matrix, which is how gradients are turned. PyTorch has no kernel
// for it; transformers' chain makes six.
template <class T>
void rotate_as(const T* x, const T* cos, const T* sin, int64_t heads, int64_t D, bool back, T* y) {
  const int64_t half = D / 2;
  const T *first = back ? sin + half : sin, *second = back ? sin : sin + half;
  const F16 minus = F16::broadcast(-1.0f), plus = F16::broadcast(1.0f), of_first = back ? plus : minus,
            of_second = back ? minus : plus;
  for (int64_t h = 0; h < heads; ++h, x += D, y += D)
    each32(half, [&](int64_t i, auto left) {
      prefetch(i, x, x + half, y, y + half);
      const F32 x1 = load32(x + i, left), x2 = load32(x + half + i, left), c1 = load32(cos + i, left),
                c2 = load32(cos + half + i, left);
      const F32 s1 = load32(first + i, left), s2 = load32(second + i, left);
      store32(y + i,
              F32{fused(x2.a, mul(s1.a, of_first), mul(x1.a, c1.a)), fused(x2.b, mul(s1.b, of_first), mul(x1.b, c1.b))},
              left);
      store32(
          y + half + i,
          F32{fused(x1.a, mul(s2.a, of_second), mul(x2.a, c2.a)), fused(x1.b, mul(s2.b, of_second), mul(x2.b, c2.b))},
          left);
    });
}

void rotate(Dtype dtype, const void* x, const void* cos, const void* sin, int64_t heads, int64_t D, bool back,
            void* y) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    rotate_as(static_cast<const T*>(x), static_cast<const T*>(cos), static_cast<const T*>(sin), heads, D, back,
              static_cast<T*>(y));
  });
}

void add(Dtype dtype, const void* a, const void* b, int64_t n, void* sum) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T *const x = static_cast<const T*>(a), *const y = static_cast<const T*>(b);
    T* const out = static_cast<T*>(sum);
    each32(n, [&](int64_t i, auto left) {
      prefetch(i, x, y);
      const F32 one = load32(x + i, left), other = load32(y + i, left);
      store32(out + i, F32{add(one.a, other.a), add(one.b, other.b)}, left);
    });
  });
}

// AdamW before and after the square root of v, which is torch's own: MKL's, which is not always the nearest float, and
// another one elsewhere. A product and a sum are rounded together where torch's kernels for AVX2 and AVX-512 do so, in
// their vectors and behind them.
void adamw_moments(const AdamW& step, const float* g, float* m, float* v, int64_t n) {
  const bool near = step.weight < 0.5f;  // torch's lerp goes from the nearer end
  const F16 scale = F16::broadcast(step.scale), part = F16::broadcast(near ? step.weight : step.weight - 1.0f);
  const F16 weight = F16::broadcast(step.square_weight), beta = F16::broadcast(step.beta2);
  const auto first = [&](F16 m, F16 g) { return fused(part, add(g, negative(m)), near ? m : g); };
  const auto second = [&](F16 v, F16 g) { return fused(mul(weight, g), g, mul(v, beta)); };
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, g, m, v);
    F32 gradient = load32(g + i, left);
    const F32 before = load32(m + i, left), squares = load32(v + i, left);
    gradient = {mul(gradient.a, scale), mul(gradient.b, scale)};
    store32(m + i, F32{first(before.a, gradient.a), first(before.b, gradient.b)}, left);
    store32(v + i, F32{second(squares.a, gradient.a), second(squares.b, gradient.b)}, left);
  });
}

void adamw_values(const AdamW& step, const float* m, const float* root, float* p, int64_t n) {
  const F16 correction = F16::broadcast(step.correction), eps = F16::broadcast(step.eps),
            decay = F16::broadcast(step.decay), size = F16::broadcast(-step.size);
  const auto moved = [&](F16 p, F16 m, F16 root) {
    return add(mul(p, decay), div(mul(size, m), add(div(root, correction), eps)));
  };
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, p);
    const F32 values = load32(p + i, left), moment = load32(m + i, left), roots = load32(root + i, left, 1.0f);
    store32(p + i, F32{moved(values.a, moment.a, roots.a), moved(values.b, moment.b, roots.b)}, left);
  });
}

float sum_of_squares(const float* x, int64_t n) {
  F32 squares = zeros();
  each32(n, [&](int64_t i, auto left) {
    prefetch(i, x);
    const F32 v = load32(x + i, left);
    squares = {fused(v.a, v.a, squares.a), fused(v.b, v.b, squares.b)};
  });
  return sum(squares);
}

// out = round((in * factor) * gain of the row), in [rows, columns]; no gain: in * factor.
template <class T>
void scaled_as(const float* in, int64_t rows, int64_t columns, float factor, const float* gain, T* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const float g = gain == nullptr ? 1.0f : gain[row];
    int64_t i = row * columns;
    const int64_t end = i + columns;
    for (; i + 16 <= end; i += 16)
      store16(out + i, mul(mul(F16::load(in + i), F16::broadcast(factor)), F16::broadcast(g)));
    for (; i < end; ++i) out[i] = round_to<T>((in[i] * factor) * g);
  }
}

void scaled(Dtype dtype, const float* in, int64_t rows, int64_t columns, float factor, const float* gain, void* out) {
  with_type(dtype, [&](auto t) { scaled_as(in, rows, columns, factor, gain, static_cast<decltype(t)*>(out)); });
}

}  // namespace
}  // namespace qlora
