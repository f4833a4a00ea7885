// What lies between the products of a layer: loss, RMSNorm, gated products, rotation.

#include "api.h"
#include "dispatch.h"

using namespace qlora;

namespace {

// n values in pieces: run(at, size) with the first byte and the number of values of each.
template <class F>
void in_pieces(int dtype, int64_t n, int threads, F run) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  parallel(ceil_div(n, kPiece), threads, [&](int64_t i) { run(i * kPiece * width, minimum(kPiece, n - i * kPiece)); });
}

// Of two tensors a third.
void gated(decltype(Kernels::swiglu) kernel, int dtype, const void* gate, const void* up, int64_t n, void* y,
           int threads) {
  in_pieces(dtype, n, threads, [&](int64_t at, int64_t size) {
    kernel(Dtype(dtype), static_cast<const char*>(gate) + at, static_cast<const char*>(up) + at, size,
           static_cast<char*>(y) + at);
  });
}

void gated_backward(decltype(Kernels::swiglu_backward) kernel, int dtype, const void* dy, const void* gate,
                    const void* up, int64_t n, void* dgate, void* dup, int threads) {
  in_pieces(dtype, n, threads, [&](int64_t at, int64_t size) {
    kernel(Dtype(dtype), static_cast<const char*>(dy) + at, static_cast<const char*>(gate) + at,
           static_cast<const char*>(up) + at, size, static_cast<char*>(dgate) + at, static_cast<char*>(dup) + at);
  });
}

}  // namespace

extern "C" {

// logits [rows, columns] become the gradients of losses [rows]; targets lie in [0, columns).
void qlora_cross_entropy(int dtype, void* logits, const int64_t* targets, int64_t rows, int64_t columns, float* losses,
                         int threads) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  parallel(rows, threads, [&](int64_t i) {
    kernels->cross_entropy(Dtype(dtype), static_cast<char*>(logits) + i * columns * width, columns, targets[i],
                           losses + i);
  });
}

// y of x [rows, columns], or of `sums` = x + more where that is given.
void qlora_rms_norm(int dtype, const void* x, const void* more, const void* weight, int64_t rows, int64_t columns,
                    float eps, void* sums, void* y, float* inverse, int threads) {
  const int64_t width = columns * (dtype == kFloat32 ? 4 : 2), step = ceil_div(kPiece, columns);
  const bool adds = more != nullptr;
  parallel(ceil_div(rows, step), threads, [&](int64_t i) {
    for (int64_t row = i * step; row < minimum(rows, (i + 1) * step); ++row)
      kernels->rms_norm(Dtype(dtype), static_cast<const char*>(x) + row * width,
                        adds ? static_cast<const char*>(more) + row * width : nullptr, weight, columns, eps,
                        adds ? static_cast<char*>(sums) + row * width : nullptr, static_cast<char*>(y) + row * width,
                        inverse + row);
  });
}

// dx, plus `onto` unless null.
void qlora_rms_norm_backward(int dtype, const void* dy, const void* x, const void* weight, const float* inverse,
                             int64_t rows, int64_t columns, const void* onto, void* dx, int threads) {
  const int64_t width = columns * (dtype == kFloat32 ? 4 : 2), step = ceil_div(kPiece, columns);
  parallel(ceil_div(rows, step), threads, [&](int64_t i) {
    for (int64_t row = i * step; row < minimum(rows, (i + 1) * step); ++row)
      kernels->rms_norm_backward(Dtype(dtype), static_cast<const char*>(dy) + row * width,
                                 static_cast<const char*>(x) + row * width, weight, columns, inverse[row],
                                 onto == nullptr ? nullptr : static_cast<const char*>(onto) + row * width,
                                 static_cast<char*>(dx) + row * width);
  });
}

// sum may be a or b.
void qlora_add(int dtype, const void* a, const void* b, int64_t n, void* sum, int threads) {
  gated(kernels->add, dtype, a, b, n, sum, threads);
}

void qlora_swiglu(int dtype, const void* gate, const void* up, int64_t n, void* y, int threads) {
  gated(kernels->swiglu, dtype, gate, up, n, y, threads);
}

void qlora_swiglu_backward(int dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate,
                           void* dup, int threads) {
  gated_backward(kernels->swiglu_backward, dtype, dy, gate, up, n, dgate, dup, threads);
}

// As qlora_swiglu_backward for [rows, columns], and dots [2, columns]: the sums over rows of dgate * gate and of dup *
// up.
void qlora_swiglu_backward_dots(int dtype, const void* dy, const void* gate, const void* up, int64_t rows,
                                int64_t columns, void* dgate, void* dup, float* partial, float* dots, int threads) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  sum_rows(rows, columns, kDotColumns / 2, 2, partial, dots, threads,
           [&](int64_t row, int64_t count, int64_t column, int64_t size, float* to) {
             const int64_t at = (row * columns + column) * width;
             kernels->swiglu_backward_dots(Dtype(dtype), static_cast<const char*>(dy) + at,
                                           static_cast<const char*>(gate) + at, static_cast<const char*>(up) + at,
                                           columns, count, size, static_cast<char*>(dgate) + at,
                                           static_cast<char*>(dup) + at, to, to + columns);
           });
}

void qlora_geglu(int dtype, const void* gate, const void* up, int64_t n, void* y, int threads) {
  gated(kernels->geglu, dtype, gate, up, n, y, threads);
}

void qlora_geglu_backward(int dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate,
                          void* dup, int threads) {
  gated_backward(kernels->geglu_backward, dtype, dy, gate, up, n, dgate, dup, threads);
}

// The heads of q [tokens, heads, D] and k [tokens, groups, D], tokens a stride apart, turned by row t % positions of
// cos and sin [positions, D], or turned back; dense results.
void qlora_rotate(int dtype, int back, const void* q, int64_t q_stride, int64_t heads, const void* k, int64_t k_stride,
                  int64_t groups, int64_t D, int64_t tokens, const void* cos, const void* sin, int64_t positions,
                  void* q_out, void* k_out, int threads) {
  const int64_t width = dtype == kFloat32 ? 4 : 2, step = ceil_div(kPiece, (heads + groups) * D);
  const auto row = [&](const void* x, int64_t stride, int64_t count, int64_t t, void* y) {
    const int64_t at = t % positions * D * width;
    kernels->rotate(Dtype(dtype), static_cast<const char*>(x) + t * stride * width, static_cast<const char*>(cos) + at,
                    static_cast<const char*>(sin) + at, count, D, back, static_cast<char*>(y) + t * count * D * width);
  };
  parallel(ceil_div(tokens, step), threads, [&](int64_t i) {
    for (int64_t t = i * step; t < minimum(tokens, (i + 1) * step); ++t) {
      row(q, q_stride, heads, t, q_out);
      row(k, k_stride, groups, t, k_out);
    }
  });
}

}  // extern "C"
