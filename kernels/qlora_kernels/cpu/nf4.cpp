// The C interface of the native CPU kernels: tables, choice of the instruction set, and the split over threads.
//
// Threads are OpenMP's, at most as many as the caller says (torch's own number: both use one libgomp, so its setting
// rules), and none for small work. Work is cut into pieces whose size does not depend on the number of threads, so
// neither does any result. After a fork the threads of libgomp are gone and a parallel region would wait for them for
// ever: there everything runs on one thread. The alternative, torch's own at::parallel_for, would tie the library to
// one build of torch.
#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif
#include <omp.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"
#include "narrow.h"
#include "nf4.h"
#include "product.h"
#include "types.h"

namespace qlora {

Tables tables;

namespace {

// The nearest of the 256 values of a dynamic map. Sign, exponent and seven bits of the mantissa of x name a cell that
// holds one midpoint at most, so code = code of the cell + (x > its threshold). Cells below 2^-22, where one midpoint
// lies at most, are one.
struct DynamicCells {
  static constexpr int kShift = 16, kFirst = (127 - 22) << (23 - kShift), kCount = (22 << (23 - kShift)) + 1;
  float threshold[2][kCount];
  uint8_t code[2][kCount];

  static int cell(float x) {
    const int key = int((bits_of(x) & 0x7fffffff) >> kShift) - kFirst;
    return key < 0 ? 0 : key < kCount ? key : kCount - 1;
  }
  void fill(const float* midpoints) {
    for (int negative = 0; negative < 2; ++negative)
      for (int k = 0; k < kCount; ++k) threshold[negative][k] = __builtin_inff(), code[negative][k] = 0;
    for (int i = 0; i < 255; ++i) {
      const float midpoint = midpoints[i];
      const int negative = midpoint < 0.0f, k = cell(midpoint);
      threshold[negative][k] = midpoint;
      // Every cell of larger numbers counts one midpoint more below it.
      if (negative)
        for (int j = 0; j < k; ++j) ++code[1][j];
      for (int j = negative ? 0 : k + 1; j < kCount; ++j) ++code[0][j];
    }
  }
  uint8_t nearest(float x) const {
    const int negative = int(bits_of(x) >> 31), k = cell(x);
    return uint8_t(code[negative][k] + (x > threshold[negative][k]));
  }
};
DynamicCells dynamic_cells, block_cells[2];
float block_values[2][256];

const Kernels* kernels = &portable_kernels;
pid_t home = 0;  // the process whose threads we may use

// PF_FORKNOEXEC in /proc/self/stat: this process is a fork, so threads may have been lost before the library was
// loaded.
bool is_fork() {
#if defined(__linux__)
  FILE* file = fopen("/proc/self/stat", "r");
  if (file == nullptr) return false;
  char line[1024];
  const size_t length = fread(line, 1, sizeof line - 1, file);
  fclose(file);
  line[length] = 0;
  const char* after = line;
  for (const char* p = line; *p; ++p)
    if (*p == ')') after = p + 1;  // the command may contain anything, but ends at the last parenthesis
  unsigned flags = 0;
  return sscanf(after, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1 && (flags & 0x40);
#else
  return false;
#endif
}

const Attention* attention = nullptr;

const Attention* best_attention(bool matrix_allowed) {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  if (dot_attention.pass[0] == nullptr || !__builtin_cpu_supports("avx512bf16") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return nullptr;
  unsigned a, b, c, d;
  __cpuid_count(7, 0, a, b, c, d);
  const bool matrix = matrix_allowed && (d & (1u << 22)) && (d & (1u << 24));  // AMX-BF16, AMX-TILE
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // Linux gives a process the tiles when it asks
  return matrix && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? &matrix_attention : &dot_attention;
#else
  return nullptr;
#endif
}

const Kernels* named(int isa) {
  if (isa == 0) return &portable_kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return &avx2_kernels;
  if (isa == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &avx512_kernels;
#endif
  return nullptr;
}

int threads_for(int64_t pieces, int wanted) {
  if (wanted > pieces) wanted = int(pieces);
  return wanted > 1 && getpid() == home ? wanted : 1;
}

template <class F>
void parallel(int64_t pieces, int wanted, F piece) {
  const int threads = threads_for(pieces, wanted);
  if (threads == 1) {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < pieces; ++i) piece(i);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

Weight weight_of(const uint8_t* packed, const void* absmax, const float* nested, const float* offset, const float* gain,
                 int64_t rows, int64_t columns, int64_t blocksize, int64_t nested_blocksize) {
  return Weight{packed,
                absmax,
                nested,
                offset,
                gain,
                rows,
                columns,
                __builtin_ctzll(uint64_t(blocksize)),
                __builtin_ctzll(uint64_t(nested_blocksize))};
}

constexpr int64_t kPiece = 1 << 15;  // elements decoded or encoded in one go; a multiple of every block size
// From so many bytes on a result is written past the caches: an ordinary store reads the line first, and too little of
// the result would stay there for the product that reads it. Below, the product loses more than decoding gains
// (measured on two cores that share a large cache; a smaller one would allow less). Not into fresh memory: the kernel
// has just cleared it, so its lines are in the cache.
constexpr int64_t kPastCaches = int64_t(80) << 20;
constexpr int64_t kFetch =
    int64_t(4)
    << 20;  // from so many on its lines are fetched; fewer may lie in the second cache, where that costs a tenth
constexpr int64_t kDotRows = 128;      // rows of one partial sum
constexpr int64_t kGramRows = 24;      // a multiple of every kPanelRows
constexpr int64_t kDotColumns = 4096;  // columns of one piece: their sums fill half of the first cache

// `sums` sums over rows, [sums, columns]: piece(row, rows, column, columns, to) writes the first of its part to `to`.
// kDotRows rows a part, the parts added up in order: the result does not depend on the number of threads.
template <class F>
void sum_rows(int64_t rows, int64_t columns, int64_t tile, int64_t sums, float* partial, float* out, int threads,
              F piece) {
  const int64_t parts = rows <= kDotRows ? 1 : ceil_div(rows, kDotRows), tiles = ceil_div(columns, tile),
                width = sums * columns;
  if (rows * columns < kPiece) threads = 1;
  parallel(parts * tiles, threads, [&](int64_t i) {
    const int64_t row = i / tiles * kDotRows, column = i % tiles * tile;
    piece(row, minimum(kDotRows, rows - row), column, minimum(tile, columns - column),
          (parts > 1 ? partial + i / tiles * width : out) + column);
  });
  if (parts == 1) return;
  parallel(ceil_div(width, kDotColumns), threads, [&](int64_t i) {
    for (int64_t c = i * kDotColumns; c < minimum(width, (i + 1) * kDotColumns); ++c) {
      float sum = partial[c];
      for (int64_t p = 1; p < parts; ++p) sum += partial[p * width + c];
      out[c] = sum;
    }
  });
}

// Pieces one behind the other, piece i of sizes[i] elements at at[i], cut into parts of `size`: f(part, piece, from,
// to) for each piece in a part.
template <class F>
void each_piece(const int64_t* at, const int64_t* sizes, int64_t count, int64_t length, int64_t size, int threads,
                F f) {
  parallel(ceil_div(length, size), threads, [&](int64_t i) {
    const int64_t start = i * size, stop = minimum(length, start + size);
    int64_t k = 0;
    for (int64_t above = count; above - k > 1;)
      (at[(k + above) / 2] <= start ? k : above) = (k + above) / 2;  // the last that begins by there
    for (; k < count && at[k] < stop; ++k) {
      const int64_t from = at[k] > start ? at[k] : start, to = minimum(stop, at[k] + sizes[k]);
      if (from < to) f(i, k, from, to);
    }
  });
}

}  // namespace
}  // namespace qlora

using namespace qlora;

extern "C" {

// Which source this was built from; found in the file's bytes by native.py.
__attribute__((used)) const char qlora_source[] = "qlora-source-hash:" QLORA_SOURCE_HASH;

// levels [16], dynamic [256], midpoints [255]; values and midpoints of 8-bit blocks, unsigned and signed: the tables of
// reference.py.
void qlora_initialize(const float* levels, const float* dynamic, const float* midpoints, const float* const* values,
                      const float* const* edges) {
  for (int is_signed = 0; is_signed < 2; ++is_signed) {
    for (int i = 0; i < 256; ++i) block_values[is_signed][i] = values[is_signed][i];
    block_cells[is_signed].fill(edges[is_signed]);
  }
  home = is_fork() ? 0 : getpid();
  const float infinity = __builtin_inff();
  for (int i = 0; i < 16; ++i) tables.levels[i] = levels[i];
  for (int i = 0; i < 256; ++i) tables.dynamic[i] = dynamic[i];
  dynamic_cells.fill(midpoints);
  for (int cell = -15, below = 0; cell <= 15; ++cell) {
    tables.cell_code[cell & 31] = below;
    tables.cell_level[cell & 31] = tables.cell_next[cell & 31] = levels[below];
    tables.cell_threshold[cell & 31] = infinity;
    const float midpoint = below < 15 ? (levels[below] + levels[below + 1]) / 2 : infinity;
    if (midpoint * kCells < float(cell) + 0.5f) {
      tables.cell_threshold[cell & 31] = midpoint;
      tables.cell_next[cell & 31] = levels[below + 1];
      ++below;
    }
  }
}

// 0 portable, 1 AVX2, 2 AVX-512. The name of the set now in use, or null where this processor lacks it.
const char* qlora_select(int isa) {
  const Kernels* found = named(isa);
  if (found == nullptr) return nullptr;
  kernels = found;
  return found->name;
}

// 0: none, 1: by AVX512-BF16, 2: by AMX if there. What is now in use.
int qlora_select_attention(int wanted) {
  attention = wanted > 0 ? best_attention(wanted > 1) : nullptr;
  return attention == nullptr ? 0 : attention == &dot_attention ? 1 : 2;
}

// Whether threads are used at all in this process.
int qlora_threaded() { return getpid() == home; }

// Ask for huge pages where they fit into fresh memory: clearing it in pages of 4 KB takes longer than decoding into it.
void qlora_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t stop = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (stop > start)
    madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)memory, (void)bytes;
#endif
}

void qlora_quantize_nf4(const void* weight, int dtype, int64_t n, int64_t blocksize, uint8_t* packed, float* absmax,
                        int threads) {
  const int shift = __builtin_ctzll(uint64_t(blocksize));
  const int64_t blocks = ceil_div(n, blocksize), step = kPiece / blocksize;
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    kernels->encode(weight, Dtype(dtype), n, i * step, minimum(blocks, (i + 1) * step), shift, packed, absmax);
  });
}

// The same under given scales [blocks].
void qlora_encode_nf4(const void* weight, int dtype, int64_t n, int64_t blocksize, const float* scales, uint8_t* packed,
                      int threads) {
  const int shift = __builtin_ctzll(uint64_t(blocksize));
  const int64_t blocks = ceil_div(n, blocksize), step = kPiece / blocksize;
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    kernels->encode_with(weight, Dtype(dtype), n, i * step, minimum(blocks, (i + 1) * step), shift, scales, packed);
  });
}

