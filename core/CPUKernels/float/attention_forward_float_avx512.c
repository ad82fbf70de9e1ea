#if defined(__x86_64__)
#define KERNEL_SUFFIX float_avx512
#define KERNEL_WIDE_SUFFIX fp64_reference_avx512
#define KERNEL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define KERNEL_HALF
#define KERNEL_AVX512
#define KERNEL_PANEL_VECTORS 2
#include "forward_float.h"
#endif
