#if defined(__x86_64__)
#define KERNEL_SUFFIX int8_avx512vnni
#define KERNEL_AGAIN_SUFFIX fp32_reference_avx512
#define KERNEL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
#define KERNEL_HALF
#define KERNEL_AVX512
#define KERNEL_PANEL_VECTORS 2
#define KERNEL_DOT "dot_avx512vnni.h"
#include "forward_int8.h"
#endif