void qlora_fit_scales_nf4(const void* weight, int dtype, int64_t n, int64_t blocksize, float* scales, int threads) {
  const int shift = __builtin_ctzll(uint64_t(blocksize));
  const int64_t blocks = ceil_div(n, blocksize), step = kPiece / 8 / blocksize > 0 ? kPiece / 8 / blocksize : 1;
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    kernels->fit(weight, Dtype(dtype), n, i * step, minimum(blocks, (i + 1) * step), shift, scales);
  });
}

// absmax [count] -> codes [count], nested [ceil(count / blocksize)]; offset is their mean, summed by torch.
void qlora_quantize_absmax(const float* absmax, const float* offset, int64_t count, int64_t blocksize, uint8_t* codes,
                           float* nested, int threads) {
  const int64_t blocks = ceil_div(count, blocksize), step = ceil_div(4096, blocksize);
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    for (int64_t block = i * step; block < minimum(blocks, (i + 1) * step); ++block) {
      const int64_t start = block * blocksize, stop = minimum(count, start + blocksize);
      uint32_t bits = 0;  // as integers a NaN is larger than any number
      for (int64_t k = start; k < stop; ++k) {
        const uint32_t magnitude = bits_of(absmax[k] - *offset) & 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
      }
      const float largest = nested[block] = float_of(bits);
      const float inverse = 1.0f / (largest > kTiny ? largest : kTiny);
      for (int64_t k = start; k < stop; ++k) codes[k] = dynamic_cells.nearest((absmax[k] - *offset) * inverse);
    }
  });
}

