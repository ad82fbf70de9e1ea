#include "cpu_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

bool cpu_has_avx2(void) {
#if defined(__x86_64__)
    /* The builtin also asks whether the operating system keeps the wide registers, which F16C needs as AVX2 does. */
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        return false;
    }
    unsigned int eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
#else
    return false;
#endif
}

bool cpu_has_avx512(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

bool cpu_has_avx512vnni(void) {
#if defined(__x86_64__)
    return cpu_has_avx2() && cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}
