#if defined(__aarch64__)
#define KERNEL_SUFFIX float_neon
#define KERNEL_PANEL_VECTORS 1
#define KERNEL_INTEGER 0
#include "backward.h"
#endif
