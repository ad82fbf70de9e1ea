#include "support.h"

#if defined(__x86_64__)

enum { MXCSR_DEFAULT = 0x1F80 }; /* to the nearest, denormals are numbers, nothing traps, nothing has been raised */

support_environment support_environment_enter(void) {
    const uint32_t environment = __builtin_ia32_stmxcsr();
    if (environment != MXCSR_DEFAULT) {
        __builtin_ia32_ldmxcsr(MXCSR_DEFAULT);
    }
    return environment;
}

void support_environment_leave(support_environment environment) {
    __builtin_ia32_ldmxcsr(environment);
}

#else

support_environment support_environment_enter(void) {
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    return environment;
}

void support_environment_leave(support_environment environment) {
    fesetenv(&environment);
}

#endif
