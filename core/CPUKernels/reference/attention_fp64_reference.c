#define KERNEL_FP64 1
#define KERNEL_SUFFIX fp64_reference
#include "attention.h"
