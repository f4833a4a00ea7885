// The native library on the machine that an emulator shows, for emulated.py:
// reads calls from the standard input, answers on the standard output. All
// numbers are 8 bytes, but a float's 4.
//
//   call     length of the name, name, returns a string?, count of segments, of
//   words, of floats;
//            each segment: address there, bytes, holds pointers?, content;  the
//            words;  the floats
//   answer   result (a string: its length, then the string), then the content
//   of each segment without pointers
//
// A segment gets memory of its own, as far from a multiple of 64 as it lies
// there. A word that points into a segment there, as an argument or in a
// segment of pointers, is made to point into it here.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

namespace {

struct Segment {
  uint64_t there, size, pointers;
  char *memory, *here;
};

void take(void* to, size_t size) {
  if (size > 0 && fread(to, size, 1, stdin) != 1) exit(0);  // whoever called has gone
}

void give(const void* from, size_t size) {
  if (size > 0 && fwrite(from, size, 1, stdout) != 1) exit(1);
}

uint64_t number() {
  uint64_t value;
  take(&value, sizeof value);
  return value;
}

uint64_t moved(uint64_t word, const std::vector<Segment>& segments) {
  for (const Segment& s : segments)
    if (word >= s.there && word < s.there + s.size) return reinterpret_cast<uint64_t>(s.here) + (word - s.there);
  return word;
}

constexpr int kWords = 32, kFloats = 4;
using W = uint64_t;
// Integers and pointers go in order into registers and then onto the stack, 8
// bytes each, floats into registers of their own, and more than a function
// takes is not looked at: so one type calls them all.
using Function = W (*)(W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W,
                       float, float, float, float);

}  // namespace

int main(int, char** arguments) {
  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return fprintf(stderr, "%s\n", dlerror()), 1;
  for (;;) {
    std::string name(number(), 0);
    take(&name[0], name.size());
    const uint64_t is_text = number();
    std::vector<Segment> segments(number());
    const uint64_t words = number(), floats = number();
    for (Segment& s : segments) {
      s.there = number(), s.size = number(), s.pointers = number();
      s.memory = static_cast<char*>(aligned_alloc(64, (s.size / 64 + 2) * 64));
      s.here = s.memory + s.there % 64;
      take(s.here, s.size);
    }
    W w[kWords] = {};
    float f[kFloats] = {};
    if (words > kWords || floats > kFloats) return fprintf(stderr, "%s: too many arguments\n", name.c_str()), 1;
    take(w, words * sizeof(W));
    take(f, floats * sizeof(float));
    for (W& word : w) word = moved(word, segments);
    for (const Segment& s : segments)
      for (uint64_t i = 0; s.pointers && i + 8 <= s.size; i += 8) {
        W word;
        memcpy(&word, s.here + i, 8);
        word = moved(word, segments);
        memcpy(s.here + i, &word, 8);
      }
    void* const found = dlsym(library, name.c_str());
    if (found == nullptr) return fprintf(stderr, "%s\n", dlerror()), 1;
    const W result = reinterpret_cast<Function>(found)(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9],
                                                       w[10], w[11], w[12], w[13], w[14], w[15], w[16], w[17], w[18],
                                                       w[19], w[20], w[21], w[22], w[23], w[24], w[25], w[26], w[27],
                                                       w[28], w[29], w[30], w[31], f[0], f[1], f[2], f[3]);
    const char* const text = is_text ? reinterpret_cast<const char*>(result) : nullptr;
    const W answer = !is_text ? result : text == nullptr ? 0 : strlen(text);
    give(&answer, sizeof answer);
    give(text, text == nullptr ? 0 : answer);
    for (const Segment& s : segments) {
      if (!s.pointers) give(s.here, s.size);
      free(s.memory);
    }
    fflush(stdout);
  }
}
