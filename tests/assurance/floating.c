/* Reads and sets how this thread computes with floats, for test_floating_environment.py: the register of the processor, as it is. */
#include <stdint.h>

#if defined(__x86_64__)

uint64_t floating_get(void) {
    uint16_t x87;
    __asm__ volatile("fnstcw %0" : "=m"(x87));
    return (uint64_t)x87 << 32 | __builtin_ia32_stmxcsr();
}

void floating_set(uint64_t environment) {
    const uint16_t x87 = (uint16_t)(environment >> 32);
    __asm__ volatile("fldcw %0" : : "m"(x87));
    __builtin_ia32_ldmxcsr((uint32_t)environment);
}

#elif defined(__aarch64__)

uint64_t floating_get(void) {
    uint64_t control, status;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("mrs %0, fpsr" : "=r"(status));
    return status << 32 | control;
}

void floating_set(uint64_t environment) {
    __asm__ volatile("msr fpcr, %0" : : "r"(environment & UINT32_MAX));
    __asm__ volatile("msr fpsr, %0" : : "r"(environment >> 32));
}

#endif
