#if defined(__x86_64__)
#define KERNEL_SUFFIX int8_avxvnni
#define KERNEL_WIDE_SUFFIX fp64_reference_avx2
#define KERNEL_TARGET "avx2,fma,f16c,avxvnni"
#define KERNEL_INTEGER 1
#define KERNEL_VNNI 1
#define KERNEL_SLICE 8
#define KERNEL_REGISTERS 16
#include "decode.h"
#endif
