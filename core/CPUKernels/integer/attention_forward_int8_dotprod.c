#if defined(__aarch64__)
#define KERNEL_SUFFIX int8_dotprod
#define KERNEL_AGAIN_SUFFIX fp32_reference
#define KERNEL_TARGET "dotprod"
#define KERNEL_PANEL_VECTORS 1
#define KERNEL_I8MM 0
#define KERNEL_DOT "dot_neon.h"
#include "forward_int8.h"
#endif
