/* Products with AVX2 of INT4 keys and values: vpmaddubsw multiplies unsigned bytes of lanes by signed codes, and 16 bits hold the sums of a few
 * steps of codes that are as small. (Those of INT8 would saturate.) See dot_avx2.h for what is defined here. */
enum { QUERY_BIAS = 128, VALUE_BIAS = 0 };
typedef uint8_t lane_code;

#define SHORT_STEPS 4
enum { LARGEST_CODE = 16 };
_Static_assert(SHORT_STEPS * 2 * 255 * LARGEST_CODE <= INT16_MAX, "short sums do not saturate");

#include "bytes.h"
#include "halves.h"

#define add_weighted add_products

#define LANES_OF_ONES ((int_vector)0x01010101)
#define weight_exp2 short_exp2

typedef struct {
    __m256i low, high;
} short_sums;

INLINE short_sums multiply_shortly(int_vector lanes, int_vector codes) {
    return (short_sums){
        _mm256_maddubs_epi16((__m256i)lanes.lo, (__m256i)codes.lo),
        _mm256_maddubs_epi16((__m256i)lanes.hi, (__m256i)codes.hi),
    };
}

INLINE short_sums join_short_sums(short_sums a, short_sums b) {
    return (short_sums){_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)};
}

INLINE int_vector add_short_sums(int_vector sums, short_sums few) {
    const __m256i ones = _mm256_set1_epi16(1);
    return sums + join_halves((half_vector)_mm256_madd_epi16(few.low, ones), (half_vector)_mm256_madd_epi16(few.high, ones));
}

INLINE int_vector add_products(int_vector sums, int_vector lanes, int_vector codes) {
    return add_short_sums(sums, multiply_shortly(lanes, codes));
}

#include "weights_short_bytes.h"
