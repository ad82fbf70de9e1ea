#if defined(__aarch64__)
#define KERNEL_SUFFIX float_neon
#define KERNEL_WIDE_SUFFIX fp64_reference
#define KERNEL_PANEL_VECTORS 1
#include "forward_float.h"
#endif
