#if defined(__x86_64__)
#define KERNEL_SUFFIX int4_avx2
#define KERNEL_AGAIN_SUFFIX fp32_reference_avx2
#define KERNEL_REST attention_forward_int8_avx2
#define KERNEL_TARGET "avx2,fma,f16c"
#define KERNEL_HALF
#define KERNEL_PANEL_VECTORS 1
#define KERNEL_DOT "dot_avx2_int4.h"
#include "forward_int8.h"
#endif
