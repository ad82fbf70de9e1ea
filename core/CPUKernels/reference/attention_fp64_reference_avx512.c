#if defined(__x86_64__)
#define KERNEL_FP64 1
#define KERNEL_SUFFIX fp64_reference_avx512
#define KERNEL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define KERNEL_AVX512
#include "attention.h"
#endif
