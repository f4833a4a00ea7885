// A layer's products by integers with AVX-VNNI, which processors without AVX-512 have (Alder Lake and later); all else
// there is AVX2's. Assemblers know it since the days of GCC 11 and Clang 12: from an older compiler there is no layer.
#if defined(__x86_64__)
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#pragma GCC diagnostic ignored "-Wunused-function"  // the primitives of all the other kernels
#define QLORA_AVX_VNNI
#include "avx2.h"
#include "nf4_kernels.h"
#include "elementwise.h"
#include "nf4_gemm.h"
#include "nf4_gemm_integers.h"
#include "dense_gemm.h"
#include "dense_gemm_integers.h"

namespace qlora {
const Layer avx_vnni_layer = kIntegerLayer;
}
#else
#include "layer.h"

namespace qlora {
const Layer avx_vnni_layer = {};
}
#endif
#endif
