#if defined(__x86_64__)
#define KERNEL_SUFFIX reference_avx2
#define KERNEL_TARGET "avx2,fma,f16c"
#define KERNEL_HALF
#include "quantization.h"
#endif
