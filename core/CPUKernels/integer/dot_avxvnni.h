/* Products with AVX-VNNI: those of AVX-512's VNNI on half as many lanes. See dot_avx2.h for what is defined here. */
enum { QUERY_BIAS = 128, VALUE_BIAS = 0 };
typedef uint8_t lane_code;

#include "bytes.h"

#define add_weighted add_products

#define LANES_OF_ONES ((int_vector)0x01010101)
#define weight_exp2 short_exp2

typedef int32_t half_vector __attribute__((ext_vector_type(8)));

INLINE int_vector broadcast_codes(int32_t few) {
    half_vector half = (half_vector)few;
    __asm__("" : "+x"(half)); /* in a register, lest it be loaded anew for each product */
    return __builtin_shufflevector(half, half, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
}

INLINE int_vector add_products(int_vector sums, int_vector lanes, int_vector codes) {
    const half_vector low = (half_vector)_mm256_dpbusd_avx_epi32((__m256i)sums.lo, (__m256i)lanes.lo, (__m256i)codes.lo);
    const half_vector high = (half_vector)_mm256_dpbusd_avx_epi32((__m256i)sums.hi, (__m256i)lanes.hi, (__m256i)codes.hi);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

#include "weights_short.h"

/* Those of the first and the third column, then the others: pairs whose integers are two bytes apart. */
INLINE int64_t weight_offset_place(int64_t column) {
    return (column & ~(int64_t)3) | (column & 1) << 1 | (column >> 1 & 1);
}

INLINE int_vector round_weights(const vector weights[STEP], const weight_offset offsets[STEP]) {
    return round_pair(weights[0], weights[2], offsets) | (round_pair(weights[1], weights[3], offsets + 2) << 8);
}
