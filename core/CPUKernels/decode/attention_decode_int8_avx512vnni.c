#if defined(__x86_64__)
#define KERNEL_SUFFIX int8_avx512vnni
#define KERNEL_WIDE_SUFFIX fp64_reference_avx512
#define KERNEL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
#define KERNEL_AVX512
#define KERNEL_INTEGER 1
#define KERNEL_VNNI 1
#define KERNEL_SLICE 16
#define KERNEL_REGISTERS 32
#include "decode.h"
#endif
