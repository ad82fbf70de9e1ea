#define KERNEL_SUFFIX reference
#include "quantization.h"
