// Attention over the examples of a packed row.

#include "dispatch.h"

using namespace qlora;

extern "C" {

// Bytes of `work` for each thread, where the longest example has `tokens`; floats: in float32, else in bf16.
int64_t qlora_attention_bytes(int is_backward, int floats, int64_t tokens, int64_t D) {
  return (floats ? float_attention : attention)->bytes[is_backward](tokens, D);
}

// views: 4 or 8, as in attention.h. Example i has the tokens bounds[i] to bounds[i + 1]; `work`, aligned to 64, has
// `bytes` for each thread.
void qlora_attention(int is_backward, int floats, const Heads* views, float* lse, const int64_t* bounds,
                     int64_t examples, int64_t heads, int64_t groups, int64_t D, float scale, char* work, int64_t bytes,
                     int threads) {
  const AttentionShape shape{bounds[examples], heads, groups, D, scale};
  const Attention* const kernel = floats ? float_attention : attention;
  const auto piece = [&](int64_t i, int thread) {
    const int64_t from = bounds[i / groups], n = bounds[i / groups + 1] - from;
    kernel->pass[is_backward](views, lse, shape, from, n, i % groups, work + thread * bytes);
  };
  parallel_threads(examples * groups, threads, piece);
}

}  // extern "C"