// values [count], whole blocks -> codes [count], absmax [count / blocksize].
void qlora_encode_blocks(const float* values, int64_t count, int64_t blocksize, int is_signed, uint8_t* codes,
                         float* absmax, int threads) {
  const int64_t blocks = count / blocksize, step = ceil_div(4096, blocksize);
  const DynamicCells& cells = block_cells[is_signed];
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    for (int64_t block = i * step; block < minimum(blocks, (i + 1) * step); ++block) {
      const float* in = values + block * blocksize;
      uint32_t bits = 0;
      for (int64_t k = 0; k < blocksize; ++k) {
        const uint32_t magnitude = bits_of(in[k]) & 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
      }
      const float largest = absmax[block] = float_of(bits), inverse = 1.0f / (largest > kTiny ? largest : kTiny);
      for (int64_t k = 0; k < blocksize; ++k) codes[block * blocksize + k] = cells.nearest(in[k] * inverse);
    }
  });
}

void qlora_decode_blocks(const uint8_t* codes, const float* absmax, int64_t count, int64_t blocksize, int is_signed,
                         float* values, int threads) {
  const int64_t blocks = count / blocksize, step = ceil_div(4096, blocksize);
  const float* map = block_values[is_signed];
  parallel(ceil_div(blocks, step), threads, [&](int64_t i) {
    for (int64_t block = i * step; block < minimum(blocks, (i + 1) * step); ++block)
      for (int64_t k = block * blocksize; k < (block + 1) * blocksize; ++k) values[k] = map[codes[k]] * absmax[block];
  });
}

