#if defined(__aarch64__)
#define KERNEL_SUFFIX float_neon
#define KERNEL_PANEL_VECTORS 1
#include "backward_float.h"
#endif
