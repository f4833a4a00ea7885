// Memory of the operators' large results, in one range of addresses that grows at its end:
//
//   | used | free | used | used | free |  not yet asked for ...
//
// A result takes the smallest free piece that holds it; what is free side by side is one piece. So the place of a freed
// result serves the next one of its size, whatever came between, and its pages are there already. The pieces are given
// to torch as DLPack's tensors (https://dmlc.github.io/dlpack), whose deleter brings them back. Only
// `qlora_release_memory` returns pages to the system.
//
// The alternative is torch's own memory, which is glibc's. To align a block, posix_memalign takes more than the block
// and gives the rest back; small objects settle there, and the freed place is too small for its like. A step of
// SmolLM2 at 4 x 256 held 15 to 30 % more than it used, by launch.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels.h"

namespace qlora {
namespace {

// Of dlpack.h, version 0.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int kCPU = 1, kFloat = 2, kBfloat = 4, kMostDimensions = 4;

struct Result {  // `managed` first: the deleter gets its address
  DLManagedTensor managed;
  int64_t shape[kMostDimensions], bytes;
};

struct Piece {
  char* at;
  int64_t bytes;
};

constexpr int64_t kGrowth = 64 << 20;

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
bool begun = false;
char *end = nullptr, *ready = nullptr, *limit = nullptr;  // of what was handed out, of what may be used, of the range
Piece* free_pieces = nullptr;                             // in the order of their addresses
int64_t count = 0, room = 0, page = 4096, used = 0;

void lock() { pthread_mutex_lock(&mutex); }
void unlock() { pthread_mutex_unlock(&mutex); }

// Addresses for all of the machine's memory; nothing counts as taken before it is asked for. None where a limit on
// addresses is set (ulimit -v), which this would use up.
void begin() {
  begun = true;
  page = sysconf(_SC_PAGESIZE);
  rlimit addresses;
  if (getrlimit(RLIMIT_AS, &addresses) != 0 || addresses.rlim_cur != RLIM_INFINITY) return;
  const int64_t bytes = int64_t(sysconf(_SC_PHYS_PAGES)) * page;
  void* const range = mmap(nullptr, size_t(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (range == MAP_FAILED) return;
  end = ready = static_cast<char*>(range), limit = end + bytes;
  pthread_atfork(lock, unlock, unlock);  // a child must not find the mutex held by a thread that it does not have
}

void insert(int64_t at, Piece piece) {
  if (count == room) {
    room = 2 * room + 64;
    free_pieces = static_cast<Piece*>(realloc(free_pieces, size_t(room) * sizeof(Piece)));
    if (free_pieces == nullptr) abort();  // less than a page is not to be had
  }
  memmove(free_pieces + at + 1, free_pieces + at, size_t(count++ - at) * sizeof(Piece));
  free_pieces[at] = piece;
}

void erase(int64_t at) { memmove(free_pieces + at, free_pieces + at + 1, size_t(--count - at) * sizeof(Piece)); }

// Whole pages, or null.
char* take(int64_t bytes) {
  int64_t best = -1;
  for (int64_t i = 0; i < count; ++i)
    if (free_pieces[i].bytes >= bytes && (best < 0 || free_pieces[i].bytes < free_pieces[best].bytes)) best = i;
  if (best >= 0) {
    Piece& piece = free_pieces[best];
    char* const found = piece.at;
    piece.at += bytes, piece.bytes -= bytes;
    if (piece.bytes == 0) erase(best);
    return found;
  }
  const bool last_is_free = count > 0 && free_pieces[count - 1].at + free_pieces[count - 1].bytes == end;
  char* const found = last_is_free ? free_pieces[count - 1].at : end;
  if (limit - found < bytes) return nullptr;
  if (found + bytes > ready) {
    const int64_t more = (found + bytes - ready + kGrowth - 1) / kGrowth * kGrowth,
                  grown = more < limit - ready ? more : limit - ready;
    if (mprotect(ready, size_t(grown), PROT_READ | PROT_WRITE) != 0) return nullptr;
    ready += grown;
  }
  if (last_is_free) erase(count - 1);
  end = found + bytes;
  return found;
}

void give_back(Piece piece) {
  int64_t next = 0;
  while (next < count && free_pieces[next].at < piece.at) ++next;
  if (next < count && piece.at + piece.bytes == free_pieces[next].at) {
    piece.bytes += free_pieces[next].bytes;
    erase(next);
  }
  if (next > 0 && free_pieces[next - 1].at + free_pieces[next - 1].bytes == piece.at)
    free_pieces[next - 1].bytes += piece.bytes;
  else
    insert(next, piece);
}

void release(DLManagedTensor* managed) {
  Result* const result = reinterpret_cast<Result*>(managed);
  lock();
  used -= result->bytes;
  give_back({static_cast<char*>(managed->tensor.data), result->bytes});
  unlock();
  free(result);
}

}  // namespace
}  // namespace qlora

using namespace qlora;

extern "C" {

// An uninitialised DLManagedTensor of these sizes, of which so many count, or null where no memory is to be had here.
void* qlora_new_tensor(int dtype, int dimensions, int64_t first, int64_t second, int64_t third, int64_t fourth) {
  Result* const result = static_cast<Result*>(calloc(1, sizeof(Result)));
  if (result == nullptr) return nullptr;
  const int64_t shape[kMostDimensions] = {first, second, third, fourth};
  int64_t bytes = dtype == kFloat32 ? 4 : 2;
  for (int i = 0; i < dimensions; ++i) bytes *= result->shape[i] = shape[i];
  lock();
  if (!begun) begin();
  bytes = (bytes + page - 1) / page * page;
  char* const memory = take(bytes);
  if (memory != nullptr) used += bytes;
  unlock();
  if (memory == nullptr) {
    free(result);
    return nullptr;
  }
  result->bytes = bytes;
  result->managed = {{memory, kCPU, 0, dimensions, uint8_t(dtype == kBFloat16 ? kBfloat : kFloat),
                      uint8_t(dtype == kFloat32 ? 32 : 16), 1, result->shape, nullptr, 0},
                     nullptr,
                     release};
  return result;
}

// Return the pages of what is free to the system; what comes there next gets fresh ones.
void qlora_release_memory() {
  lock();
  for (int64_t i = 0; i < count; ++i)
#if defined(__linux__)
    madvise(free_pieces[i].at, size_t(free_pieces[i].bytes), MADV_DONTNEED);
#else
    madvise(free_pieces[i].at, size_t(free_pieces[i].bytes), MADV_FREE);
#endif
  unlock();
}

// Bytes of results that live.
int64_t qlora_memory_in_use() {
  lock();
  const int64_t found = used;
  unlock();
  return found;
}

}  // extern "C"
