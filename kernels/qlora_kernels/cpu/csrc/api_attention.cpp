// Attention over the examples of a packed row.
//
// A piece of work is an example and a group of heads that share keys, the longest examples first. Where these are few
// for the threads, groups are cut: forward at tiles of queries, whose rows depend on no other; backward at heads, whose
// dK and dV are added up afterwards, in the order in which one piece adds them: bits do not depend on the cut. The
// alternative, always a piece for each head, packs the keys for each of them.

#include "api.h"
#include "dispatch.h"
#include "types.h"

using namespace qlora;

namespace {

struct Cut {
  int64_t parts;  // of each group
  int64_t rooms;  // in which threads work, of `bytes`
  int64_t bytes;
  int64_t sums;  // floats of dK, and of dV, of all heads; 0 where there is one part
};

Cut cut_of(int is_backward, int floats, const int64_t* lengths, int64_t examples, const AttentionShape& s,
           int threads) {
  const Attention& kernel = *(floats ? float_attention : attention);
  int64_t longest = 0;
  for (int64_t i = 0; i < examples; ++i) longest = lengths[i] > longest ? lengths[i] : longest;
  // Every part packs all keys, so a forward one has at least four tiles. A backward one has at least a head.
  const int64_t pieces = examples * s.groups, tiles = longest > 8 * kernel.tile ? longest / (4 * kernel.tile) : 1,
                most = is_backward ? s.heads / s.groups : tiles,
                wanted = threads > 1 ? ceil_div((is_backward ? 2 : 4) * threads, pieces) : 1,
                parts = minimum(wanted, most);
  return {parts, minimum(threads, pieces * parts), ceil_div(kernel.bytes[is_backward](longest, s.D), 64) * 64,
          is_backward && parts > 1 ? s.tokens * s.heads * s.D : 0};
}

// dK of those of a group's heads [tokens, heads, D], in their order; the first one's are overwritten.
template <class T>
void add_heads(float* sums, const AttentionShape& s, const Heads& to, int threads) {
  const int64_t shared = s.heads / s.groups;
  parallel(s.tokens, threads, [&](int64_t t) {
    for (int64_t g = 0; g < s.groups; ++g) {
      float* const first = sums + (t * s.heads + g * shared) * s.D;
      for (int64_t h = 1; h < shared; ++h)
        for (int64_t d = 0; d < s.D; ++d) first[d] += first[h * s.D + d];
      T* const out = static_cast<T*>(to.data) + t * to.token + g * to.head;
      for (int64_t d = 0; d < s.D; ++d) out[d] = round_to<T>(first[d]);
    }
  });
}

}  // namespace

extern "C" {

// Bytes of `work`, aligned to 64.
int64_t qlora_attention_bytes(int is_backward, int floats, const int64_t* lengths, int64_t examples, int64_t tokens,
                              int64_t heads, int64_t groups, int64_t D, int threads) {
  const Cut cut = cut_of(is_backward, floats, lengths, examples, {tokens, heads, groups, D, 1.0f}, threads);
  return cut.rooms * cut.bytes + int64_t(sizeof(float)) * 2 * cut.sums;
}

// views: 4 or 8, as in attention.h, floats: of float32, else of bf16. Example i has lengths[i] tokens from starts[i]
// on.
void qlora_attention(int is_backward, int floats, const Heads* views, float* lse, const int64_t* starts,
                     const int64_t* lengths, int64_t examples, int64_t tokens, int64_t heads, int64_t groups, int64_t D,
                     float scale, char* work, int threads) {
  const AttentionShape shape{tokens, heads, groups, D, scale};
  const Attention& kernel = *(floats ? float_attention : attention);
  const Cut cut = cut_of(is_backward, floats, lengths, examples, shape, threads);
  float* const sums = reinterpret_cast<float*>(work + cut.rooms * cut.bytes);
  Heads given[8];
  for (int k = 0; k < (is_backward ? 8 : 4); ++k) given[k] = views[k];
  for (int k = 0; cut.sums > 0 && k < 2; ++k) given[6 + k] = {sums + k * cut.sums, heads * D, D};
  const int64_t pieces = examples * groups;
  parallel_threads(pieces * cut.parts, threads, [&](int64_t i, int thread) {
    // The last part of a group has the most heads.
    const int64_t example = i % pieces / groups, part = cut.parts - 1 - i / pieces;
    kernel.pass[is_backward](given, lse, shape, {starts[example], lengths[example], i % groups, part, cut.parts},
                             work + thread * cut.bytes);
  });
  for (int k = 0; cut.sums > 0 && k < 2; ++k)
    (floats ? add_heads<float> : add_heads<BF16>)(sums + k * cut.sums, shape, views[6 + k], threads);
}

}  // extern "C"
