#define KERNEL_FP64 0
#define KERNEL_SUFFIX fp32_reference
#define KERNEL_WIDE_SUFFIX fp64_reference
#include "attention.h"
