#define KERNEL_FP64 0
#define KERNEL_SUFFIX fp32_reference
#include "attention.h"
