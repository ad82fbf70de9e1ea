#if defined(__x86_64__)
#define KERNEL_FP64 0
#define KERNEL_SUFFIX fp32_reference_avx2
#define KERNEL_WIDE_SUFFIX fp64_reference_avx2
#define KERNEL_TARGET "avx2,fma,f16c"
#include "attention.h"
#endif
