// What else a training step does element by element, once, over the primitives of kernels.h and these:
//
//   maximum(a, b)      a > b ? a : b, lane by lane: b where one of them is NaN
//   div(a, b);  power_of_two(n)   2^n for whole n in [-126, 127]
//   store16(T*, F16)   16 values rounded to float, BF16 or FP16
//
// PyTorch has no fused CPU kernel for these three: it makes four float32 copies of a tensor to normalize it, and writes a
// float32 tensor of [tokens, vocabulary] three times for a loss. Each value is rounded where transformers' modules round it, so
// the results are theirs. Sums are of 16 lanes in order: the same bits on every instruction set.
#pragma once

namespace qlora {
namespace {

template <class T>
inline void store_some(T* p, F16 x, int64_t n) {
  T all[16];
  store16(all, x);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
}

// The last n < 16 values and `fill` behind them.
template <class T>
inline F16 load_filled(const T* p, int64_t n, float fill) {
  float all[16];
  for (int64_t i = 0; i < 16; ++i) all[i] = i < n ? to_float(p[i]) : fill;
  return F16::load(all);
}

template <class T>
inline F16 load_upto(const T* p, int64_t n) {
  return n >= 16 ? load16(p) : load_some(p, n);
}

template <class T>
inline void store_upto(T* p, F16 x, int64_t n) {
  n >= 16 ? store16(p, x) : store_some(p, x, n);
}

template <class T>
inline F16 round16(F16 x) {  // to the values T has
  T all[16];
  store16(all, x);
  return load16(all);
}
template <>
inline F16 round16<float>(F16 x) {
  return x;
}

template <class F>
inline void with_type(Dtype dtype, F f) {
  if (dtype == kFloat32) f(float());
  if (dtype == kBFloat16) f(BF16());
  if (dtype == kFloat16) f(FP16());
}

inline F16 negative(F16 x) { return mul(x, F16::broadcast(-1.0f)); }

// e^x by 2^n e^r, |r| <= ln(2) / 2, and a polynomial (Cephes expf: within 1 unit in the last place); x outside [-87, 88] counts as the bound.
inline F16 exponential(F16 x) {
  x = maximum(F16::broadcast(-87.0f), negative(maximum(F16::broadcast(-88.0f), negative(x))));
  const F16 n = add(add(mul(x, F16::broadcast(1.44269504f)), F16::broadcast(kRounder)), F16::broadcast(-kRounder));
  const F16 r = add(add(x, mul(n, F16::broadcast(-0.693359375f))), mul(n, F16::broadcast(2.12194440e-4f)));
  F16 p = F16::broadcast(1.9875691500e-4f);
  p = add(mul(p, r), F16::broadcast(1.3981999507e-3f));
  p = add(mul(p, r), F16::broadcast(8.3334519073e-3f));
  p = add(mul(p, r), F16::broadcast(4.1665795894e-2f));
  p = add(mul(p, r), F16::broadcast(1.6666665459e-1f));
  p = add(mul(p, r), F16::broadcast(5.0000001201e-1f));
  return mul(add(add(mul(mul(p, r), r), r), F16::broadcast(1.0f)), power_of_two(n));
}

// The loss log(sum_k e^(x_k)) - x_target of one row, which becomes its gradient softmax(x) - onehot(target).
template <class T>
float cross_entropy_row(T* x, int64_t n, int64_t target) {
  const float infinity = __builtin_inff();
  const int64_t whole = n & ~int64_t(15);
  F16 lanes = load_filled(x + whole, n - whole, -infinity);
  for (int64_t i = 0; i < whole; i += 16) lanes = maximum(lanes, load16(x + i));
  float all[16], largest = -infinity;
  lanes.store(all);
  for (int i = 0; i < 16; ++i) largest = all[i] > largest ? all[i] : largest;

  const F16 shift = F16::broadcast(-largest);
  double sum = exponential(add(load_filled(x + whole, n - whole, -infinity), shift)).sum();
  for (int64_t start = 0; start < whole; start += 4096) {
    const int64_t stop = whole - start < 4096 ? whole : start + 4096;
    F16 part = F16::zero();
    for (int64_t i = start; i < stop; i += 16) part = add(part, exponential(add(load16(x + i), shift)));
    sum += part.sum();
  }
  const double wanted = to_float(x[target]);
  const F16 scale = F16::broadcast(float(1.0 / sum));
  for (int64_t i = 0; i < n; i += 16) {
    const F16 logits = n - i < 16 ? load_filled(x + i, n - i, -infinity) : load16(x + i);
    store_upto(x + i, mul(exponential(add(logits, shift)), scale), n - i);
  }
  const double loss = __builtin_log(sum) + largest - wanted;
  x[target] = round_to<T>(float(__builtin_expm1(-loss)));  // p - 1, with p = e^-loss, without the cancellation near p = 1
  return float(loss);
}

void cross_entropy(Dtype dtype, void* row, int64_t n, int64_t target, float* loss) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    *loss = cross_entropy_row(static_cast<T*>(row), n, target);
  });
}

