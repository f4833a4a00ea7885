// What the kernels of every instruction set agree on: the operands, the tables, and the list of functions each set
// provides.
//
// Included by files that are compiled for different instruction sets. Nothing inline from the C++ library may appear in
// those: the linker keeps one copy of an inline function, and it could be the one that needs AVX-512.
#pragma once

#include <stdint.h>

namespace qlora {

enum Dtype { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How decoded values are stored: just so; after their lines were fetched, kAhead bytes before (a store reads its line
// first, and the processor does not look far enough ahead for it; only read, as if not to be written: asking for the
// right to write as well gains half as much); or past the caches, which reads nothing.
enum Stores { kPlain, kFetched, kPast };
constexpr int kAhead = 8192;

// A quantized matrix [rows, columns], and optionally one gain per row. Sizes of blocks are powers of two, given as
// shifts.
struct Weight {
  const uint8_t* packed;  // two codes a byte, the even element in the high nibble
  const void* absmax;     // uint8 codes if nested, else the float32 scales
  const float* nested;    // float32 scale of 1 << nested_shift codes, or null
  const float* offset;    // float32 scalar, with nested
  const float* levels;    // [16], what the codes stand for
  const float* gain;      // [rows] or null
  int64_t rows, columns;
  int32_t block_shift, nested_shift;
};

// How values find their codes under the levels of a format, see kCells.
struct Cells {
  alignas(64) float threshold[32];
  alignas(64) int32_t code[32];
  alignas(64) float level[32], next[32];  // the levels of `code` and of `code` + 1
};

// The values of the 8-bit dynamic map [256], from the reference (qlora_initialize).
extern float dynamic_map[256];

namespace {
inline float block_scale(const Weight& w, int64_t block) {
  if (w.nested == nullptr) return static_cast<const float*>(w.absmax)[block];
  const float part = dynamic_map[static_cast<const uint8_t*>(w.absmax)[block]] * w.nested[block >> w.nested_shift];
  return part + *w.offset;  // two roundings: the build forbids contraction
}

// m that is safe to divide by, and m / n: `clamp_magnitude` in the reference.
inline void fold(float m, float n, float& safe, float& gain) {
  const float norm = n < 1e-12f ? 1e-12f : n, size = __builtin_fabsf(m);
  safe = __builtin_copysignf(size < 1e-6f * norm ? 1e-6f * norm : size, m);
  gain = safe / norm;
}
}  // namespace

// The numbers of a step of AdamW: weight = 1 - beta1, square_weight = 1 - beta2, the rest as in the reference.
struct AdamW {
  float weight, beta2, square_weight, eps, decay, size, correction, scale;
};

// Every kernel that an instruction set has, once: result, name and parameters of a function that each file of an
// instruction set defines, by nf4_kernels.h and elementwise.h over its own primitives. The struct below and its tables
// come from this list, so that no order of rows has to agree with another.
#define QLORA_KERNELS(X)                                                                                               \
  /* Elements start..stop of the flat weight to out[0..stop-start). */                                                 \
  X(void, decode, (const Weight&, int64_t start, int64_t stop, Dtype, Stores, void* out))                              \
  /* Blocks first..last of n flat values: their codes and their maxima. */                                             \
  X(void, encode,                                                                                                      \
    (const Cells&, const void* in, Dtype, int64_t n, int64_t first, int64_t last, int32_t block_shift,                 \
     uint8_t* packed, float* absmax))                                                                                  \
  /* Codes of blocks first..last under given scales; the scales of least squared error of the same. */                 \
  X(void, encode_with,                                                                                                 \
    (const Cells&, const void* in, Dtype, int64_t n, int64_t first, int64_t last, int32_t block_shift,                 \
     const float* scales, uint8_t* packed))                                                                            \
  X(void, fit,                                                                                                         \
    (const Cells&, const void* in, Dtype, int64_t n, int64_t first, int64_t last, int32_t block_shift, float* scales)) \
  /* out[c] = sum over rows t of a[t, c] * b[t, c]; leading dimensions in elements. */                                 \
  X(void, dots,                                                                                                        \
    (Dtype, const void* a, int64_t lda, const void* b, int64_t ldb, int64_t rows, int64_t columns, float* out))        \
  /* Rows first..last of A At [rank, rank], A [rank, columns] also given as tiles. */                                  \
  X(void, gram,                                                                                                        \
    (const float* A, const float* tiles, int64_t rank, int64_t columns, int64_t first, int64_t last, float* out))      \
  /* n[j] for rows first..last, at most kNormRows of them: see `norms` in nf4_kernels.h. */                            \
  X(void, norms,                                                                                                       \
    (const Weight&, const float* tiles, const float* B, const float* gram, int64_t rank, float scaling, int64_t first, \
     int64_t last, float* n))                                                                                          \
  /* See elementwise.h. One row of logits becomes its gradient. */                                                     \
  X(void, cross_entropy, (Dtype, void* row, int64_t n, int64_t target, float* loss))                                   \
  /* One row of n is normalized, or the sum of two. */                                                                 \
  X(void, rms_norm,                                                                                                    \
    (Dtype, const void* x, const void* more, const void* weight, int64_t n, float eps, void* sums, void* y,            \
     float* inverse))                                                                                                  \
  X(void, rms_norm_backward,                                                                                           \
    (Dtype, const void* dy, const void* x, const void* weight, int64_t n, float inverse, const void* onto, void* dx))  \
  /* n values of a gated product; of its gradient, also with sums over rows. */                                        \
  X(void, swiglu, (Dtype, const void* gate, const void* up, int64_t n, void* y))                                       \
  X(void, swiglu_backward,                                                                                             \
    (Dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate, void* dup))                      \
  X(void, swiglu_backward_dots,                                                                                        \
    (Dtype, const void* dy, const void* gate, const void* up, int64_t stride, int64_t rows, int64_t columns,           \
     void* dgate, void* dup, float* gate_dots, float* up_dots))                                                        \
  X(void, geglu, (Dtype, const void* gate, const void* up, int64_t n, void* y))                                        \
  X(void, geglu_backward,                                                                                              \
    (Dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate, void* dup))                      \
  /* The heads of one token; factors in their dtype. */                                                                \
  X(void, rotate,                                                                                                      \
    (Dtype, const void* x, const void* cos, const void* sin, int64_t heads, int64_t D, bool back, void* y))            \
  X(void, add, (Dtype, const void* a, const void* b, int64_t n, void* sum))                                            \
  X(void, scaled, (Dtype, const float* in, int64_t rows, int64_t columns, float factor, const float* gain, void* out)) \
  /* n elements of an optimizer's pieces. */                                                                           \
  X(void, adamw_moments, (const AdamW&, const float* g, float* m, float* v, int64_t n))                                \
  X(void, adamw_values, (const AdamW&, const float* m, const float* root, float* p, int64_t n))                        \
  X(float, sum_of_squares, (const float* x, int64_t n))

struct Kernels {
  const char* name;
#define QLORA_POINTER(result, kernel, parameters) result(*kernel) parameters;
  QLORA_KERNELS(QLORA_POINTER)
#undef QLORA_POINTER
};

// The table of the file that this stands in: Kernels{"AVX2", QLORA_KERNELS(QLORA_ENTRY)}.
#define QLORA_ENTRY(result, kernel, parameters) kernel,

// Nearest level without 15 comparisons: x * 15 rounded to an integer puts x in one of 31 cells, each narrower than the
// gap between midpoints, so a cell holds one midpoint at most and code = cell.code + (x > cell.threshold). No midpoint
// lies within 0.001 of the border of a cell, so the rounding of x * 15 cannot matter. (So it is for NF4; a format whose
// midpoints lie closer is refused by `fill_cells`.) Adding 1.5 * 2^23 leaves the
// integer in the low bits.
constexpr float kCells = 15.0f, kRounder = 12582912.0f;
constexpr float kTiny = 1e-38f;  // smaller block maxima count as this one, so that the inverse is finite

// Scales tried for a block are absmax * k / 32; 32 comes first, so that absmax is kept where others are no better.
constexpr int kFitFirst = 24, kFitLast = 46;

constexpr int64_t kNormRows = 96;

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

}  // namespace qlora