// One of the two halves of AdamW, of elements below `length` of the flat moments. Piece i, [sizes[i]], lies at[i] in
// them, in order. `pieces` are gradients where `root` is null, which become m and v, else parameters, which m and root
// = sqrt(v) move.
void qlora_adamw(const AdamW* step, float* const* pieces, const int64_t* at, const int64_t* sizes, int64_t count,
                 int64_t length, float* m, float* v, const float* root, int threads) {
  each_piece(at, sizes, count, length, 1 << 13, threads, [&](int64_t, int64_t k, int64_t from, int64_t to) {
    float* const piece = pieces[k] + (from - at[k]);
    if (root == nullptr)
      kernels->adamw_moments(*step, piece, m + from, v + from, to - from);
    else
      kernels->adamw_values(*step, m + from, root + from, piece, to - from);
  });
}

// The norm of all pieces together, summed in `parts`, each with a place in `partial`.
void qlora_total_norm(const float* const* pieces, const int64_t* at, const int64_t* sizes, int64_t count,
                      int64_t length, int64_t parts, double* partial, float* out, int threads) {
  for (int64_t i = 0; i < parts; ++i) partial[i] = 0.0;
  each_piece(at, sizes, count, length, length / parts + 1, threads,
             [&](int64_t i, int64_t k, int64_t from, int64_t to) {
               partial[i] += kernels->sum_of_squares(pieces[k] + (from - at[k]), to - from);
             });
  double total = 0.0;
  for (int64_t i = 0; i < parts; ++i) total += partial[i];
  *out = float(__builtin_sqrt(total));
}

void qlora_dequantize_nf4(const uint8_t* packed, const void* absmax, const float* nested, const float* offset,
                          const float* gain, int64_t rows, int64_t columns, int64_t blocksize, int64_t nested_blocksize,
                          int dtype, void* out, int fresh, int threads) {
  const Weight w = weight_of(packed, absmax, nested, offset, gain, rows, columns, blocksize, nested_blocksize);
  const int64_t n = rows * columns, width = dtype == kFloat32 ? 4 : 2;
  const Stores stores = fresh || n * width < kFetch ? kPlain : n * width < kPastCaches ? kFetched : kPast;
  parallel(ceil_div(n, kPiece), threads, [&](int64_t i) {
    kernels->decode(w, i * kPiece, minimum(n, (i + 1) * kPiece), Dtype(dtype), stores,
                    static_cast<char*>(out) + i * kPiece * width);
#if defined(__x86_64__)
    if (stores == kPast) _mm_sfence();
#endif
  });
}

