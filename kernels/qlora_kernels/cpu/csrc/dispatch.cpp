// The choice of the instruction set, and of the process whose threads may be used.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dispatch.h"

namespace qlora {

const Kernels* kernels = &portable_kernels;
const Layer *layer = nullptr, *integer_layer = nullptr, *bf16_layer = nullptr;
const Attention *attention = nullptr, *float_attention = nullptr;

namespace {

enum Set { kPortable, kAVX2, kAVXVNNI, kAVX512, kNEON };  // in the order of native.ISAS

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

// The process whose threads we may use; 0 where the library was loaded after a fork.
const pid_t home = is_fork() ? 0 : getpid();

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

#if defined(__x86_64__)
bool has_avx_vnni() {
  if (avx_vnni_layer.wide == nullptr) return false;
#if defined(QLORA_EVEX)
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#else
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
#endif
}
#endif

const Kernels* named(int isa) {
  if (isa == kPortable) return &portable_kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == kAVX2 && avx2) return &avx2_kernels;
  if (isa == kAVXVNNI && avx2 && has_avx_vnni()) {
    static Kernels same = avx2_kernels;
    same.name = "AVX2 and AVX-VNNI";
    return &same;
  }
  if (isa == kAVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &avx512_kernels;
#elif defined(__aarch64__)
  if (isa == kNEON) return &neon_kernels;
#endif
  return nullptr;
}

}  // namespace

int threads_for(int64_t pieces, int wanted) {
  if (wanted > pieces) wanted = int(pieces);
  return wanted > 1 && getpid() == home ? wanted : 1;
}

}  // namespace qlora

using namespace qlora;

extern "C" {

// Which source this was built from; found in the file's bytes by build.py.
__attribute__((used)) const char qlora_source[] = "qlora-source-hash:" QLORA_SOURCE_HASH;

// One of the sets above. The name of the set now in use, or null where this processor lacks it.
const char* qlora_select(int isa) {
  const Kernels* found = named(isa);
  if (found == nullptr) return nullptr;
  kernels = found;
  layer = integer_layer = bf16_layer = nullptr, float_attention = nullptr;
#if defined(__x86_64__)
  if (isa != kPortable) layer = isa == kAVX512 ? &avx512_layer : &avx2_layer;
  if (isa != kPortable) float_attention = isa == kAVX512 ? &avx512_attention : &avx2_attention;
  if (isa == kAVX2) integer_layer = &avx2_integer_layer;
  if (isa == kAVXVNNI) integer_layer = &avx_vnni_layer;
  if (isa == kAVX512 && __builtin_cpu_supports("avx512vnni")) integer_layer = &avx512_vnni_layer;
  // VDPBF16PS is as fast as an FMA on AMD's; on Intel's it takes four times as long, and integers are faster.
  if (isa == kAVX512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"))
    bf16_layer = &avx512_bf16_layer;
#elif defined(__aarch64__)
  if (isa == kNEON) layer = &neon_layer;
#endif
  return found->name;
}

// What multiplies a layer in float32: 0: nothing here, 1: float32, 2: 16-bit integers too.
int qlora_layers() { return integer_layer != nullptr ? 2 : layer != nullptr ? 1 : 0; }

// Whether a layer of bf16 is multiplied by products of bf16, not by the above.
int qlora_layers_in_bf16() { return bf16_layer != nullptr; }

// Whether a dense weight is multiplied in float32.
int qlora_dense_in_float32() { return layer != nullptr && layer->dense != nullptr; }

// Whether attention in float32 has a kernel.
int qlora_float_attention() { return float_attention != nullptr; }

// 0: none, 1: by AVX512-BF16, 2: by AMX if there. What is now in use.
int qlora_select_attention(int wanted) {
  attention = wanted > 0 ? best_attention(wanted > 1) : nullptr;
  return attention == nullptr ? 0 : attention == &dot_attention ? 1 : 2;
}

// Whether threads are used in this process: 1; not in a fork: 0; in none, since built without OpenMP: -1.
int qlora_threaded() {
#if defined(_OPENMP)
  return getpid() == home;
#else
  return -1;
#endif
}

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

}  // extern "C"