// y = weight * round(x / rms), rms = sqrt(mean(x^2) + eps)
template <class T>
float rms_norm_row(const T* x, const T* weight, int64_t n, float eps, T* y) {
  F16 squares = F16::zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F16 v = load_upto(x + i, n - i);
    squares = add(squares, mul(v, v));
  }
  const float inverse = 1.0f / __builtin_sqrtf(squares.sum() / float(n) + eps);
  const F16 scale = F16::broadcast(inverse);
  for (int64_t i = 0; i < n; i += 16)
    store_upto(y + i, mul(load_upto(weight + i, n - i), round16<T>(mul(load_upto(x + i, n - i), scale))), n - i);
  return inverse;
}

void rms_norm(Dtype dtype, const void* x, const void* weight, int64_t n, float eps, void* y, float* inverse) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    *inverse = rms_norm_row(static_cast<const T*>(x), static_cast<const T*>(weight), n, eps, static_cast<T*>(y));
  });
}

// dx = (g - x^ mean(g x^)) / rms with x^ = x / rms and g = weight * dy
template <class T>
void rms_norm_backward_row(const T* dy, const T* x, const T* weight, int64_t n, float inverse, T* dx) {
  F16 dots = F16::zero();
  for (int64_t i = 0; i < n; i += 16)
    dots = add(dots, mul(round16<T>(mul(load_upto(dy + i, n - i), load_upto(weight + i, n - i))), load_upto(x + i, n - i)));
  const F16 scale = F16::broadcast(inverse), pull = F16::broadcast(-dots.sum() / float(n) * inverse * inverse);
  for (int64_t i = 0; i < n; i += 16) {
    const F16 g = round16<T>(mul(load_upto(dy + i, n - i), load_upto(weight + i, n - i)));
    store_upto(dx + i, mul(add(g, mul(load_upto(x + i, n - i), pull)), scale), n - i);
  }
}

void rms_norm_backward(Dtype dtype, const void* dy, const void* x, const void* weight, int64_t n, float inverse, void* dx) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    rms_norm_backward_row(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(weight), n, inverse, static_cast<T*>(dx));
  });
}

inline F16 logistic(F16 x) { return div(F16::broadcast(1.0f), add(F16::broadcast(1.0f), exponential(negative(x)))); }

// y = silu(gate) * up, silu(x) = x / (1 + e^-x)
template <class T>
void swiglu_as(const T* gate, const T* up, int64_t n, T* y) {
  for (int64_t i = 0; i < n; i += 16) {
    const F16 g = load_upto(gate + i, n - i);
    store_upto(y + i, mul(round16<T>(mul(g, logistic(g))), load_upto(up + i, n - i)), n - i);
  }
}

