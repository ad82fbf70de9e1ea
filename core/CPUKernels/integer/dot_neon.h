/* Products with NEON. KERNEL_I8MM: usdot multiplies unsigned weights by signed values; without it they are multiplied as unsigned bytes, the
 * values with a bias. Queries and keys are both signed. See dot_avx2.h for what is defined here. */
#if KERNEL_I8MM
enum { QUERY_BIAS = 0, VALUE_BIAS = 0 };
#else
enum { QUERY_BIAS = 0, VALUE_BIAS = 128 };
#endif
typedef int8_t lane_code;

#include "bytes.h"
#include "weights_float.h"

#define LANES_OF_ONES ((int_vector)0x01010101)
#define weight_exp2 short_exp2

typedef int32_t quarter_vector __attribute__((ext_vector_type(4)));

INLINE int_vector broadcast_codes(int32_t few) {
    return (int_vector)few;
}

#define BY_QUARTERS(product)                                                                                                              \
    const quarter_vector q0 = product((quarter_vector)sums.lo.lo, (quarter_vector)lanes.lo.lo, (quarter_vector)codes.lo.lo);              \
    const quarter_vector q1 = product((quarter_vector)sums.lo.hi, (quarter_vector)lanes.lo.hi, (quarter_vector)codes.lo.hi);              \
    const quarter_vector q2 = product((quarter_vector)sums.hi.lo, (quarter_vector)lanes.hi.lo, (quarter_vector)codes.hi.lo);              \
    const quarter_vector q3 = product((quarter_vector)sums.hi.hi, (quarter_vector)lanes.hi.hi, (quarter_vector)codes.hi.hi);              \
    return __builtin_shufflevector(__builtin_shufflevector(q0, q1, 0, 1, 2, 3, 4, 5, 6, 7),                                               \
                                   __builtin_shufflevector(q2, q3, 0, 1, 2, 3, 4, 5, 6, 7), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, \
                                   14, 15)

INLINE quarter_vector add_signed_quarter(quarter_vector sums, quarter_vector lanes, quarter_vector codes) {
    return (quarter_vector)vdotq_s32((int32x4_t)sums, (int8x16_t)lanes, (int8x16_t)codes);
}

/* Queries by keys. */
INLINE int_vector add_products(int_vector sums, int_vector lanes, int_vector codes) {
    BY_QUARTERS(add_signed_quarter);
}

INLINE quarter_vector add_weighted_quarter(quarter_vector sums, quarter_vector lanes, quarter_vector codes) {
#if KERNEL_I8MM
    return (quarter_vector)vusdotq_s32((int32x4_t)sums, (uint8x16_t)lanes, (int8x16_t)codes);
#else
    return (quarter_vector)vdotq_u32((uint32x4_t)sums, (uint8x16_t)lanes, (uint8x16_t)codes);
#endif
}

/* Weights by values. */
INLINE int_vector add_weighted(int_vector sums, int_vector lanes, int_vector codes) {
    BY_QUARTERS(add_weighted_quarter);
}

INLINE int_vector round_weights(vector weights[STEP], const vector logarithms[STEP], const weight_offset offsets[STEP]) {
    (void)logarithms;
    for (int k = 0; k < STEP; k++) weights[k] += vector_select(weights[k] < 8, vector_of(offsets[k]), vector_of(0));
    const vector w0 = weights[0] + ROUND_TO_INTEGER, w1 = weights[1] + ROUND_TO_INTEGER; /* leaves integers in the low bytes */
    const vector w2 = weights[2] + ROUND_TO_INTEGER, w3 = weights[3] + ROUND_TO_INTEGER;
    const int_vector low = (*(const int_vector*)&w0 & 0xFF) | ((*(const int_vector*)&w1 & 0xFF) << 8);
    return low | ((*(const int_vector*)&w2 & 0xFF) << 16) | (*(const int_vector*)&w3 << 24);
}
