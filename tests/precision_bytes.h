/* What the C programs of the tests know of precisions. */
#ifndef PRECISION_BYTES_H
#define PRECISION_BYTES_H

#include <mfa.h>

#include <stddef.h>

/* The bytes of an element; of INT4, those of two codes. */
static inline size_t precision_bytes(int32_t precision) {
    switch (precision) {
    case MFA_PRECISION_FP64: return 8;
    case MFA_PRECISION_FP32: return 4;
    case MFA_PRECISION_FP16:
    case MFA_PRECISION_BF16: return 2;
    default: return 1;
    }
}

#endif
