// The kernels of AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "avx2.h"
#include "nf4_kernels.h"
#include "elementwise.h"
#include "nf4_gemm.h"
#include "attention_float.h"
#include "nf4_gemm_integers.h"
#include "dense_gemm.h"
#include "dense_gemm_integers.h"

namespace qlora {
const Kernels avx2_kernels = {"AVX2", QLORA_KERNELS(QLORA_ENTRY)};
const Attention avx2_attention = {{attend, attend_backward}, {attend_bytes, attend_backward_bytes}, kTileRows};
const Layer avx2_layer = kFloatLayer, avx2_integer_layer = kIntegerLayer;
}  // namespace qlora
#endif
