// What attention_bf16.cpp and attention_float.h have for api_attention.cpp, which cuts the work.
#pragma once
#include <stdint.h>

namespace qlora {

// [tokens, heads, D] with any strides but 1 for the last, in bf16 or float32.
struct Heads {
  void* data;
  int64_t token, head;
  uint16_t* at(int64_t t, int64_t h) const { return static_cast<uint16_t*>(data) + t * token + h * head; }
  float* floats(int64_t t, int64_t h) const { return static_cast<float*>(data) + t * token + h * head; }
};

struct AttentionShape {
  int64_t tokens, heads, groups, D;
  float scale;
};

// A part of one group of heads of the example of n tokens that begins at `from`: forward every `parts`th tile of
// queries, backward one of so many parts of the group's heads. dK and dV are sums over heads, each a sum over queries
// first: of several parts those of each head go to views [tokens, heads, D] of float32.
struct AttentionPart {
  int64_t from, n, group, part, parts;
};

// views, forward: q, k, v, out; backward: dout, q, k, v, out, dq, dk, dv. lse [heads, tokens]: log(sum_k e^(scale S)),
// from the forward to the backward pass.
using AttentionPass = void (*)(const Heads* views, float* lse, const AttentionShape& shape, const AttentionPart& part,
                               void* work);

struct Attention {  // [0]: forward, [1]: backward
  AttentionPass pass[2];
  int64_t (*bytes[2])(int64_t tokens, int64_t D);  // of `work`, aligned to 64, for an example of so many tokens
  int64_t tile;                                    // queries
};
extern const Attention matrix_attention, dot_attention;  // empty where the compiler cannot make them
#if defined(__x86_64__)
extern const Attention avx2_attention, avx512_attention;  // of float32
#endif

}  // namespace qlora