// How many partial sums a sum over rows wants room for: [partials, sums, columns] floats. 1: none, it writes the result
// directly.
int64_t qlora_partials(int64_t rows) { return rows <= kDotRows ? 1 : ceil_div(rows, kDotRows); }

void qlora_column_dots(int dtype, const void* a, int64_t lda, const void* b, int64_t ldb, int64_t rows, int64_t columns,
                       float* partial, float* out, int threads) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  sum_rows(rows, columns, kDotColumns, 1, partial, out, threads,
           [&](int64_t row, int64_t count, int64_t column, int64_t size, float* to) {
             kernels->dots(Dtype(dtype), static_cast<const char*>(a) + (row * lda + column) * width, lda,
                           static_cast<const char*>(b) + (row * ldb + column) * width, ldb, count, size, to);
           });
}

// A [rank, columns], B [rows, rank]; room for the tiles [rank / 16, columns, 16] and for gram [rank, rank]; the rank a
// multiple of 16.
void qlora_row_norms_nf4(const uint8_t* packed, const void* absmax, const float* nested, const float* offset,
                         int64_t rows, int64_t columns, int64_t blocksize, int64_t nested_blocksize, const float* A,
                         float* tiles, const float* B, float* gram, int64_t rank, float scaling, float* n,
                         int threads) {
  const Weight w = weight_of(packed, absmax, nested, offset, nullptr, rows, columns, blocksize, nested_blocksize);
  const int64_t step = 128, strips = ceil_div(columns, step);
  parallel(rank / 16 * strips, threads, [&](int64_t i) {
    const int64_t k = i / strips * 16;
    for (int64_t c = i % strips * step; c < minimum(columns, (i % strips + 1) * step); ++c)
      for (int64_t l = 0; l < 16; ++l) tiles[k * columns + 16 * c + l] = A[(k + l) * columns + c];
  });
  parallel(ceil_div(rank, kGramRows), threads, [&](int64_t i) {
    kernels->gram(A, tiles, rank, columns, i * kGramRows, minimum(rank, (i + 1) * kGramRows), gram);
  });
  parallel(ceil_div(rows, kNormRows), threads, [&](int64_t i) {
    kernels->norms(w, tiles, B, gram, rank, scaling, i * kNormRows, minimum(rows, (i + 1) * kNormRows), n);
  });
}

// logits [rows, columns] become the gradients of losses [rows]; targets lie in [0, columns).
void qlora_cross_entropy(int dtype, void* logits, const int64_t* targets, int64_t rows, int64_t columns, float* losses,
                         int threads) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  parallel(rows, threads, [&](int64_t i) {
    kernels->cross_entropy(Dtype(dtype), static_cast<char*>(logits) + i * columns * width, columns, targets[i],
                           losses + i);
  });
}

void qlora_rms_norm(int dtype, const void* x, const void* weight, int64_t rows, int64_t columns, float eps, void* y,
                    float* inverse, int threads) {
  const int64_t width = columns * (dtype == kFloat32 ? 4 : 2), step = ceil_div(kPiece, columns);
  parallel(ceil_div(rows, step), threads, [&](int64_t i) {
    for (int64_t row = i * step; row < minimum(rows, (i + 1) * step); ++row)
      kernels->rms_norm(Dtype(dtype), static_cast<const char*>(x) + row * width, weight, columns, eps,
                        static_cast<char*>(y) + row * width, inverse + row);
  });
}

void qlora_rms_norm_backward(int dtype, const void* dy, const void* x, const void* weight, const float* inverse,
                             int64_t rows, int64_t columns, void* dx, int threads) {
  const int64_t width = columns * (dtype == kFloat32 ? 4 : 2), step = ceil_div(kPiece, columns);
  parallel(ceil_div(rows, step), threads, [&](int64_t i) {
    for (int64_t row = i * step; row < minimum(rows, (i + 1) * step); ++row)
      kernels->rms_norm_backward(Dtype(dtype), static_cast<const char*>(dy) + row * width,
                                 static_cast<const char*>(x) + row * width, weight, columns, inverse[row],
                                 static_cast<char*>(dx) + row * width);
  });
}

