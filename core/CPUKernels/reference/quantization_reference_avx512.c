#if defined(__x86_64__)
#define KERNEL_SUFFIX reference_avx512
#define KERNEL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define KERNEL_AVX512
#define KERNEL_HALF
#include "quantization.h"
#endif