void swiglu(Dtype dtype, const void* gate, const void* up, int64_t n, void* y) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    swiglu_as(static_cast<const T*>(gate), static_cast<const T*>(up), n, static_cast<T*>(y));
  });
}

// d gate = dy up s (1 + gate (1 - s)) with s = logistic(gate);  d up = dy silu(gate): 16 of each, rounded to T
template <class T>
inline void swiglu_gradients(F16 dy, F16 gate, F16 up, F16& dgate, F16& dup) {
  const F16 one = F16::broadcast(1.0f), s = logistic(gate);
  const F16 slope = mul(s, add(one, mul(gate, add(one, negative(s)))));
  dgate = round16<T>(mul(round16<T>(mul(dy, up)), slope));
  dup = round16<T>(mul(dy, round16<T>(mul(gate, s))));
}

template <class T>
void swiglu_backward_as(const T* dy, const T* gate, const T* up, int64_t n, T* dgate, T* dup) {
  for (int64_t i = 0; i < n; i += 16) {
    F16 dg, du;
    swiglu_gradients<T>(load_upto(dy + i, n - i), load_upto(gate + i, n - i), load_upto(up + i, n - i), dg, du);
    store_upto(dup + i, du, n - i);
    store_upto(dgate + i, dg, n - i);
  }
}

void swiglu_backward(Dtype dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate, void* dup) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    swiglu_backward_as(static_cast<const T*>(dy), static_cast<const T*>(gate), static_cast<const T*>(up), n, static_cast<T*>(dgate), static_cast<T*>(dup));
  });
}

// The same for some columns of matrices whose rows are `stride` apart, and the sums over the rows of dgate * gate and of dup * up,
// with the bits of `dots`: DoRA's magnitude gradients, while gate and up are at hand.
template <class T>
void swiglu_backward_dots_as(const T* dy, const T* gate, const T* up, int64_t stride, int64_t rows, int64_t columns, T* dgate, T* dup, float* gate_dots, float* up_dots) {
  for (int64_t c = 0; c < columns; ++c) gate_dots[c] = up_dots[c] = 0.0f;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t i = t * stride + c, left = columns - c;
      const F16 g = load_upto(gate + i, left), u = load_upto(up + i, left);
      F16 dg, du;
      swiglu_gradients<T>(load_upto(dy + i, left), g, u, dg, du);
      store_upto(dup + i, du, left);
      store_upto(dgate + i, dg, left);
      store_upto(gate_dots + c, add(load_upto(gate_dots + c, left), mul(dg, g)), left);
      store_upto(up_dots + c, add(load_upto(up_dots + c, left), mul(du, u)), left);
    }
}

void swiglu_backward_dots(Dtype dtype, const void* dy, const void* gate, const void* up, int64_t stride, int64_t rows, int64_t columns, void* dgate, void* dup,
                          float* gate_dots, float* up_dots) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    swiglu_backward_dots_as(static_cast<const T*>(dy), static_cast<const T*>(gate), static_cast<const T*>(up), stride, rows, columns, static_cast<T*>(dgate),
                            static_cast<T*>(dup), gate_dots, up_dots);
  });
}

// out = round((in * factor) * gain of the row), in [rows, columns]; no gain: in * factor.
template <class T>
void scaled_as(const float* in, int64_t rows, int64_t columns, float factor, const float* gain, T* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const F16 s = F16::broadcast(factor), g = F16::broadcast(gain == nullptr ? 1.0f : gain[row]);
    for (int64_t i = row * columns; i < (row + 1) * columns; i += 16) {
      const int64_t left = (row + 1) * columns - i;
      store_upto(out + i, mul(mul(load_upto(in + i, left), s), g), left);
    }
  }
}

void scaled(Dtype dtype, const float* in, int64_t rows, int64_t columns, float factor, const float* gain, void* out) {
  with_type(dtype, [&](auto t) { scaled_as(in, rows, columns, factor, gain, static_cast<decltype(t)*>(out)); });
}

}  // namespace
}  // namespace qlora