void qlora_swiglu(int dtype, const void* gate, const void* up, int64_t n, void* y, int threads) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  parallel(ceil_div(n, kPiece), threads, [&](int64_t i) {
    const int64_t at = i * kPiece * width;
    kernels->swiglu(Dtype(dtype), static_cast<const char*>(gate) + at, static_cast<const char*>(up) + at,
                    minimum(kPiece, n - i * kPiece), static_cast<char*>(y) + at);
  });
}

void qlora_swiglu_backward(int dtype, const void* dy, const void* gate, const void* up, int64_t n, void* dgate,
                           void* dup, int threads) {
  const int64_t width = dtype == kFloat32 ? 4 : 2;
  parallel(ceil_div(n, kPiece), threads, [&](int64_t i) {
    const int64_t at = i * kPiece * width;
    kernels->swiglu_backward(Dtype(dtype), static_cast<const char*>(dy) + at, static_cast<const char*>(gate) + at,
                             static_cast<const char*>(up) + at, minimum(kPiece, n - i * kPiece),
                             static_cast<char*>(dgate) + at, static_cast<char*>(dup) + at);
  });
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

// down = A, up = scaling * B, times gain by row where m and n [rows] are given; gain = m / n of the m and n that are
// safe to divide by.
void qlora_fold_factors(int dtype, const float* A, int64_t count, const float* B, int64_t rows, int64_t rank,
                        float scaling, const float* m, const float* n, void* down, void* up, float* gain, float* safe,
                        int threads) {
  if (m != nullptr)
    for (int64_t j = 0; j < rows; ++j) fold(m[j], n[j], safe[j], gain[j]);
  const int64_t width = dtype == kFloat32 ? 4 : 2, step = ceil_div(kPiece, rank), first = ceil_div(rows, step);
  parallel(first + ceil_div(count, kPiece), threads, [&](int64_t i) {
    if (i < first)
      kernels->scaled(Dtype(dtype), B + i * step * rank, minimum(step, rows - i * step), rank, scaling,
                      m == nullptr ? nullptr : gain + i * step, static_cast<char*>(up) + i * step * rank * width);
    else
      kernels->scaled(Dtype(dtype), A + (i - first) * kPiece, 1, minimum(kPiece, count - (i - first) * kPiece), 1.0f,
                      nullptr, static_cast<char*>(down) + (i - first) * kPiece * width);
  });
}

// Floats of `work` for the two below.
int64_t qlora_narrow_room(int64_t tokens, int64_t columns, int64_t rank) {
  const int64_t padded = ceil_div(rank, 16) * 16;
  return ceil_div(columns, kStrip) * tokens * padded + ceil_div(tokens, kPart) * columns * (padded + 1);
}

// All of a layer's gradients that are sums over dy = x [tokens, columns]: v = dy up, dB = diag(scaling gain) dyt left,
// dm_c = sum_t dy y / safe; with out, not v, dB and dm: out [rank, columns] = leftt x.
void qlora_narrow(const void* x, const void* y, const void* left, const void* up, int64_t tokens, int64_t columns,
                  int64_t rank, float scaling, const float* gain, const float* safe, float* work, void* v, float* dB,
                  float* dm, float* out, int threads) {
  const auto bf16 = [](const void* p) { return static_cast<const uint16_t*>(p); };
  const Narrow n{bf16(x), bf16(y), bf16(left), bf16(up), tokens, columns, rank};
  const int64_t padded = ceil_div(rank, 16) * 16, parts = ceil_div(tokens, kPart), strips = ceil_div(columns, kStrip);
  const int64_t width =
      ceil_div(ceil_div(columns, strips), 32) * 32;  // strips of one size, and so the last is never much narrower
  float *partial_v = work, *partial_p = work + strips * tokens * padded,
        *partial_dots = partial_p + parts * columns * padded;
  if (tokens * columns < kPiece) threads = 1;
  parallel(parts * strips, threads, [&](int64_t i) {
    const int64_t part = i / strips, strip = i % strips, token = part * kPart, column = strip * width;
    if (column < columns)
      matrix_products.piece(n, token, minimum(kPart, tokens - token), column, minimum(width, columns - column),
                            partial_v + strip * tokens * padded, partial_p + part * columns * padded,
                            partial_dots + part * columns);
  });
  const int64_t used = ceil_div(columns, width), step = 256, pieces = ceil_div(columns, step);
  parallel(pieces + (v == nullptr ? 0 : ceil_div(tokens, step)), threads, [&](int64_t i) {
    if (i >= pieces)
      return matrix_products.finish_tokens(n, partial_v, used, (i - pieces) * step,
                                           minimum(step, tokens - (i - pieces) * step), static_cast<uint16_t*>(v));
    const int64_t stop = minimum(columns, (i + 1) * step);
    matrix_products.finish_columns(n, partial_p, parts, i * step, stop - i * step, out == nullptr, scaling, gain,
                                   out == nullptr ? dB : out);
    for (int64_t c = i * step; y != nullptr && c < stop; ++c) {
      float sum = partial_dots[c];
      for (int64_t p = 1; p < parts; ++p) sum += partial_dots[p * columns + c];
      dm[c] = sum / safe[c];
    }
  });
}

// Bytes of `work` for the product below.
int64_t qlora_product_bytes(int64_t tokens, int64_t inner, int64_t rank, int threads) {
  const int64_t strips = ceil_div(rank, 16);
  return tokens * ceil_div(rank, 32) * 64 + strips * (32 * inner + 16 * 64 * strips) +
         threads * matrix_product.room(inner, rank);
}

// With A, a layer forward: y [tokens, rows] = x [tokens, columns] W'^T + u up^T, u = x_narrow A^T, W' = diag(gain) W; A
// [rank, columns], B [rows, rank], and `down`, up, gain and safe as fold_factors makes them of m and n. With base =
// ||W_j||, n is made on the way; 0 where it is not exact. Without A: y [tokens, columns] = x [tokens, rows] W' + u
// down, u [tokens, rank], or, transposed, y = x W'^T. All but the factors in bf16. `work` is aligned to 64.
int qlora_product(const uint8_t* packed, const void* absmax, const float* nested, const float* offset, float* gain,
                  int64_t rows, int64_t columns, int64_t blocksize, int64_t nested_blocksize, int transposed,
                  const uint16_t* x, int64_t tokens, const uint16_t* x_narrow, uint16_t* u, uint16_t* down,
                  int64_t rank, const float* A, const float* B, float scaling, const float* m, const float* base,
                  float* safe, float* n, uint16_t* up, char* work, uint16_t* y, int threads) {
  const Weight w = weight_of(packed, absmax, nested, offset, gain, rows, columns, blocksize, nested_blocksize);
  const int64_t inner = transposed ? columns : rows, outer = transposed ? rows : columns,
                room = matrix_product.room(inner, rank), strips = ceil_div(rank, 16);
  uint16_t *const left = reinterpret_cast<uint16_t*>(work), *const padded = left + tokens * ceil_div(rank, 32) * 32;
  float* const gram = reinterpret_cast<float*>(padded + strips * 16 * inner);
  char* const rooms = reinterpret_cast<char*>(gram + 256 * strips * strips);
  const Product product{w, transposed != 0, x, tokens, inner, outer, rank, left, down, B, scaling, y};
  const Factors factors{A, m, base, down, up, gain, safe, n, padded, gram};
  for (int64_t j = 0; A != nullptr && m != nullptr && base == nullptr && j < rows; ++j)
    fold(m[j], n[j], safe[j], gain[j]);
  const int64_t blocks = ceil_div(tokens, kProductBlock), panels = outer / kProductBlock,
                cut = threads_for(blocks, threads);
  if (rank > 0)
    parallel(cut + (A == nullptr ? 0 : strips), threads, [&](int64_t i) {
      if (i >= cut) return matrix_product.factors(factors, inner, rank, i - cut);
      const int64_t token = blocks * i / cut * kProductBlock,
                    stop = minimum(tokens, blocks * (i + 1) / cut * kProductBlock);
      if (A != nullptr)
        matrix_product.narrow(x_narrow, A, inner, rank, token, stop - token, rooms + i * room, u, left);
      else
        matrix_product.widen(u, rank, token, stop - token, left);
    });
  int exact = 1;
  const auto wide = [&](const Factors* made, int64_t token, int64_t stop, int64_t panel, int64_t count, char* own) {
    if (!matrix_product.wide(product, made, token, stop - token, panel, count, own))
      __atomic_store_n(&exact, 0, __ATOMIC_RELAXED);
  };
  // A thread's share: panels, and where there are too few, parts of the tokens too, of which none can make factors for
  // the others.
  const int64_t parts = minimum(blocks, ceil_div(threads, panels)), shares = threads_for(parts * panels, threads);
  const Factors* made = A == nullptr ? nullptr : &factors;
  if (made != nullptr && parts > 1) {
    parallel(panels, threads, [&](int64_t i) { wide(made, 0, 0, i, 1, rooms + i * room); });
    made = nullptr;
  }
  parallel(shares, threads, [&](int64_t i) {
    for (int64_t at = parts * panels * i / shares, stop = parts * panels * (i + 1) / shares; at < stop;) {
      const int64_t part = at / panels, count = minimum(stop, (part + 1) * panels) - at;
      wide(made, blocks * part / parts * kProductBlock, minimum(tokens, blocks * (part + 1) / parts * kProductBlock),
           at % panels, count, rooms + i * room);
      at += count;
    }
  });
  return exact;
}

// Bytes of `work`, aligned to 64, for the pass below.
int64_t qlora_adapted_backward_bytes(int64_t tokens, int64_t rows, int64_t columns, int64_t rank, int threads) {
  const int64_t sums = 4 * qlora_narrow_room(tokens, rows > columns ? rows : columns, rank),
                product = qlora_product_bytes(tokens, rows, rank, threads);
  return ceil_div(2 * tokens * rank, 64) * 64 + (sums > product ? sums : product);
}

// The backward pass of an adapted layer, of what its forward pass left: dB and, given y, dm as above, dA = vt x, and dx
// = dy W' + v down unless null.
void qlora_adapted_backward(const uint8_t* packed, const void* absmax, const float* nested, const float* offset,
                            float* gain, int64_t rows, int64_t columns, int64_t blocksize, int64_t nested_blocksize,
                            const uint16_t* dy, const uint16_t* x, uint16_t* down, const void* up, const void* u,
                            const void* y, int64_t tokens, int64_t rank, float scaling, const float* safe, char* work,
                            uint16_t* dx, float* dA, float* dB, float* dm, int threads) {
  uint16_t* const v = reinterpret_cast<uint16_t*>(work);
  work += ceil_div(2 * tokens * rank, 64) * 64;
  float* const sums = reinterpret_cast<float*>(work);
  qlora_narrow(dy, y, u, up, tokens, rows, rank, scaling, gain, safe, sums, v, dB, dm, nullptr, threads);
  qlora_narrow(x, nullptr, v, nullptr, tokens, columns, rank, 1.0f, nullptr, nullptr, sums, nullptr, nullptr, nullptr,
               dA, threads);
  if (dx != nullptr)
    qlora_product(packed, absmax, nested, offset, gain, rows, columns, blocksize, nested_blocksize, 0, dy, tokens,
                  nullptr, v, down, rank, nullptr, nullptr, 1.0f, nullptr, nullptr, nullptr, nullptr, nullptr, work, dx,
                  threads);
}

// Bytes of `work` for each thread, where the longest example has `tokens`.
int64_t qlora_attention_bytes(int is_backward, int64_t tokens, int64_t D) {
  return attention->bytes[is_backward](tokens, D);
}

// views: 4 or 8, as in attention.h. Example i has the tokens bounds[i] to bounds[i + 1]; `work`, aligned to 64, has
// `bytes` for each thread.
void qlora_attention(int is_backward, const Heads* views, float* lse, const int64_t* bounds, int64_t examples,
                     int64_t heads, int64_t groups, int64_t D, float scale, char* work, int64_t bytes, int threads) {
  const AttentionShape shape{bounds[examples], heads, groups, D, scale};
  const auto piece = [&](int64_t i, int thread) {
    const int64_t from = bounds[i / groups], n = bounds[i / groups + 1] - from;
    attention->pass[is_backward](views, lse, shape, from, n, i % groups, work + thread * bytes);
  };
  threads = threads_for(examples * groups, threads);
  if (threads == 1) {
    for (int64_t i = 0; i < examples * groups; ++i) piece(i, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)  // the examples are of any length
  for (int64_t i = 0; i < examples * groups; ++i) piece(i, omp_get_thread_num());
}

}  // extern "C"
