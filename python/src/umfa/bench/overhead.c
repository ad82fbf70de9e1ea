/*
 * The cost of a call from C: the flat function on the smallest problem, in a loop. umfa.bench.overhead compiles this file with
 * -DFORWARD_TYPE(name)=..., the type of mfa_attention_forward() as mfa.h declares it, and hands it the library's own function.
 */
#if defined(__linux__)
#define _POSIX_C_SOURCE 199309L
#endif
#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef FORWARD_TYPE(forward_function);

enum { FP32 = 0, HEAD_DIM_MAX = 1024 };

static float query[HEAD_DIM_MAX], key[HEAD_DIM_MAX], value[HEAD_DIM_MAX], output[HEAD_DIM_MAX];

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Seconds that `calls` calls took, for one query and one key of one head; negative if one failed. */
double overhead_seconds(forward_function forward, void* context, int64_t calls, uint16_t head_dim) {
    int32_t failed = 0;
    const double start = now();
    for (int64_t call = 0; call < calls; ++call)
        failed |= forward(context, query, key, value, output, 1, 1, 1, 1, head_dim, 1.0f, 0, FP32, FP32, FP32, 0, 0, 0, 0);
    const double seconds = now() - start;
    return failed ? -1.0 : seconds;
}
