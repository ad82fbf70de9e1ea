/* Products with AVX-VNNI: those of AVX-512's VNNI on half as many lanes. See dot_avx2.h for what is defined here. */
enum { QUERY_BIAS = 128, VALUE_BIAS = 0 };
typedef uint8_t lane_code;

#include "bytes.h"
#include "halves.h"

#define add_weighted add_products

#define LANES_OF_ONES ((int_vector)0x01010101)
#define weight_exp2 short_exp2

INLINE int_vector add_products(int_vector sums, int_vector lanes, int_vector codes) {
    const half_vector low = (half_vector)_mm256_dpbusd_avx_epi32((__m256i)sums.lo, (__m256i)lanes.lo, (__m256i)codes.lo);
    const half_vector high = (half_vector)_mm256_dpbusd_avx_epi32((__m256i)sums.hi, (__m256i)lanes.hi, (__m256i)codes.hi);
    return join_halves(low, high);
}

#include "weights_short_bytes.h"
