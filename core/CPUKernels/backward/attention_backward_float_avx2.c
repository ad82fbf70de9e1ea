#if defined(__x86_64__)
#define KERNEL_SUFFIX float_avx2
#define KERNEL_TARGET "avx2,fma,f16c"
#define KERNEL_HALF
#define KERNEL_PANEL_VECTORS 1
#define KERNEL_INTEGER 0
#include "backward.h"
#endif
