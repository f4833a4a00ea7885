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

// One group of heads of the example of n tokens that begins at `from`. views, forward: q, k, v, out; backward: dout, q,
// k, v, out, dq, dk, dv. lse [heads, tokens]: log(sum_k e^(scale S)), from the forward to the backward pass.
using AttentionPass = void (*)(const Heads* views, float* lse, const AttentionShape& shape, int64_t from, int64_t n,
                               int64_t group, void* work);

struct Attention {  // [0]: forward, [1]: backward
  AttentionPass pass[2];
  int64_t (*bytes[2])(int64_t tokens, int64_t D);  // of `work`, aligned to 64, for an example of so many tokens
};
extern const Attention matrix_attention, dot_attention;  // empty where the compiler cannot make them
#if defined(__x86_64__)
extern const Attention avx2_attention, avx512_attention;  // of float32
#endif

}  // namespace qlora
