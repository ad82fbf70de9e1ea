#if defined(__x86_64__)
#define KERNEL_SUFFIX int8_avxvnni
#define KERNEL_TARGET "avx2,fma,f16c,avxvnni"
#define KERNEL_HALF
#define KERNEL_PANEL_VECTORS 1
#define KERNEL_INTEGER 1
#define KERNEL_VNNI 1
#include "backward.h"
#endif
