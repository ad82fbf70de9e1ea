#if defined(__aarch64__)
#define KERNEL_SUFFIX float_neon
#define KERNEL_WIDE_SUFFIX fp64_reference
#define KERNEL_INTEGER 0
#define KERNEL_SLICE 4
#define KERNEL_REGISTERS 32
#include "decode.h"
#endif
